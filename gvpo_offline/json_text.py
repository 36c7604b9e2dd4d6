"""Values that a column holds as JSON text."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from gvpo_offline.errors import DataError
from gvpo_offline.limits import parse_json

__all__ = [
    "escaped_surrogates",
    "has_surrogates",
    "is_storable",
    "kind_of",
    "loads",
    "parsed_messages",
]

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


MOST_NESTED = 100
"""Most levels of lists and records within each other that JSON text in a column may have."""


def loads(text: str) -> Any:
    """The value of a JSON text, nested less deeply than functions that walk it can follow.

    Raises:
        ValueError: it is not JSON, or has more levels than `MOST_NESTED`.
    """
    try:
        return parse_json(text, nesting=MOST_NESTED, setting=None)
    except DataError as error:
        raise ValueError(f"{error.rule}: received {error.received}") from error


# An escaped surrogate. A pair of them is a character; a single one is none.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def has_surrogates(data: bytes, value: Any) -> bool:
    """Whether a text in a JSON value holds a lone surrogate, which UTF-8 cannot store.

    Args:
        data: the JSON, in UTF-8.
        value: what it stands for.
    """
    if not _SURROGATE.search(data):
        return False
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def is_storable(value: Any) -> bool:
    """Whether UTF-8 can store every text in a value of texts, lists and dicts.

    A file name whose bytes are not UTF-8 reaches Python as text with lone surrogates.
    """
    if isinstance(value, str):
        return value.isascii() or value.encode("utf-8", "replace").decode() == value
    if isinstance(value, list | tuple):
        return all(map(is_storable, value))
    if isinstance(value, dict):
        return all(is_storable(name) and is_storable(part) for name, part in value.items())
    return True


def escaped_surrogates(value: Any) -> Any:
    """A JSON value with `\\udXXX`, six characters, for each lone surrogate in a text or a name."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list):
        return [escaped_surrogates(part) for part in value]
    if isinstance(value, dict):
        return {escaped_surrogates(n): escaped_surrogates(part) for n, part in value.items()}
    return value


def kind_of(value: Any) -> str:
    """The type of a value, for messages: null for None, else the name of the type."""
    return "null" if value is None else type(value).__name__


def parsed_messages(value: Any, *, first: Collection[str] = _ROLES) -> Any:
    """Chat messages that a column holds as JSON text, as a list; any other value unchanged.

    Args:
        value: a value of a prompt or response column.
        first: the roles that the first message may have, for example only "assistant" in a
            response. A text that is a JSON list of anything but messages stays a text.
    """
    if not (isinstance(value, str) and value.lstrip()[:1] == "["):
        return value
    try:
        found = loads(value)
    except ValueError:
        return value
    if not (isinstance(found, list) and found and all(map(_is_whole_message, found))):
        return value
    return found if found[0]["role"] in first else value


def _is_whole_message(value: Any) -> bool:
    """Whether a value is a chat message with a role of the APIs and a content or tool calls."""
    if not (isinstance(value, dict) and value.get("role") in _ROLES):
        return False
    return "content" in value or "tool_calls" in value
