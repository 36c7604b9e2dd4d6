"""Inspect (inspect_ai): `.eval` logs, and `.json` logs of its older form.

A sample is one response: what the model wrote in the sample's messages, from its first message to
its last. Samples with the same id and prompt are a group, over epochs and files. The model of the
log is the sampler. The scores have the names of the scorers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gvpo_offline import conversations, values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.failures import set_endings
from gvpo_offline.importing.formats.shared.log_format import InputInfo
from gvpo_offline.importing.formats.shared.named_scores import NamedScores
from gvpo_offline.importing.formats.shared.trainer_logs import (
    RowLocation,
    TrainerFormat,
    group_id,
    one_response,
)
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record

# What Inspect's own conversion of labels to numbers says.
LABELS = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0}
_ATTACHMENT = "attachment://"
_MAX_DEPTH = 20


def open_format(config: ImportConfig) -> InspectFormat:
    """The format; the keys of `reward_weights` are scorers, or `scorer.key` where the value of a
    score has several keys."""
    return InspectFormat(config)


class InspectFormat(TrainerFormat):
    """Reads the samples of logs."""

    def __init__(self, config: ImportConfig) -> None:
        super().__init__(config, required=("id", "input", "eval"), has_parts=True)
        self._scores = NamedScores(config, "scorer", LABELS)
        self._expects_scores = bool(config.reward_weights or config.missing_rewards == "drop")

    def run_of(self, source: InputInfo) -> str:
        """Empty: neither ids nor names depend on the path of a log."""
        return ""

    def dependencies(self, source: InputInfo) -> Mapping[str, str]:
        """None: the fragments depend on the rows and the settings alone."""
        return {}

    def parse(self, record: Record, place: RowLocation) -> Iterable[Fragment]:
        """See `TrainerFormat.parse`."""
        cause = _failure(record)
        if cause is not None:
            self.record_failure(place, cause)
            return []
        log = values.struct(record["eval"], "eval")
        prompt, response = _split(record)
        fragment = one_response(
            reward=None,
            prompt=conversations.prompt(prompt),
            text=conversations.response(response),
            arguments=conversations.template_arguments({"tools": _tools(record)}),
            sampler=values.sampler(log.get("model")),
        )
        set_endings(fragment, [_stop_reason(record)])
        if fragment.failed is not None and fragment.failed[0] is not None:
            self.record_failure(place, fragment.failed[0])
            return []
        if record.get("limit") is not None:
            fragment.truncated = [True]
        task = log.get("task")
        names = [values.identifier(name) for name in (task, record["id"]) if name is not None]
        fragment.group_id = group_id(fragment, *names)
        if record.get("scores") is None and not self._expects_scores:
            fragment.rewards = None  # the log was not scored
            return [fragment]
        return [self._scores.set(fragment, _scores(record))]

    def finish(self) -> Mapping[str, int]:
        """See `DropsResponses.finish`."""
        found = super().finish()
        self._scores.check()
        return found


def _failure(record: Record) -> str | None:
    error = record.get("error")
    if error is not None:
        message = error.get("message") if isinstance(error, dict) else error
        return f"the error {str(message)[:200]!r}"
    return None if record.get("invalidation") is None else "it was invalidated"


def _stop_reason(record: Record) -> Any:
    choices = _choices(record)
    return choices[0].get("stop_reason") if choices else None


def _choices(record: Record) -> list[dict[str, Any]]:
    output = values.struct(record.get("output"), "output")
    return values.structs(output.get("choices") or [], "output.choices")


def _scores(record: Record) -> dict[str, Any]:
    """The values of all scores; a value with several keys is several."""
    found: dict[str, Any] = {}
    for name, score in values.struct(record.get("scores"), "scores").items():
        value = score.get("value") if isinstance(score, dict) else score
        if isinstance(value, dict):
            found |= {f"{name}.{key}": part for key, part in value.items()}
        else:
            found[name] = value
    return found


def _split(record: Record) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The messages of prompt and response.

    Raises:
        DataError: the model wrote no message.
    """
    given = values.structs(record.get("messages") or [], "messages")
    source = record["input"]
    before = values.structs(source, "input") if isinstance(source, list) else []
    if not given:  # a log without its messages
        given = [*(before or [{"role": "user", "content": source}])]
        given += [
            values.struct(choice.get("message"), "the message of a choice")
            for choice in _choices(record)[:1]
        ]
    own = [i for i, message in enumerate(given) if message.get("role") == "assistant"]
    generated = [i for i in own if given[i].get("source") == "generate"]
    # Logs of 2024 do not say who wrote a message: the input's messages come first.
    shown = sum(message.get("role") == "assistant" for message in before)
    start = next(iter(generated or own[shown:]), None)
    if start is None:
        raise DataError(
            "a sample has a message that the model wrote",
            received=f"the roles {', '.join(str(m.get('role')) for m in given) or 'none'}",
            remedy="remove the sample",
        )
    if start == 0:
        raise DataError("a prompt is not empty", received="no message before the model's")
    if given[start - 1].get("role") == "assistant":
        raise DataError(
            "the message before the model's first one is not the assistant's",
            received=f"the assistant's {str(given[start - 1].get('content'))[:80]!r}",
            remedy="remove the sample: whether the response continues that message is not known",
        )
    attachments = values.struct(record.get("attachments"), "attachments")
    messages = [_message(message, attachments) for message in given]
    return messages[:start], messages[start:]


