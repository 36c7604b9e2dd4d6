"""Reasoning within the content of a message, <think>…</think>, where templates read it apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gvpo_offline.chat.checks import bare
from gvpo_offline.messages import REASONING, Message

if TYPE_CHECKING:
    from gvpo_offline.chat.template import ChatTemplate

__all__ = ["as_logged", "split_reasoning"]

_OPEN, _CLOSE = "<think>", "</think>"
_OPENING = re.compile(rf"\s*{_OPEN}\s*")
_WITH_REASONING = re.compile(rf"\s*(?:{_OPEN})?(.*?){_CLOSE}(.*)", re.DOTALL)


def split_reasoning(
    template: ChatTemplate, messages: Sequence[Message]
) -> tuple[list[Message], dict[int, str]]:
    """The assistant's messages with reasoning apart from content, as servers' parsers return them.

    Some templates split a content themselves, others write it behind an empty reasoning.

    Returns:
        The messages, and the content as logged of each that was split, by index.
    """
    logged: dict[int, str] = {}
    if not template.reads_reasoning or _OPEN not in template.source:
        return list(messages), logged
    found = list(messages)
    for i, message in enumerate(messages):
        match = _WITH_REASONING.fullmatch(message.get("content") or "")
        if message["role"] != "assistant" or REASONING in message or match is None:
            continue
        if match[1].strip():
            found[i] = {**message, REASONING: match[1].strip(), "content": match[2].strip()}
            logged[i] = message["content"]
    return found, logged


def as_logged(before: str, rendered: str, content: str) -> str | None:
    """The logged content in place of the rendering of its reasoning and text.

    Args:
        before: the rendering up to the policy's text.
        rendered: the rendering of reasoning and text.
        content: both, as logged.

    Returns:
        The content, without a tag that `before` ends with; None if the rendering differs in more
        than white space.
    """
    text = content
    if before.rstrip().endswith(_OPEN) and text.lstrip().startswith(_OPEN):
        text = text.lstrip().removeprefix(_OPEN)
        opened = before[len(before.rstrip()) :]
        text = text.removeprefix(opened) if opened else text
    if bare(text) == bare(rendered):
        return text
    # The log leaves out a tag that the policy wrote: the template's, and the text as logged.
    opening = _OPENING.match(rendered)
    if opening is None or bare(_OPEN + text) != bare(rendered):
        return None
    return opening.group() + text.lstrip()
