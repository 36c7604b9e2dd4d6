"""Prompts and responses of a log's row: text, chat messages, arguments of the chat template.

Each function raises DataError for a value that it cannot convert; the caller adds file and row.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gvpo_offline.errors import DataError
from gvpo_offline.json_text import loads, parsed_messages
from gvpo_offline.messages import (
    is_message,
    is_plain,
    normalised,
    response_messages,
    without_nulls,
)
from gvpo_offline.values import plain, structs, valid_text

Prompt = tuple[str | None, str | None]
"""A prompt as (text, chat messages in JSON), of which at least one is None."""


def messages(value: Sequence[Mapping[str, Any]]) -> str:
    """Chat messages, normalised, as JSON; see `gvpo_offline.messages`.

    Raises:
        DataError: a message is invalid, or holds more than text.
    """
    kept = [normalised(message) for message in value]
    return valid_text(json.dumps(kept, ensure_ascii=False, default=plain))


def conversation(turns: Sequence[Any]) -> Prompt:
    """The prompt of a chat from its texts: user and assistant alternate, user first and last.

    Raises:
        DataError: a turn is not text, the number of turns is even, or the last one is empty.
    """
    if not (len(turns) % 2 and all(isinstance(text, str) for text in turns) and turns[-1]):
        raise DataError(
            "a prompt is text that is not empty; of several turns, the user's come first and last",
            received=turns[0] if len(turns) == 1 else turns,
            remedy="correct or remove the row",
        )
    roles = itertools.cycle(("user", "assistant"))
    return None, messages(
        [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    )


def template_arguments(record: Mapping[str, Any], **further: Any) -> str | None:
    """Arguments of the chat template that a row or request holds, as JSON; None without any.

    Args:
        record: a row with, optionally, `tools` (tool definitions) and `chat_template_kwargs` (a
            record of other arguments), as JSON text or as they are.
        further: more arguments; None where there is none.

    Raises:
        DataError: one of the two has another type.
    """
    found: dict[str, Any] = {}
    for name, kind in (("chat_template_kwargs", dict), ("tools", list)):
        value = record.get(name)
        if isinstance(value, str) and value:
            try:
                value = loads(value)
            except ValueError:
                value = record[name]
        value = without_nulls(value)
        if value is None or value in ("", [], {}):
            continue
        if not isinstance(value, kind):
            raise DataError(
                f"{name} is a {kind.__name__}, or its JSON",
                received=repr(record[name])[:200],
                remedy="correct or remove the column",
            )
        found |= {"tools": [_decoded(tool) for tool in value]} if name == "tools" else value
    found |= {name: value for name, value in further.items() if value is not None}
    if not found:
        return None
    # The keys within a tool keep their order: templates print them in it.
    ordered = dict(sorted(found.items()))
    return valid_text(json.dumps(ordered, ensure_ascii=False, default=plain))


def _decoded(tool: Any) -> Any:
    """A tool definition, which data sets may hold as JSON text."""
    try:
        return without_nulls(loads(tool)) if isinstance(tool, str) else tool
    except ValueError as error:
        raise DataError("a tool definition is a record, or its JSON", received=tool) from error


def prompt(value: Any) -> Prompt:
    """A prompt given as text or chat messages; (None, None) for null.

    Raises:
        DataError: it is neither, or the list of messages is empty.
    """
    value = parsed_messages(value)
    if value is None:
        return None, None
    if isinstance(value, str):
        return valid_text(value), None
    if isinstance(value, dict) and isinstance(value.get("role"), list):
        value = structs(value, "chat messages")
    if not (isinstance(value, list) and all(map(is_message, value))):
        raise DataError(
            'a prompt is text or a list of chat messages, {"role": ..., "content": ...}',
            received=value,
            remedy="set columns.prompt to the column that holds the prompt",
        )
    if not value:
        raise DataError("a prompt is not empty", received="no messages", remedy="remove the row")
    return None, messages(value)


@dataclass(frozen=True, slots=True)
class Reply:
    """A response of a log.

    Attributes:
        text: its text: of the last message, if it has several; None if the log has none.
        messages: its messages as JSON, if it is more than one text, else None.
    """

    text: str | None
    messages: str | None = None


def response(value: Any) -> Reply:
    """A response given as text, as a message, or as messages that begin with the assistant's.

    Raises:
        DataError: it is neither, or a message is invalid.
    """
    if isinstance(value, Reply):
        return value
    value = parsed_messages(value, first=("assistant",))
    if value is None or isinstance(value, str):
        return Reply(None if value is None else valid_text(value))
    if isinstance(value, dict):
        value = structs(value, "chat messages") if isinstance(value.get("role"), list) else [value]
    if not (isinstance(value, list) and value and all(map(is_message, value))):
        raise DataError(
            "a response is text, or a list of messages that begins with the assistant's",
            received=value,
            remedy="set columns.response to the column that holds the response",
        )
    found = response_messages(value)
    text = valid_text(found[-1]["content"] or "")
    if len(found) == 1 and is_plain(found[0]):
        return Reply(text)
    return Reply(text, valid_text(json.dumps(found, ensure_ascii=False, default=plain)))