def _message(message: Mapping[str, Any], attachments: Mapping[str, Any]) -> dict[str, Any]:
    """A message with the fields that a chat template knows."""
    role, content = message.get("role"), message.get("content")
    found: dict[str, Any] = {"role": role}
    if isinstance(content, list):
        parts = [part for part in content if not _is_reasoning(part)]
        thoughts = [_thought(part) for part in content if _is_reasoning(part)]
        content = _resolved(parts, attachments)
        if thoughts:
            found["reasoning_content"] = _resolved("".join(thoughts), attachments)
    else:
        content = _resolved(content, attachments)
    error = message.get("error")
    if role == "tool" and error and not content:
        said = values.struct(error, "the error of a tool").get("message")
        content = values.text(said, "the message of a tool's error")
    found["content"] = content
    calls = message.get("tool_calls")
    if calls:
        found["tool_calls"] = [_call(call) for call in values.structs(calls, "tool_calls")]
    for name, given in (("tool_call_id", "tool_call_id"), ("name", "function")):
        if role == "tool" and message.get(given):
            found[name] = message[given]
    return found


def _is_reasoning(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "reasoning"


def _thought(part: Mapping[str, Any]) -> str:
    if part.get("redacted"):
        raise DataError(
            "the reasoning of a response is text",
            received="reasoning that is encrypted (redacted)",
            remedy="remove the sample",
        )
    return values.text(values.field(part, "reasoning", "a part of reasoning"), "reasoning")


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    if call.get("parse_error"):
        raise DataError(
            "the arguments of a tool call are what the model wrote",
            received=f"a call that Inspect could not parse: {str(call['parse_error'])[:120]}",
            remedy="remove the sample: the log does not have the text of the call",
        )
    function = {"name": call.get("function"), "arguments": call.get("arguments") or {}}
    return {"type": "function", "id": call.get("id"), "function": function}


def _resolved(value: Any, attachments: Mapping[str, Any], depth: int = 0) -> Any:
    """`value` with the texts of the attachments that it names.

    Raises:
        DataError: the sample does not have such an attachment.
    """
    if isinstance(value, str) and value.startswith(_ATTACHMENT):
        name = value.removeprefix(_ATTACHMENT)
        if name not in attachments:
            raise DataError(
                "a sample has the attachments that its messages name",
                received=value[:80],
                remedy="write the log again with Inspect",
            )
        return attachments[name]
    if depth < _MAX_DEPTH and isinstance(value, list):
        return [_resolved(part, attachments, depth + 1) for part in value]
    if depth < _MAX_DEPTH and isinstance(value, dict):
        return {key: _resolved(part, attachments, depth + 1) for key, part in value.items()}
    return value


def _tools(record: Record) -> Sequence[Mapping[str, Any]]:
    """The tools of the model's first request, of which the log has an event."""
    events = record.get("events")
    for event in values.structs(events or [], "events"):
        if event.get("event") == "model" and event.get("role") is None:
            attachments = values.struct(record.get("attachments"), "attachments")
            tools = _resolved(event.get("tools") or [], attachments)
            return [
                {"type": "function", "function": _definition(tool)}
                for tool in values.structs(tools, "the tools of an event")
            ]
    return []


def _definition(tool: Mapping[str, Any]) -> dict[str, Any]:
    known = ("name", "description", "parameters")
    return {name: tool[name] for name in known if tool.get(name) is not None}
