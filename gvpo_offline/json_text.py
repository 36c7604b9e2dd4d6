"""Values that a column holds as JSON text."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


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
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    if not (isinstance(found, list) and found and all(map(_is_whole_message, found))):
        return value
    return found if found[0]["role"] in first else value


def _is_whole_message(value: Any) -> bool:
    """Whether a value is a chat message with a role of the APIs and a content or tool calls."""
    if not (isinstance(value, dict) and value.get("role") in _ROLES):
        return False
    return "content" in value or "tool_calls" in value
