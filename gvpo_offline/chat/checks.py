"""Checks that the rendering of messages holds all that they say."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gvpo_offline.errors import DataError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.messages import Message

__all__ = ["WholeRenderings", "bare", "check_texts", "not_rendered", "unknown_field"]


# Number of sequences of roles for which it is remembered what the template renders.
_SHAPES = 4096


class WholeRenderings:
    """Checks that a template renders the content of each message of a prompt, and its tools.

    A rendering with a unique word in the place of each content shows it, also where another part
    of the prompt holds the same text. It depends on the roles and fields alone, so it is done once
    for each sequence of them.

    Args:
        render: `ChatTemplate.render`.
    """

    def __init__(self, render: Callable[..., str]) -> None:
        self._render = render
        self._dropped: dict[str, tuple[frozenset[int], bool]] = {}

    def check(self, messages: Sequence[Message], arguments: Mapping[str, Any]) -> None:
        """Check a prompt that the template takes.

        Raises:
            DataError: the template does not render a message or the tools.
        """
        shape = [
            (m["role"], sorted(k for k in m if m[k]), len(m.get("tool_calls") or ()))
            for m in messages
        ]
        key = sha256_json([shape, dict(arguments)])
        if key not in self._dropped:
            if len(self._dropped) >= _SHAPES:
                self._dropped.clear()
            self._dropped[key] = self._find(messages, arguments)
        dropped, without_tools = self._dropped[key]
        for i in sorted(dropped):
            if messages[i]["content"].strip():
                raise not_rendered(messages[i])
        if without_tools:
            raise _tool_not_rendered(_tool_name(arguments["tools"][0]))

    def _find(
        self, messages: Sequence[Message], arguments: Mapping[str, Any]
    ) -> tuple[frozenset[int], bool]:
        """The messages that the template drops, and whether it drops the tools."""
        words = {i: f"xQz{i}Word7Kx" for i, m in enumerate(messages) if m.get("content")}
        turns = [{**m, "content": words[i]} if i in words else m for i, m in enumerate(messages)]
        try:
            text = self._render(turns, arguments, generation=True)
        except DataError:  # a template that checks a content
            return frozenset(), False
        dropped = frozenset(i for i, word in words.items() if word not in text)
        if not arguments.get("tools"):
            return dropped, False
        others = {name: value for name, value in arguments.items() if name != "tools"}
        try:
            bare_text = self._render(turns, others, generation=True)
        except DataError:  # a template that needs the tools that are called
            return dropped, False
        return dropped, bare_text == text


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
        name = _tool_name(tool)
        if name is None or name not in text:
            raise _tool_not_rendered(name)


def _tool_name(tool: Any) -> str | None:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _tool_not_rendered(name: str | None) -> DataError:
    return DataError(
        "the chat template renders the prompt's tools",
        received=f"the tool {name!r}, which the rendering does not hold",
        remedy="set chat_template to the template of the sampler, or log the prompt's token ids",
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
