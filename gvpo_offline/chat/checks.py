"""Checks that the rendering of messages holds all that they say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_offline.errors import DataError
from gvpo_offline.messages import Message

__all__ = ["bare", "check_texts", "not_rendered", "unknown_field"]


def check_texts(messages: Sequence[Message], text: str, arguments: Mapping[str, Any]) -> None:
    """Check that a rendering holds the text of every message and the name of every tool.

    Raises:
        DataError: one is missing; names its role.
    """
    counts: dict[str, int] = {}
    for message in messages:
        for needed in _texts(message):
            counts[needed] = counts.get(needed, 0) + 1
            if _count(text, needed) < counts[needed]:
                raise not_rendered(message)
    for tool in arguments.get("tools") or ():
        name = tool.get("function", tool).get("name") if isinstance(tool, dict) else None
        if not isinstance(name, str) or name not in text:
            raise DataError(
                "the chat template renders the prompt's tools",
                received=f"the tool {name!r}, which the rendering does not hold",
                remedy="set chat_template to the template of the sampler, or log the prompt's "
                "token ids",
            )


def bare(text: str) -> str:
    """A text without white space, which templates trim and write themselves."""
    return "".join(text.split())


def _texts(message: Message) -> list[str]:
    """The texts of a message that a rendering of it holds."""
    content = (message.get("content") or "").strip()
    if message["role"] == "assistant" and "</think>" in content:
        # Templates leave the reasoning of earlier turns out, as the server did.
        content = content.rpartition("</think>")[2].strip()
    names = [call["function"]["name"] for call in message.get("tool_calls") or ()]
    return [text for text in (content, *names) if text]


def _count(text: str, needed: str) -> int:
    found = text.count(needed)
    if found:
        return found
    forms = [json.dumps(needed, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
    return max(text.count(form) for form in forms)


def not_rendered(message: Message) -> DataError:
    """The error for a message that the template leaves out."""
    shown = message.get("content") or json.dumps(message.get("tool_calls"))
    return DataError(
        "the chat template renders every message of a prompt",
        received=f"a message of role {message['role']!r} whose text is not in the rendering: "
        f"{shown[:200]!r}",
        remedy="rename the role to one that the template knows, or set chat_template to the "
        "template of the sampler",
    )


def unknown_field(message: Message, key: str) -> DataError:
    """The error for a field of a message that the template does not read."""
    return DataError(
        "the chat template renders every field of a message",
        received=f"{key} in a message of role {message['role']!r}, a field that it does not read",
        remedy="set chat_template to the template of the sampler, remove the field, or log token "
        "ids",
    )
