"""Gemini's batches: results of the Gemini API, joined by `key` with the requests, or of Vertex AI,
whose rows hold both; and, optionally, a file of rewards (`rewards`).

Thought parts become reasoning, function calls become tool calls, function responses become messages
of role tool. Names of fields may be in camelCase (the API) or snake_case (the Python SDK).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gvpo_offline import conversations, values
from gvpo_offline.errors import DataError
from gvpo_offline.finish_reasons import ending
from gvpo_offline.importing.formats.shared.assistant import AssistantTurns
from gvpo_offline.importing.formats.shared.batches import BatchFormat, Sent
from gvpo_offline.importing.formats.shared.trainer_logs import one_response
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record
from gvpo_offline.messages import without_nulls
from gvpo_offline.values import plain

Messages = list[dict[str, Any]]

_ROLES = {"user": "user", "model": "assistant", "function": "user", None: "user"}
# Fields beside the content of a part.
_BESIDE = ("thought", "thoughtSignature")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")


def open_format(config: ImportConfig) -> GeminiBatchFormat:
    """The format; the keys of `reward_weights` are columns of the file of rewards."""
    return GeminiBatchFormat(config)


class GeminiBatchFormat(BatchFormat):
    """Reads the lines of a batch's results."""

    id_columns = ("key", "custom_id", "id")

    def __init__(self, config: ImportConfig) -> None:
        super().__init__(config, required=(), requests=config.requests)

    def key(self, record: Record) -> str:
        """See `BatchFormat.key`; inline requests have the key in their metadata."""
        metadata = record.get("metadata")
        if isinstance(metadata, dict) and metadata.get("key") is not None:
            return values.identifier(metadata["key"])
        return super().key(record)

    def sent(self, record: Record) -> Sent:
        """See `BatchFormat.sent`."""
        request = record.get("request")
        if not isinstance(request, dict) or "contents" not in request:
            raise DataError(
                "a request has contents; results of the Gemini API are without their requests",
                received=f"the columns {', '.join(record)}",
                remedy="set requests to the file that was sent (rows of key and request)",
            )
        system = _field(request, "systemInstruction")
        found: Messages = []
        if system:
            parts = system
            if not isinstance(system, str):
                parts = values.struct(system, "systemInstruction").get("parts")
            found.append({"role": "system", "content": _text(parts, "system")})
        contents = request["contents"]
        if isinstance(contents, str):
            contents = [{"role": "user", "parts": [{"text": contents}]}]
        for content in values.structs(contents, "the contents of a request"):
            found += _messages(content)
        tools = [
            function
            for tool in values.entries(request.get("tools") or [], "tools")
            for function in _tools(tool)
        ]
        return Sent(
            conversations.prompt(found),
            conversations.template_arguments({"tools": tools}),
            model=_model(request.get("model")),
        )

    def answers(self, record: Record, sent: Sent) -> Sequence[Fragment | str]:
        """See `BatchFormat.answers`."""
        failed = record.get("error") or record.get("status")
        response = record.get("response")
        if failed and not (isinstance(response, dict) and response.get("candidates")):
            message = failed.get("message", failed) if isinstance(failed, dict) else failed
            return [f"failed ({message})"]
        if not isinstance(response, dict):
            raise DataError(
                "a result has a response, or an error",
                received=f"the columns {', '.join(record)}",
                remedy="set inputs to the results that the batch API returns",
            )
        candidates = response.get("candidates")
        if not candidates:
            feedback = _field(response, "promptFeedback")
            reason = _field(feedback, "blockReason") if isinstance(feedback, dict) else None
            return [f"no candidates{'' if reason is None else f' ({reason})'}"]
        model = _model(_field(response, "modelVersion")) or sent.model
        found = values.structs(candidates, "the candidates of a response")
        return [_answer(candidate, sent, model) for candidate in found]


