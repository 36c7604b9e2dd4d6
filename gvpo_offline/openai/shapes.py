"""Logged requests and responses of OpenAI's APIs: chat completions, completions, responses.

A response that is more than one text (reasoning apart from it, tool calls, images) cannot be put
back together from its JSON, so it is refused, and the remedy asks for its token ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from gvpo_offline import values
from gvpo_offline.errors import DataError
from gvpo_offline.finish_reasons import Ending, ending
from gvpo_offline.group import Int32Array
from gvpo_offline.openai.answer import (
    BESIDE_TEXT,
    AnswerChoice,
    BadAnswerError,
    content_text,
)
from gvpo_offline.values import token_ids

__all__ = [
    "answer_errors",
    "chat",
    "choice_content",
    "output_text",
    "request_prompt",
    "response_ending",
    "responses_prompt",
    "was_cut",
]

_WITH_IDS = "sample again and have the server return token ids (vLLM: return_token_ids)"


@contextmanager
def answer_errors(rule: str) -> Iterator[None]:
    """Raise a BadAnswerError of the block as a DataError with this rule."""
    try:
        yield
    except BadAnswerError as error:
        raise DataError(rule, received=str(error), remedy=_WITH_IDS) from error


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
            with answer_errors("the content of a prompt's message is text"):
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


def choice_content(choice: AnswerChoice) -> tuple[str | None, Int32Array | None]:
    """Text and (T,) int32 token ids of a choice of either completions API, None where it has none.

    Raises:
        DataError: they are invalid, or there are no ids and the text is not all that was written.
    """
    with answer_errors("a response is one text, or has token ids"):
        ids = choice.token_ids
        text = choice.text(beside=() if ids is None else BESIDE_TEXT)
    return text, None if ids is None else np.array(ids, np.int32)


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
    with answer_errors("a response is one message of text"):
        return content_text(output[0].get("content"))


def response_ending(response: Mapping[str, Any]) -> tuple[Ending, str | None]:
    """How a response of the responses API ended, and the word that says so.

    Of an incomplete one `incomplete_details.reason` decides: a filter is no cut.

    Raises:
        DataError: a word that `finish_reasons` does not list.
    """
    details = response.get("incomplete_details")
    reason = details.get("reason") if isinstance(details, dict) else details
    if reason is not None:
        found = ending(reason)
        return ("cut" if found == "unknown" else found), reason
    status = response.get("status")
    return ending(status), status


def was_cut(response: Mapping[str, Any]) -> bool:
    """Whether a response of the responses API was cut before its end."""
    return response_ending(response)[0] == "cut"
