"""Normalises chat messages of logs: one form for JSON, Parquet and the dialects of servers.

A normalised message has `role` and `content` (text, or None beside tool calls) and whatever else
the log holds: tool calls with decoded arguments, `reasoning_content`, ids. Null values are removed
at every level, because columnar files add nulls for the fields of other rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gvpo_offline.errors import DataError
from gvpo_offline.json_text import kind_of, loads

Message = dict[str, Any]

TEXT_PARTS = ("text", "input_text", "output_text")
REASONING = "reasoning_content"
# Other names of `reasoning_content`: vLLM and OpenRouter; gpt-oss and Ollama.
_REASONING_NAMES = ("reasoning", "thinking")
_TOOL_CALLS = "tool_calls"
# What servers and SDKs add to a message; no template renders it.
_ENVELOPE = (
    *("id", "status", "type", "annotations", "created_at", "reasoning_details", "index"),
    *("uuid", "timestamp", "created", "model", "usage", "cache_control"),
    "provider_specific_fields",
    "_open",
)
# Why these three fields are read: a message with more than them is not a plain text.
PLAIN = ("role", "content", "name")


CONTINUE = "continue_final_message"
"""The argument of a chat template that says whether a prompt's last assistant message is continued;
the name that vLLM gives it. Default: it is."""


def is_message(value: Any) -> bool:
    """Whether `value` looks like a chat message."""
    return isinstance(value, dict) and "role" in value


def content_text(content: Any, *, role: str = "message") -> str:
    """The content of a message as text: a text, or a list of text parts, which are joined.

    Args:
        content: the content.
        role: role of the message, for the error.

    Raises:
        DataError: it is neither; names the part that is no text (image_url, input_audio …).
    """
    if isinstance(content, np.ndarray):
        content = content.tolist()
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part_text(part, role) for part in content)
    raise DataError(
        "the content of a message is text, or a list of text parts",
        received=f"{content!r} in a message of role {role}",
        remedy="log the text, or the token ids of prompt and response",
    )


def _part_text(part: Any, role: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else kind_of(part)
    if isinstance(part, dict) and kind in TEXT_PARTS:
        # LLaMA-Factory's parts hold their text in `value`.
        text = part.get("text", part.get("value"))
        if isinstance(text, str):
            return text
    raise DataError(
        f"the parts of a message are text ({', '.join(TEXT_PARTS)})",
        received=f"a part of type {kind!r} in a message of role {role}: {str(part)[:120]}",
        remedy="remove the row: the policy is a language model and reads text alone",
    )


def without_nulls(value: Any) -> Any:
    """`value` without the null values of records, at every level. Lists keep their nulls."""
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [without_nulls(part) for part in value]
    return value


def normalised(message: Mapping[str, Any]) -> Message:
    """A message in the form that all logs share; see the module's docstring.

    Raises:
        DataError: the message has no role, its content is no text, or a tool call has no name.
    """
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise DataError("a message has a role", received=f"role {role!r}")
    if len(message) == 2 and isinstance(text := message.get("content"), str):
        return {"role": role, "content": text}
    kept: Message = {"role": role}
    rest = {
        key: value
        for key, value in without_nulls(message).items()
        if key not in (*_ENVELOPE, "role", "content") and not _is_empty(value)
    }
    if "function_call" in rest:  # the form of OpenAI before tool calls
        rest[_TOOL_CALLS] = [{"type": "function", "function": rest.pop("function_call")}]
    if _TOOL_CALLS in rest:
        rest[_TOOL_CALLS] = [_tool_call(_parsed(call)) for call in _list(rest[_TOOL_CALLS])]
    reasoning = [rest.pop(name) for name in _REASONING_NAMES if name in rest]
    if reasoning:
        rest.setdefault(REASONING, reasoning[0])
    if REASONING in rest:
        rest[REASONING] = content_text(rest[REASONING], role=f"{role} ({REASONING})")
    content = message.get("content")
    if content is None:
        if _TOOL_CALLS not in rest and REASONING not in rest:
            content_text(content, role=role)  # raises
        kept["content"] = None if _TOOL_CALLS in rest else ""
    else:
        kept["content"] = content_text(content, role=role)
    return {**kept, **rest}


def _is_empty(value: Any) -> bool:
    return isinstance(value, str | list | dict) and not value


def _parsed(value: Any) -> Any:
    """A value that data sets may hold as JSON text."""
    try:
        return without_nulls(loads(value)) if isinstance(value, str) else value
    except ValueError:
        return value


def _list(calls: Any) -> list[Any]:
    found = _parsed(calls)
    return found if isinstance(found, list) else [found]


def _tool_call(call: Any) -> dict[str, Any]:
    """A tool call with arguments as a record; OpenAI's APIs hold them as JSON text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
        raise DataError(
            "a tool call has a function with a name",
            received=f"{call!r}"[:200],
            remedy="correct or remove the row",
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            # Servers write the arguments of a call without any as an empty text or null.
            decoded = without_nulls(loads(arguments or "{}"))
            decoded = {} if decoded is None else decoded
        except ValueError:
            decoded = None
        # Text that is no JSON object stays as the model wrote it.
        arguments = decoded if isinstance(decoded, dict) else arguments
    outer = {k: v for k, v in call.items() if k not in ("function", "name", "arguments")}
    return {"type": "function", **outer, "function": {**function, "arguments": arguments}}


def with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    """Messages with the arguments of tool calls as JSON text, as OpenAI's API takes them."""

    def call_as_text(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": arguments}}

    return [
        {**m, "tool_calls": list(map(call_as_text, m["tool_calls"]))} if m.get("tool_calls") else m
        for m in messages
    ]


def is_plain(message: Message) -> bool:
    """Whether a normalised message is a text and nothing else."""
    return not set(message) - set(PLAIN) and isinstance(message["content"], str)


def response_messages(value: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages of a response: from its first assistant message to its last one.

    Messages after the last assistant message (results of a last tool call) are left out: the
    policy wrote none of their tokens, and nothing follows them.

    Raises:
        DataError: the first message is not the assistant's, the model refused, or a message is
            invalid.
    """
    for message in value:
        if message.get("refusal"):
            raise DataError(
                "a response was not refused",
                received=f"refusal: {message['refusal']!r}",
                remedy="remove the response, or log the refusal's text as its content",
            )
    found = [normalised(message) for message in value]
    if not found or found[0]["role"] != "assistant":
        raise DataError(
            "a response begins with an assistant message",
            received=f"the roles {', '.join(m['role'] for m in found) or 'none'}",
            remedy="move the messages before it to the prompt",
        )
    last = max(i for i, message in enumerate(found) if message["role"] == "assistant")
    return found[: last + 1]
