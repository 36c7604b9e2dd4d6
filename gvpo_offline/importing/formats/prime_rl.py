"""prime-rl: its episodes in `rollouts/step_<n>/<train|eval>/<all|effective>/traces.jsonl`.

An episode holds one trace per agent; the traces of trainable agents are read. A trace is a graph of
messages with their token ids, and it must be a single path. If the sampler logged token ids, they
are imported unchanged and the loss mask is false on tokens that the policy did not write; otherwise
a trace must have a single answer. Traces with the same group id and agent are a group, and their
sampler is `run@step`. The log has the names and weights of the parts of a reward; `reward_weights`
replaces those weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gvpo_offline import conversations, values
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.finish_reasons import ending, stop_string
from gvpo_offline.importing.formats.shared.trainer_logs import (
    RowLocation,
    TrainerFormat,
    add_parts,
    group_id,
    one_response,
    trajectory,
)
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record
from gvpo_offline.openai.shapes import chat
from gvpo_offline.values import flags, token_ids

_STEP = re.compile(r"step_(\d+)")
_CUT = ("max_turns", "max_input_tokens", "max_output_tokens", "max_total_tokens", "context_length")
Node = Mapping[str, Any]


def open_format(config: ImportConfig) -> PrimeRLFormat:
    """The format; the keys of `reward_weights` are names of the environments' rewards."""
    return PrimeRLFormat(config)


class PrimeRLFormat(TrainerFormat):
    """Reads the episodes of prime-rl."""

    def __init__(self, config: ImportConfig) -> None:
        super().__init__(config, required=("id", "traces", "ok"), has_parts=True)
        self._parts: set[str] = set()

    def finish(self) -> Mapping[str, int]:
        """See `DropsResponses.finish`."""
        unknown = sorted(set(self.config.reward_weights) - self._parts)
        if unknown:
            raise ConfigError(
                "each name in reward_weights is a reward of the log",
                received=", ".join(unknown),
                remedy=f"choose among {', '.join(sorted(self._parts)) or 'none'}",
            )
        return super().finish()

    def parse(self, record: Record, place: RowLocation) -> Iterable[Fragment]:
        """See `TrainerFormat.parse`."""
        traces = [t for t in record["traces"] if t.get("agent", {}).get("trainable", True)]
        if not traces:
            self.record_failure(place, f"episode {record['id']} has no trace of the policy")
        for trace in traces:
            if not trace.get("ok"):
                self.record_failure(place, _failure(trace))
                continue
            reason = _last_reason(trace)
            if ending(reason) == "failed":
                self.record_failure(place, f"trace {trace['id']}: the finish reason {reason!r}")
                continue
            fragment = self._response(trace, place, record)
            group = record.get("group")
            if group is None:
                fragment.group_id = group_id(fragment, *_sampler(record, place))
            else:
                agent = trace.get("agent", {}).get("name", "agent")
                fragment.group_id = f"{place.run}/{group['id']}/{agent}"
            yield fragment

    def _response(self, trace: Record, place: RowLocation, episode: Record) -> Fragment:
        path = _path(trace)
        parts, weights = self._rewards(trace.get("rewards") or {})
        common: dict[str, Any] = {
            "reward": add_parts(parts, weights),
            "parts": parts,
            "sampler": "@".join(_sampler(episode, place)),
            "truncated": _truncated(trace),
            "stop_string": stop_string(_last_reason(trace)),
            "response_id": values.identifier(trace["id"]),
        }
        sampled = [node for node in path if node.get("sampled")]
        if any(node.get("token_ids") for node in sampled):
            cut = trajectory(
                token_ids([i for node in path for i in node["token_ids"]], "token_ids"),
                flags([m for node in path for m in node["mask"]], "mask"),
            )
            return one_response(prompt_ids=cut.prompt_ids, ids=cut.ids, mask=cut.mask, **common)
        first = next((i for i, node in enumerate(path) if node.get("sampled")), len(path))
        written = [n for n in path[first:] if n["message"].get("role") == "assistant"]
        if not sampled or any(node not in sampled for node in written):
            raise DataError(
                "the policy wrote every assistant message of a trace from its first one on",
                received=f"{len(sampled)} of its messages among {len(path)}",
                remedy="sample with the renderer's client, which logs token ids",
            )
        prompt = chat([node["message"] for node in path[:first]])
        reply = conversations.response([node["message"] for node in path[first:]])
        return one_response(prompt=prompt, text=reply, **common)

    def _rewards(
        self, rewards: Mapping[str, Any]
    ) -> tuple[dict[str, float | None], Mapping[str, float]]:
        parts = {name: self.part(r and r["score"], name) for name, r in rewards.items()}
        self._parts.update(parts)
        logged = {name: float(r["weight"]) if r else 1.0 for name, r in rewards.items()}
        chosen = self.config.reward_weights
        return parts, {n: chosen[n] for n in parts if n in chosen} if chosen else logged


def _sampler(episode: Record, place: RowLocation) -> tuple[str, ...]:
    """The run and, if the log has it, the step."""
    run = episode.get("run") or {}
    name = str(run.get("name") or run.get("id") or place.run)
    step = (run.get("work") or {}).get("step")
    if step is None and (found := _STEP.search(place.label)):
        step = found[1]
    return (name,) if step is None else (name, str(step))


def _failure(trace: Record) -> str:
    errors = trace.get("errors") or [{"message": trace.get("stop_condition")}]
    return f"trace {trace['id']} failed ({errors[-1].get('message')})"


def _last_reason(trace: Record) -> Any:
    """The finish reason of the last call that gave a response; None without one."""
    calls = [call for call in trace.get("calls") or () if not call.get("error")]
    return calls[-1].get("finish_reason") if calls else None


def _truncated(trace: Record) -> bool:
    # Environments name their own stop conditions, so an unknown one is no cut.
    return trace.get("stop_condition") in _CUT or ending(_last_reason(trace)) == "cut"


def _path(trace: Record) -> Sequence[Node]:
    """The messages of a trace, from the first to the last.

    Raises:
        DataError: the graph of messages branches.
    """
    nodes: list[Node] = trace.get("nodes") or []
    parents = [node.get("parent") for node in nodes]
    leaves = sorted(set(range(len(nodes))) - set(parents))
    if len(leaves) != 1:
        raise DataError(
            "a trace is a single path of messages",
            received=f"{len(leaves)} ends in trace {trace.get('id')}",
            remedy="remove traces that branch (compaction, sub-agents): their reward does not "
            "belong to one response",
        )
    order = []
    at: int | None = leaves[0]
    while at is not None:
        order.append(nodes[at])
        at = parents[at]
    return order[::-1]
