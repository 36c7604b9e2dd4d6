"""Requests and responses in the shapes of OpenAI's APIs: chat completions, completions, responses.

What is text stays text. A response that is more than one text (reasoning set apart, tool calls,
pictures) cannot be put back together from what the API shows of it, and is refused: its token ids
can, and are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gvpo_offline import values
from gvpo_offline.errors import DataError
from gvpo_offline.group import Int32Array
from gvpo_offline.values import token_ids

__all__ = [
    "chat",
    "choice_ids",
    "choice_text",
    "output_text",
    "request_prompt",
    "responses_prompt",
    "was_cut",
]

_TEXT_PARTS = ("text", "input_text", "output_text")
_TOKEN_ID = re.compile(r"token_id:(\d+)")
_WITH_IDS = "sample again and have the server return token ids (vLLM: return_token_ids)"


def content_text(content: Any) -> str:
    """A message's content, text or a list of parts that are, as text.

    Raises:
        DataError: it is neither.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") in _TEXT_PARTS for part in content
    ):
        return "".join(str(part["text"]) for part in content)
    raise DataError("a message's content is text, or a list of text parts", received=repr(content))


def chat(messages: Any) -> values.Prompt:
    """Chat messages, or items of type message, as a prompt.

    Raises:
        DataError: they are anything else, or hold more than text.
    """
    if not (isinstance(messages, list) and all(map(values.is_message, messages))):
        raise DataError("a chat's prompt is a list of messages", received=repr(messages))
    plain = []
    for message in messages:
        kept = {k: v for k, v in message.items() if k not in ("id", "status", "type")}
        if kept.get("content") is not None or not kept.get("tool_calls"):
            kept["content"] = content_text(kept.get("content"))
        plain.append(kept)
    return values.prompt(plain)


def request_prompt(body: Mapping[str, Any]) -> tuple[values.Prompt, Int32Array | None]:
    """The prompt of a request to any of the three APIs, and its token ids if it was sent so.

    Raises:
        DataError: the request is of another kind, or for several prompts at once.
    """
    if "messages" in body:
        return chat(body["messages"]), None
    if "input" in body:
        return responses_prompt(body), None
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(i, int) for i in prompt):
        return (None, None), token_ids(prompt, "prompt")
    if isinstance(prompt, str):
        return values.prompt(prompt), None
    raise DataError(
        "a request holds one prompt: messages, input, or prompt",
        received=f"prompt {prompt!r} among {', '.join(body) or 'nothing'}",
        remedy="send one prompt in a request",
    )


def responses_prompt(params: Mapping[str, Any]) -> values.Prompt:
    """The prompt of a request to the responses API.

    Raises:
        DataError: it is more than text.
    """
    given = params["input"]
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if params.get("instructions") and isinstance(messages, list):
        messages = [{"role": "system", "content": params["instructions"]}, *messages]
    return chat(messages)


def choice_text(choice: Mapping[str, Any], *, whole: bool = True) -> str | None:
    """The text of a choice of either completions API, or None if it has none.

    Args:
        choice: with a `message` or a `text`.
        whole: whether the text has to be all that the model wrote.

    Raises:
        DataError: it is not.
    """
    if "text" in choice:
        return values.response(choice["text"])
    message = choice.get("message")
    if not isinstance(message, dict):
        raise DataError("a choice has a message or a text", received=repr(choice))
    for name in ("tool_calls", "function_call", "reasoning", "reasoning_content"):
        if whole and message.get(name):
            raise DataError(
                "a response is one text",
                received=f"a message with {name}",
                remedy=_WITH_IDS,
            )
    content = message.get("content")
    return None if content is None else values.valid_text(content_text(content))


def choice_ids(choice: Mapping[str, Any]) -> Int32Array | None:
    """The token ids of a choice, where the server gave them: (T,) int32.

    As `token_ids`, or as log-probs' tokens of the form token_id:123, both vLLM's; tokens that are
    text say nothing sure about ids.
    """
    if choice.get("token_ids") is not None:
        return token_ids(choice["token_ids"], "token_ids")
    logprobs = choice.get("logprobs") or {}
    tokens = logprobs.get("tokens") or [t.get("token") for t in logprobs.get("content") or ()]
    found = [_TOKEN_ID.fullmatch(str(token)) for token in tokens]
    if not found or None in found:
        return None
    return np.array([int(match[1]) for match in found if match], np.int32)


def output_text(output: Sequence[Mapping[str, Any]]) -> str:
    """The text of a response of the responses API: that of its one message.

    Raises:
        DataError: it has other items, several messages or none.
    """
    kinds = [str(item.get("type", "message")) for item in output]
    if kinds != ["message"]:
        raise DataError(
            "a response is one message of text",
            received=f"the items {', '.join(kinds) or 'none'}",
            remedy=_WITH_IDS,
        )
    return values.valid_text(content_text(output[0].get("content")))


def was_cut(response: Mapping[str, Any]) -> bool:
    """Whether a response of the responses API was cut before its end."""
    return response.get("status") == "incomplete" or bool(response.get("incomplete_details"))
