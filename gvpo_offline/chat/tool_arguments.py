"""Arguments of tool calls as a template reads them: records, or JSON text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gvpo_offline.messages import Message

__all__ = ["argument_records", "prints_records"]


def argument_records(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The arguments of all tool calls that are records."""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    return [
        call["function"]["arguments"]
        for call in calls
        if isinstance(call["function"].get("arguments"), dict)
    ]


def prints_records(messages: Sequence[Message], text: str) -> bool:
    """Whether the template printed arguments as Python dictionaries."""
    return any(record and str(record) in text for record in argument_records(messages))