def _answer(candidate: Mapping[str, Any], sent: Sent, model: str | None) -> Fragment | str:
    reason = _field(candidate, "finishReason")
    ended = ending(reason)
    if ended == "failed":
        return f"the finish reason {reason!r}"
    content = values.struct(candidate.get("content"), "the content of a candidate")
    return one_response(
        prompt=sent.prompt,
        arguments=sent.arguments,
        text=conversations.response(_assistant(content.get("parts") or [])),
        sampler=values.sampler(model),
        truncated=ended == "cut",
        reward=None,
    )


def _field(record: Mapping[str, Any], name: str) -> Any:
    """A field by its name in camelCase, or the same in snake_case."""
    found = record.get(name)
    return record.get(_HUMP.sub("_", name).lower()) if found is None else found


def _model(name: Any) -> str | None:
    found = values.sampler(name)
    return None if found is None else found.removeprefix("models/")


def _messages(content: Mapping[str, Any]) -> Messages:
    """A content of a request; one with results of functions becomes several messages."""
    sender = content.get("role")
    role = _ROLES.get(sender) if isinstance(sender, str | None) else None
    if role is None:
        raise DataError("a content is by user or model", received=f"role {sender!r}")
    parts = content.get("parts") or []
    return _assistant(parts) if role == "assistant" else list(_user_messages(parts))


def _user_messages(parts: Any) -> Iterator[dict[str, Any]]:
    texts: list[Any] = []
    for part in map(without_nulls, values.structs(parts, "the parts of a content")):
        result = _field(part, "functionResponse")
        if result is None:
            texts.append(part)
            continue
        if texts:
            yield {"role": "user", "content": _text(texts, "user")}
            texts = []
        result = values.struct(result, "a functionResponse")
        answer = result.get("response")
        yield {
            "role": "tool",
            "name": result.get("name"),
            "tool_call_id": result.get("id"),
            "content": json.dumps(answer, ensure_ascii=False, default=plain),
        }
    if texts or not parts:
        yield {"role": "user", "content": _text(texts, "user")}


def _assistant(parts: Any) -> Messages:
    """The model's messages: thoughts, text and function calls that follow each other are one."""
    turns = AssistantTurns()
    for part in map(without_nulls, values.structs(parts, "the parts of a content")):
        call = _field(part, "functionCall")
        if call is not None:
            call = values.struct(call, "a functionCall")
            turns.add_call(call.get("name"), call.get("args") or {}, call.get("id"))
        elif part.get("thought"):
            turns.add_reasoning(_text([part], "model"))
        else:
            turns.add_text(_text([part], "model"))
    return turns.messages


def _text(parts: Any, role: str) -> str:
    """Text parts, joined."""
    if isinstance(parts, str):
        return parts
    texts = []
    for part in map(without_nulls, values.structs(parts, "the parts of a content")):
        text = part.get("text")
        if text is None and set(part) <= {*_BESIDE, "thought_signature"}:
            text = ""  # a signature alone
        if not isinstance(text, str):
            raise DataError(
                "the parts of a content are text, function calls and function responses",
                received=f"a part with {', '.join(part) or 'nothing'} in a content by {role}",
                remedy="remove the row: the policy is a language model and reads text alone",
            )
        texts.append(text)
    return "".join(texts)


def _tools(tool: Any) -> list[dict[str, Any]]:
    declared = _field(tool, "functionDeclarations") if isinstance(tool, dict) else None
    if not isinstance(declared, list):
        names = ", ".join(tool) if isinstance(tool, dict) else repr(tool)
        raise DataError(
            "a request's tools are functionDeclarations",
            received=f"a tool of the server: {names}",
            remedy="remove the row: its answer may hold what the server's tool returned",
        )
    found = []
    for function in values.structs(declared, "functionDeclarations"):
        schema = _field(function, "parametersJsonSchema") or function.get("parameters")
        kept = {key: function.get(key) for key in ("name", "description")}
        named = without_nulls({**kept, "parameters": schema})
        found.append({"type": "function", "function": named})
    return found
