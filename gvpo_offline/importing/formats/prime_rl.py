"""prime-rl: its episodes in `rollouts/step_<n>/<train|eval>/<all|effective>/traces.jsonl`.

An episode holds one trace per agent; the traces of trainable agents are read. A trace is a graph of
messages with their token ids, and it must be a single path. If the sampler logged token ids, they
are imported unchanged and the loss mask is false on tokens that the policy did not write; otherwise
a trace must have a single answer. Traces with the same group id and agent are a group, and their
sampler is `run@step`. The log has the names and weights of the parts of a reward; `reward_weights`
replaces those weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gvpo_offline import conversations, values
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.finish_reasons import ending, stop_string
from gvpo_offline.group import BoolArray
from gvpo_offline.importing.formats.shared.trainer_logs import (
    RowLocation,
    TrainerFormat,
    add_parts,
    group_id,
    one_response,
    step_name,
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
        traces = [
            trace
            for trace in values.structs(record["traces"], "traces")
            if _agent(trace).get("trainable", True)
        ]
        if not traces:
            self.record_failure(place, f"episode {record['id']} has no trace of the policy")
        for trace in traces:
            if not trace.get("ok"):
                self.record_failure(place, _failure(trace))
                continue
            reason = _last_reason(trace)
            if ending(reason) == "failed":
                self.record_failure(place, f"trace {trace.get('id')}: the finish reason {reason!r}")
                continue
            fragment = self._response(trace, place, record)
            group = record.get("group")
            if group is None:
                fragment.group_id = group_id(fragment, *_sampler(record, place))
            else:
                agent = values.identifier(_agent(trace).get("name", "agent"))
                named = values.identifier(values.struct(group, "group").get("id"))
                fragment.group_id = f"{place.run}/{named}/{agent}"
            yield fragment

    def _response(self, trace: Record, place: RowLocation, episode: Record) -> Fragment:
        path = _path(trace)
        parts, weights = self._rewards(
            values.struct(trace.get("rewards"), "the rewards of a trace")
        )
        common: dict[str, Any] = {
            "reward": add_parts(parts, weights),
            "parts": parts,
            "sampler": "@".join(_sampler(episode, place)),
            "truncated": _truncated(trace),
            "stop_string": stop_string(_last_reason(trace)),
            "response_id": values.identifier(trace.get("id")),
        }
        sampled = [node for node in path if node.get("sampled")]
        if any(node.get("token_ids") for node in sampled):
            cut = trajectory(
                np.concatenate([token_ids(node.get("token_ids"), "token_ids") for node in path]),
                np.concatenate([_mask(node) for node in path]),
            )
            return one_response(prompt_ids=cut.prompt_ids, ids=cut.ids, mask=cut.mask, **common)
        first = next((i for i, node in enumerate(path) if node.get("sampled")), len(path))
        messages = [values.struct(node.get("message"), "the message of a node") for node in path]
        written = [
            node
            for node, message in zip(path[first:], messages[first:], strict=True)
            if message.get("role") == "assistant"
        ]
        if not sampled or any(node not in sampled for node in written):
            raise DataError(
                "the policy wrote every assistant message of a trace from its first one on",
                received=f"{len(sampled)} of its messages among {len(path)}",
                remedy="sample with the renderer's client, which logs token ids",
            )
        reply = conversations.response(messages[first:])
        return one_response(prompt=chat(messages[:first]), text=reply, **common)

    def _rewards(
        self, rewards: Mapping[str, Any]
    ) -> tuple[dict[str, float | None], Mapping[str, float]]:
        given = {name: values.struct(own, f"the reward {name!r}") for name, own in rewards.items()}
        parts = {
            name: self.part(values.field(own, "score", "a reward"), name) if own else None
            for name, own in given.items()
        }
        self._parts.update(parts)
        logged = {name: _weight(own) if own else 1.0 for name, own in given.items()}
        chosen = self.config.reward_weights
        return parts, {n: chosen[n] for n in parts if n in chosen} if chosen else logged


def _agent(trace: Record) -> Mapping[str, Any]:
    return values.struct(trace.get("agent"), "the agent of a trace")


def _mask(node: Node) -> BoolArray:
    """The mask of a node's tokens, of which there are as many."""
    mask = flags(node.get("mask"), "mask")
    if len(mask) != len(token_ids(node.get("token_ids"), "token_ids")):
        raise DataError("a node has one flag of mask for each of its token_ids", received=len(mask))
    return mask


def _weight(reward: Record) -> float:
    weight = values.number(values.field(reward, "weight", "a reward"), "the weight of a reward")
    if weight is None or not math.isfinite(weight):
        raise DataError("the weight of a reward is a finite number", received=weight)
    return weight


def _sampler(episode: Record, place: RowLocation) -> tuple[str, ...]:
    """The run and, if the log has it, the step."""
    run = values.struct(episode.get("run"), "run")
    name = values.identifier(run.get("name") or run.get("id") or place.run)
    step = values.struct(run.get("work"), "run.work").get("step")
    if step is None and (found := _STEP.search(place.label)):
        step = found[1]
    return (name,) if step is None else (name, step_name(step))


def _failure(trace: Record) -> str:
    errors = values.structs(trace.get("errors") or [], "the errors of a trace")
    why = errors[-1].get("message") if errors else trace.get("stop_condition")
    return f"trace {trace.get('id')} failed ({why})"


def _last_reason(trace: Record) -> Any:
    """The finish reason of the last call that gave a response; None without one."""
    given = values.structs(trace.get("calls") or [], "the calls of a trace")
    calls = [call for call in given if not call.get("error")]
    return calls[-1].get("finish_reason") if calls else None


def _truncated(trace: Record) -> bool:
    # Environments name their own stop conditions, so an unknown one is no cut.
    return trace.get("stop_condition") in _CUT or ending(_last_reason(trace)) == "cut"


def _path(trace: Record) -> Sequence[Node]:
    """The messages of a trace, from the first to the last.

    Raises:
        DataError: the graph of messages branches.
    """
    nodes = values.structs(trace.get("nodes") or [], "the nodes of a trace")
    parents = [node.get("parent") for node in nodes]
    for parent in parents:
        if parent is not None and not (type(parent) is int and 0 <= parent < len(nodes)):
            raise DataError(
                "the parent of a node is the position of another node of the trace, or null",
                received=f"{parent!r} among {len(nodes)} nodes",
            )
    leaves = sorted(set(range(len(nodes))) - set(parents))
    order: list[Node] = []
    at = leaves[0] if len(leaves) == 1 else None
    while at is not None and len(order) < len(nodes):
        order.append(nodes[at])
        at = parents[at]
    if len(leaves) != 1 or at is not None or len(order) < len(nodes):
        raise DataError(
            "a trace is a single path of messages",
            received=f"{len(leaves)} ends in trace {trace.get('id')}, and {len(order)} of "
            f"{len(nodes)} messages on a path",
            remedy="remove traces that branch (compaction, sub-agents): their reward does not "
            "belong to one response",
        )
    return order[::-1]
