"""Joins the parts of an assistant's turn (reasoning, text, tool calls) to messages."""

from __future__ import annotations

from typing import Any

from gvpo_offline import values
from gvpo_offline.messages import REASONING

__all__ = ["AssistantTurns"]


class AssistantTurns:
    """Collects parts of a turn in the order in which the model wrote them.

    A message has its reasoning first, then its text, then its tool calls. A part that would come
    out of this order begins a message of its own.

    Attributes:
        messages: the messages so far; one that is empty if nothing was added.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]

    def add_reasoning(self, given: Any) -> None:
        """Add reasoning.

        Raises:
            DataError: it is not text.
        """
        text = values.text(given, "the reasoning of a message")
        own = self._message(not_after=("content", "tool_calls"))
        own[REASONING] = own.get(REASONING, "") + text

    def add_text(self, text: str) -> None:
        """Add text; texts that follow each other are one."""
        own = self._message(not_after=("tool_calls",))
        own["content"] += text

    def add_call(self, name: Any, arguments: Any, call_id: Any) -> None:
        """Add a tool call: its name, its arguments (a record, or JSON text), its id or None."""
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        own = self._message(not_after=())
        own.setdefault("tool_calls", []).append(
            call if call_id is None else {**call, "id": call_id}
        )

    def _message(self, *, not_after: tuple[str, ...]) -> dict[str, Any]:
        if any(self.messages[-1].get(name) for name in not_after):
            self.messages.append({"role": "assistant", "content": ""})
        return self.messages[-1]
