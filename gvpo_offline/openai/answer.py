"""What counts as an answer of an OpenAI-compatible server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# As OpenAI says it, and as text-generation-inference does.
ENDED = ("stop", "eos_token", "stop_sequence")
CUT = "length"
_SHOWN = 120


class BadAnswerError(Exception):
    """An answer, or a part of one, that will not do; its text is the cause."""


def choices_of(answer: Any) -> dict[int, Mapping[str, Any]]:
    """The choices of an answer's JSON, by number.

    Raises:
        BadAnswerError: there are none.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices:
        raise BadAnswerError(f"an answer without choices: {json.dumps(answer)[:_SHOWN]}")
    return {
        choice.get("index", position): choice
        for position, choice in enumerate(choices)
        if isinstance(choice, dict)
    }


def finish_of(choice: Mapping[str, Any]) -> str:
    """One of `ENDED`, or `CUT`.

    Raises:
        BadAnswerError: the choice came to neither.
    """
    finish = choice.get("finish_reason")
    if finish not in (*ENDED, CUT):
        raise BadAnswerError(f"the finish reason {finish!r}, which is neither an end nor a cut")
    return str(finish)


def text_of(choice: Mapping[str, Any]) -> str:
    """The text of a choice, of chat completions or of completions; may be empty.

    Raises:
        BadAnswerError: it has none, or what is none in Unicode.
    """
    message = choice.get("message")
    if isinstance(message, dict) and message.get("tool_calls"):
        raise BadAnswerError("a tool call")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    if not isinstance(text, str):
        raise BadAnswerError(f"a text that is {json.dumps(text)[:40]}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadAnswerError(f"a text that is no Unicode ({error.reason})") from error
    return text
