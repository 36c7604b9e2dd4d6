"""Calls of models as tracing products log them: what was sent, what came back, and scores.

What was sent is the request of a client (OpenAI's, LangChain's), its messages, or a text; what came
back is the API's answer, a message, LangChain's generations, or a text.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gvpo_offline import conversations, values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.annotations import Annotations
from gvpo_offline.importing.formats.shared.failures import set_endings
from gvpo_offline.importing.formats.shared.log_format import InputInfo
from gvpo_offline.importing.formats.shared.named_scores import NamedScores
from gvpo_offline.importing.formats.shared.span_messages import sent_tools
from gvpo_offline.importing.formats.shared.spans import as_list, at, parsed
from gvpo_offline.importing.formats.shared.trainer_logs import (
    RowLocation,
    TrainerFormat,
    one_response,
)
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record
from gvpo_offline.openai.answer import AnswerChoice, choices_of
from gvpo_offline.openai.shapes import (
    answer_errors,
    choice_content,
    output_reply,
    request_arguments,
    response_ending,
    responses_prompt,
)

__all__ = ["CallFormat", "LoggedCall"]

# LangChain's names of roles, as types and as classes.
_ROLES = {
    "human": "user", "ai": "assistant", "system": "system", "tool": "tool", "function": "tool",
    "developer": "developer", "HumanMessage": "user", "AIMessage": "assistant",
    "SystemMessage": "system", "ToolMessage": "tool", "HumanMessageChunk": "user",
    "AIMessageChunk": "assistant", "SystemMessageChunk": "system", "ToolMessageChunk": "tool",
}  # fmt: skip
# What APIs and LangChain put beside the fields of a message; no template renders it.
_ENVELOPE = (
    *("audio", "provider_specific_fields", "additional_kwargs", "response_metadata"),
    *("usage_metadata", "model", "usage", "stop_reason", "stop_sequence", "container"),
    "invalid_tool_calls",
)
Answer = tuple[conversations.Reply, Any]
"""A response and its finish reason."""


@dataclass
class LoggedCall:
    """A call of a model.

    Attributes:
        key: its id.
        sent: what was sent, perhaps as JSON text.
        returned: what came back, perhaps as JSON text.
        model: name of the model, or None.
        error: why it failed, or None.
        tools: tool definitions that stand beside what was sent.
        scores: scores that the log itself holds, by name.
    """

    key: str | None
    sent: Any
    returned: Any
    model: Any = None
    error: str | None = None
    tools: Sequence[Any] = ()
    scores: dict[str, Any] = field(default_factory=dict)


class CallFormat(TrainerFormat):
    """A format whose rows hold calls of models. Responses to one prompt are a group, the model is
    the sampler, and scores are those of the log and those of the file that `rewards` names.

    Args:
        config: the import's settings.
        kind: what the producer calls a score.
        labels: numbers that the producer's own labels stand for.
    """

    def __init__(
        self, config: ImportConfig, kind: str, labels: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(config, required=(), has_parts=True)
        self._scores = NamedScores(config, kind, labels)
        self._annotations = (
            None if config.rewards is None else Annotations(config.rewards, config.limits)
        )
        self._expects = bool(
            config.rewards or config.reward_weights or config.missing_rewards == "drop"
        )
        self.others = 0
        self.unused = 0

    @abstractmethod
    def calls(self, record: Record) -> Iterable[LoggedCall]:
        """The calls of models in a row; `others` counts what is none.

        Raises:
            DataError: the row does not have this format.
        """

    def run_of(self, source: InputInfo) -> str:
        """Empty: neither ids nor names depend on the path of a log."""
        return ""

    def dependencies(self, source: InputInfo) -> Mapping[str, str]:
        """The SHA-256 of the file of scores."""
        return {} if self._annotations is None else {"rewards": self._annotations.describe()}

    def parse(self, record: Record, place: RowLocation) -> Iterable[Fragment]:
        """See `TrainerFormat.parse`."""
        return [found for call in self.calls(record) for found in self._responses(call, place)]

    def _responses(self, call: LoggedCall, place: RowLocation) -> Iterable[Fragment]:
        if call.error is not None:
            self.record_failure(place, call.error)
            return
        prompt, arguments = _prompt(call)
        answers = _answers(parsed(call.returned))
        scores = dict(call.scores)
        if self._annotations is not None:
            scores |= self._annotations.of(None if call.key is None else call.key.lower())
        if scores and len(answers) > 1:
            raise DataError(
                "a score belongs to a call with one response",
                received=f"{len(answers)} responses with one value of {', '.join(scores)}",
                remedy="remove the call, or its scores",
            )
        for number, (reply, reason) in enumerate(answers):
            fragment = one_response(
                reward=None,
                prompt=prompt,
                text=reply,
                arguments=arguments,
                sampler=values.sampler(call.model),
                response_id=call.key if number == 0 or not call.key else f"{call.key}#{number}",
            )
            set_endings(fragment, [reason])
            if fragment.failed is not None and fragment.failed[0] is not None:
                self.record_failure(place, fragment.failed[0])
                continue
            if not scores and not self._expects:
                fragment.rewards = None  # a log without scores
            else:
                self._scores.set(fragment, scores)
            yield fragment

    def finish(self) -> Mapping[str, int]:
        """See `DropsResponses.finish`; spans of other kinds and unused scores are counted."""
        found = super().finish()
        self._scores.check()
        unused = 0 if self._annotations is None else len(self._annotations.unused)
        return {
            **found,
            "dropped_other_spans": self.others,
            "unused_annotations": self.unused + unused,
        }


def _prompt(call: LoggedCall) -> tuple[conversations.Prompt, str | None]:
    """The prompt of a call, and its arguments of the chat template."""
    sent = parsed(call.sent)
    body: dict[str, Any] = {}
    if isinstance(sent, dict):
        body, tools = sent, as_list(sent.get("tools")) or call.tools
        extra = values.struct(body.get("extra_body") or {}, "extra_body")
        arguments = request_arguments({**body, **extra, "tools": sent_tools(tools)})
        if isinstance(body.get("messages"), list):
            system = body.get("system") or body.get("instructions")
            first = [{"role": "system", "content": system}] if system else []
            sent = [*first, *_flat(body["messages"], "messages")]
        elif body.get("input") is not None:
            return responses_prompt(body), arguments
        elif body.get("prompt") is not None or body.get("prompts"):
            sent = body.get("prompt") or _flat(body["prompts"], "prompts")
            sent = sent[0] if isinstance(sent, list) and len(sent) == 1 else sent
        elif "role" in body or "lc" in body:
            sent = [body]
    else:
        arguments = request_arguments({"messages": sent, "tools": sent_tools(call.tools)})
    if isinstance(sent, list):
        sent = [_message(message) for message in _flat(sent, "messages")]
    if not sent or isinstance(sent, dict):
        raise DataError(
            "what was sent to a model is messages, a request with messages, input or prompt, or a "
            "text",
            received=f"{str(sent)[:120]!r}",
            remedy="remove the call, or import the log with format: flat and paths of its columns",
        )
    return conversations.prompt(sent), arguments


def _flat(given: Any, what: str) -> list[Any]:
    """A list, of which LangChain has one for each prompt of a batch."""
    found = as_list(given, what)
    if found and isinstance(found[0], list):
        if len(found) > 1:
            raise DataError(f"a call has one prompt: one list of {what}", received=len(found))
        return found[0]
    return found


def _answers(returned: Any) -> list[Answer]:
    """The responses of a call."""
    if isinstance(returned, str):
        return [(conversations.response(returned), None)]
    if isinstance(returned, list) and returned:
        return [(conversations.response([_message(entry) for entry in returned]), None)]
    if isinstance(returned, dict):
        if returned.get("choices"):
            return _choices(returned)
        if isinstance(returned.get("output"), list):
            _, word = response_ending(returned)
            return [(output_reply(returned["output"]), word)]
        if returned.get("generations"):
            return [_generated(one) for one in _flat(returned["generations"], "generations")]
        if isinstance(returned.get("messages"), list):
            return _answers(returned["messages"])
        if "content" in returned or "lc" in returned or "tool_calls" in returned:
            reply = conversations.response([{**_message(returned), "role": "assistant"}])
            return [(reply, returned.get("stop_reason"))]
    raise DataError(
        "what came back from a model is an answer with choices, output or generations, messages, "
        "or a text",
        received=f"{str(returned)[:120]!r}",
        remedy="remove the call, or import the log with format: flat and paths of its columns",
    )


def _choices(body: Mapping[str, Any]) -> list[Answer]:
    found = []
    with answer_errors("an answer has choices"):
        choices = choices_of(body)
    for choice in choices:
        with answer_errors("a choice has a message or a text"):
            read = AnswerChoice(choice, body)
        reason = "refusal" if read.refusal else read.finish_reason
        reply = conversations.Reply("") if read.refusal else choice_content(read)[0]
        found.append((reply, reason))
    return found


def _generated(entry: Any) -> Answer:
    """A generation of LangChain."""
    info = at(entry, "generation_info") or at(entry, "generationInfo") or {}
    message = at(entry, "message")
    if message is None:
        return conversations.response(at(entry, "text")), at(info, "finish_reason")
    inner = at(message, "kwargs") or message
    reason = at(info, "finish_reason") or at(inner, "response_metadata", "finish_reason")
    return conversations.response([_message(message)]), reason


def _message(message: Any) -> dict[str, Any]:
    """A message in the form of OpenAI's API, from that or from LangChain's."""
    inner = at(message, "kwargs") or at(message, "data") or message
    if not isinstance(inner, dict):
        raise DataError("a message is a record", received=str(message)[:120])
    role = inner.get("role")
    found: dict[str, Any]
    if isinstance(role, str):
        found = {name: value for name, value in inner.items() if name not in _ENVELOPE}
    else:
        role = _role(message)
        found = {"role": role, "content": inner.get("content")}
        if role == "tool" and inner.get("tool_call_id"):
            found["tool_call_id"] = inner["tool_call_id"]
    calls = as_list(inner.get("tool_calls"))
    if calls:
        found["tool_calls"] = [_call(call) for call in calls]
        if isinstance(found.get("content"), list):  # Anthropic's content repeats the calls
            parts = [part for part in found["content"] if at(part, "type") != "tool_use"]
            found["content"] = parts or None
    thought = at(inner, "additional_kwargs", "reasoning_content")
    if thought:
        found["reasoning_content"] = thought
    return found


def _role(message: Any) -> str:
    kind = at(message, "type")
    if at(message, "lc") is not None:
        kind = (as_list(at(message, "id")) or [None])[-1]
    role = _ROLES.get(str(kind))
    if role is None:
        raise DataError(
            "a message has a role, or a type of LangChain",
            received=f"{kind!r} in {str(message)[:80]}",
        )
    return role


def _call(call: Any) -> Any:
    """A tool call in OpenAI's form; LangChain's has `name` and `args`."""
    if at(call, "function") is not None or at(call, "args") is None:
        return call
    own = {"name": at(call, "name"), "arguments": at(call, "args")}
    return {"type": "function", "id": at(call, "id"), "function": own}
