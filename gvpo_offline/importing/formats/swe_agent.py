"""SWE-agent's and mini-SWE-agent's trajectories, with the flags of an evaluation (`rewards`).

The response is the whole trajectory: what the agent wrote counts, observations do not. Trajectories
of one instance with the same prompt, of all runs, are a group; the run is the sampler.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gvpo_offline import conversations, values
from gvpo_offline.errors import DataError
from gvpo_offline.finish_reasons import normal_form
from gvpo_offline.importing.formats.shared.log_format import InputInfo
from gvpo_offline.importing.formats.shared.parts import part_weights
from gvpo_offline.importing.formats.shared.resolved import ResolvedFlags
from gvpo_offline.importing.formats.shared.trainer_logs import (
    RowLocation,
    TrainerFormat,
    add_parts,
    group_id,
    one_response,
    run_name,
)
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record, Row
from gvpo_offline.json_text import loads
from gvpo_offline.messages import REASONING, content_text

Messages = list[dict[str, Any]]

_SUFFIXES = (".traj.json", ".traj")
_COMPLETE = ("submitted", "exit_forfeit", "exit_command")
_CUT = (
    *("exit_cost", "exit_context", "exit_format", "exit_total_execution_time"),
    *("exit_command_timeout", "limits_exceeded", "time_exceeded"),
)
_FAILED = ("exit_api", "exit_environment_error", "exit_error", "early_exit")
# What agents add to a message; the model did not read it, or read it as part of another field.
_BESIDE = (
    *("agent", "message_type", "is_demo", "thought", "action", "tags", "cache_control", "extra"),
    *("tool_call_ids", "thinking_blocks", "provider_specific_fields"),
)
_log = logging.getLogger(__name__)


def open_format(config: ImportConfig) -> SweAgentFormat:
    """The format; the keys of `reward_weights` are columns of the file of rewards."""
    return SweAgentFormat(config)


class SweAgentFormat(TrainerFormat):
    """Reads trajectories: one per file, or one per row."""

    def __init__(self, config: ImportConfig) -> None:
        super().__init__(config, required=(), has_parts=True)
        if config.rewards is None:
            part_weights(config, {})
        self._flags = (
            None
            if config.rewards is None
            else ResolvedFlags(config.rewards, self.part, config.limits)
        )
        self._warned = False

    def dependencies(self, source: InputInfo) -> Mapping[str, str]:
        """The run, and the SHA-256 of the files of rewards."""
        own = {} if self._flags is None else {"rewards": self._flags.digest()}
        return {**super().dependencies(source), **own}

    def run_of(self, source: InputInfo) -> str:
        """The folder of the run; each instance may have its own folder within it."""
        instance = _instance(source.label)
        if instance is None:
            return run_name(source)
        folder = Path(source.label).absolute().parent
        return (folder.parent if folder.name == instance else folder).name or "run"

    def read(self, rows: Iterable[Row], source: InputInfo) -> Iterator[Fragment]:
        """The fragments of each row; see `LogFormat.read`."""
        if self._flags is not None:
            self._flags.open(lambda names: part_weights(self.config, dict.fromkeys(names, 1.0)))
        yield from super().read(rows, source)

    def parse(self, record: Record, place: RowLocation) -> Iterable[Fragment]:
        """See `TrainerFormat.parse`."""
        info = values.struct(record.get("info"), "info")
        status = info.get("exit_status") or record.get("exit_status")
        ended = _ending(status)
        if ended == "failed":
            self.record_failure(place, f"the exit status {status!r}")
            return []
        history = _history(record)
        start = next((i for i, m in enumerate(history) if _is_answer(m)), len(history))
        if start == len(history):
            raise DataError(
                "a trajectory holds what the agent wrote",
                received="no message of the assistant",
                remedy="remove the file",
            )
        prompt, answer = history[:start], [_message(m) for m in history[start:]]
        self._warn(record, answer)
        fragment = one_response(
            prompt=conversations.prompt([_message(m) for m in prompt]),
            text=conversations.response(answer),
            truncated=ended == "cut",
            sampler=values.sampler(record.get("model")) or place.run,
            reward=None,
        )
        instance = record.get("instance_id") or _instance(place.label)
        named = [] if instance is None else [values.identifier(instance)]
        fragment.group_id = group_id(fragment, *named)
        self._score(fragment, record, named, place)
        return [fragment]

    def _score(
        self, fragment: Fragment, record: Record, instance: Sequence[str], place: RowLocation
    ) -> None:
        if self._flags is not None:
            parts = self._flags.of(instance[0] if instance else None, place.label, place.run)
            fragment.rewards = [add_parts(parts, self._flags.weights)]
            fragment.components = {name: [value] for name, value in parts.items()}
        elif "resolved" in record:
            fragment.rewards = [self.reward(record["resolved"], "resolved")]
        else:
            fragment.rewards = None

    def _warn(self, record: Record, answer: Messages) -> None:
        given = record.get("tools") or self.config.chat_template_kwargs.get("tools")
        if self._warned or given or not any(message.get("tool_calls") for message in answer):
            return
        self._warned = True
        _log.warning(
            "The trajectories call tools and do not hold the definitions of the tools, which are "
            "part of the prompt that the agent's model read. Set chat_template_kwargs.tools to "
            "them."
        )


def _instance(label: str) -> str | None:
    """The id of the instance that a trajectory file is named after."""
    name = Path(label).name
    for end in (".gz", ".bz2", ".zst"):
        name = name.removesuffix(end)
    found = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
    return None if found is None else name.removesuffix(found)


def _ending(status: Any) -> str:
    """How a trajectory ended: complete, cut, failed or unknown."""
    if status is None:
        return "unknown"
    word, _, why = normal_form(str(status)).partition("_(")
    if why:  # submitted (exit_cost): what there was when a limit was reached
        return "cut"
    for ending, words in (("complete", _COMPLETE), ("cut", _CUT), ("failed", _FAILED)):
        if word in words:
            return ending
    raise DataError(
        f"an exit status means complete ({', '.join(_COMPLETE)}), cut ({', '.join(_CUT)}) or "
        f"failed ({', '.join(_FAILED)})",
        received=repr(status),
        remedy="replace the word in the log by one of these",
    )


def _history(record: Record) -> Messages:
    """The messages of a trajectory, those of the prompt first.

    Raises:
        DataError: they are not in the log, are of several agents, or are not what the model read.
    """
    name = next((n for n in ("history", "messages") if record.get(n) is not None), None)
    steps = values.structs(record.get("trajectory") or [], "the steps of trajectory")
    # Its name was `messages` in the first releases of SWE-agent 1.
    queries = [step.get("query") or step.get("messages") for step in steps]
    last = next((i for i in reversed(range(len(steps))) if queries[i]), None)
    query = [] if last is None else values.structs(queries[last], "the messages of query")
    if name is None:
        if last is None or last != len(steps) - 1:
            raise DataError(
                "a trajectory holds its messages: history, messages, or the query of its last step",
                received=f"the columns {', '.join(record)}",
                remedy="remove the file",
            )
        history: Messages = [*query, {"role": "assistant", "content": steps[last].get("response")}]
    else:
        history = values.structs(_decoded(record[name], name), f"the messages of {name}")
    agents = {
        values.identifier(m["agent"]) for m in history if m.get("agent") and not m.get("is_demo")
    }
    if len(agents) > 1:
        raise DataError(
            "the messages of a trajectory are of one agent",
            received=f"the agents {', '.join(sorted(agents))}",
            remedy="remove the file",
        )
    if list(map(_read, query)) != list(map(_read, history[: len(query)])):
        raise DataError(
            "the last query of a trajectory is the beginning of its history",
            received="another query: the agent's history processors rewrote the context",
            remedy="remove the file: no one sequence of tokens holds what the model read and wrote",
        )
    return history


def _decoded(value: Any, name: str) -> Any:
    try:
        return loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DataError(
            f"{name} is a list of messages, or its JSON", received=str(error)
        ) from error


def _read(message: Mapping[str, Any]) -> tuple[Any, str]:
    content = message.get("content")
    return message.get("role"), "" if content is None else content_text(content)


def _is_answer(message: Mapping[str, Any]) -> bool:
    return message.get("role") == "assistant" and not message.get("is_demo")


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in message.items() if key not in _BESIDE}
    called = message.get("tool_call_ids")
    if called and message.get("role") == "tool":
        kept["tool_call_id"] = values.entries(called, "tool_call_ids")[0]
    thinking = values.structs(message.get("thinking_blocks") or [], "thinking_blocks")
    texts = [block.get("thinking") for block in thinking]
    if not all(isinstance(text, str) and text for text in texts):
        raise DataError(
            "the reasoning of a response is text",
            received="a thinking block without its text",
            remedy="remove the file",
        )
    return {**kept, REASONING: "".join(map(str, texts))} if texts else kept
