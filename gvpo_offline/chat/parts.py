"""Finds the texts of the assistant's messages in a rendering of them.

A second rendering, with a unique word in the place of each text, shows what the template writes
between the texts. A search for the text itself would also find a short text by accident, in the
header of a turn for example.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gvpo_offline.errors import DataError
from gvpo_offline.messages import REASONING, Message

__all__ = ["Found", "Part", "align", "parts_of", "search", "without_parts"]

_WORD = re.compile(r"(xQz\d+Part7Kx)")


@dataclass(frozen=True, slots=True)
class Part:
    """A text of a message that its rendering holds: of its content, reasoning or tool calls.

    Attributes:
        message: index of the message.
        field: the field that holds it, for errors: `content`, `reasoning_content`, `tool call` …
        text: the text as logged.
        word: the word that stands for it in the second rendering.
        prefill: text of the content that the prompt holds.
    """

    message: int
    field: str
    text: str
    word: str
    prefill: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """A part, and its characters [start, end) in the rendering."""

    part: Part
    start: int
    end: int


def parts_of(messages: Sequence[Message], prefill: str) -> list[Part]:
    """The parts of the assistant's messages; the first message begins with `prefill`."""
    found: list[Part] = []

    def add(index: int, field: str, text: str, prefill: str = "") -> None:
        if text.strip():
            found.append(Part(index, field, text, f"xQz{len(found)}Part7Kx", prefill))

    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        add(i, REASONING, message.get(REASONING, ""))
        own = prefill if i == 0 else ""
        add(i, "content", (message["content"] or "").removeprefix(own), own)
        for call in message.get("tool_calls") or ():
            function = call["function"]
            add(i, "tool call", function["name"])
            for leaf in _leaves(function.get("arguments")):
                add(i, f"tool call {function['name']} with", leaf)
    return found


def without_parts(messages: Sequence[Message], parts: Sequence[Part]) -> list[Message]:
    """The messages with the word of each part in its place."""
    words = {i: iter([p for p in parts if p.message == i]) for i in range(len(messages))}
    return [
        _replaced(message, words[i]) if message["role"] == "assistant" else message
        for i, message in enumerate(messages)
    ]


def _replaced(message: Message, parts: Iterator[Part]) -> Message:
    kept = dict(message)
    if message.get(REASONING, "").strip():
        kept[REASONING] = next(parts).word
    remaining = list(parts)
    if remaining and remaining[0].field == "content":
        part = remaining.pop(0)
        kept["content"] = part.prefill + part.word
    words = iter(remaining)
    if message.get("tool_calls"):
        calls = []
        for call in message["tool_calls"]:
            function = dict(call["function"])
            if function["name"].strip():
                function["name"] = next(words).word
            if "arguments" in function:
                function["arguments"] = _mapped(function["arguments"], lambda: next(words).word)
            calls.append({**call, "function": function})
        kept["tool_calls"] = calls
    return kept


def _leaves(value: Any) -> Iterator[str]:
    """The texts within the arguments of a tool call, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)


def _mapped(value: Any, word: Callable[[], str]) -> Any:
    if isinstance(value, str):
        return word() if value.strip() else value
    if isinstance(value, Mapping):
        return {key: _mapped(part, word) for key, part in value.items()}
    if isinstance(value, list):
        return [_mapped(part, word) for part in value]
    return value


def align(full: str, words: str, parts: Sequence[Part]) -> list[Found] | None:
    """Each place of each part in `full`; None if the two renderings differ in more than the parts.

    Args:
        full: the rendering.
        words: the rendering with words in the place of the parts.
        parts: the parts.
    """
    by_word = {part.word: part for part in parts}
    pieces = _WORD.split(words)
    if not full.startswith(pieces[0]):
        return None
    position = len(pieces[0])
    found: list[Found] = []
    for word, behind in zip(pieces[1::2], pieces[2::2], strict=True):
        part = by_word.get(word)
        if part is None:
            return None
        last = len(found) == len(pieces) // 2 - 1
        end = _end_of(full, position, part, behind, last=last)
        if end is None:
            return None
        found.append(Found(part, position, end))
        position = end + len(behind)
    return found if position == len(full) else None


def _end_of(full: str, start: int, part: Part, behind: str, *, last: bool) -> int | None:
    """Where a part that starts at `start` ends: its text as logged, trimmed or escaped."""
    for form in _forms(part.text):
        end = start + len(form)
        fits = full[end:] == behind if last else full.startswith(behind, end)
        if full.startswith(form, start) and fits:
            return end
    # Templates write arguments with escapes of their own (JSON, Python, XML).
    if part.field.startswith("tool call") and behind:
        end = len(full) - len(behind) if last else full.find(behind, start)
        if end > start and full.startswith(behind, end):
            return end
    return None


def _forms(text: str) -> list[str]:
    forms = [text, text.strip(), text.strip("\n"), text.rstrip(), text.lstrip(), text.lstrip("\n")]
    forms += [json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
    forms += [json.dumps(text.strip(), ensure_ascii=False)[1:-1]]
    return list(dict.fromkeys(forms))


def search(full: str, start: int, end: int, part: Part) -> Found:
    """A part's place in the rendering of its message, full[start:end], by its text.

    Raises:
        DataError: the rendering does not hold it.
    """
    # The content of a message without calls comes last.
    find = full.rfind if part.field == "content" else full.find
    for form in _forms(part.text):
        found = find(form, start, end)
        if found >= 0:
            return Found(part, found, found + len(form))
    if part.field == "content":
        # Templates that split reasoning from the content write other white space between them.
        words = re.findall(r"<[^<>\s]+>|[^<\s]+|<", part.text)
        match = re.compile(r"\s*".join(map(re.escape, words))).search(full, start, end)
        if match:
            return Found(part, *match.span())
    raise not_found(part)


def not_found(part: Part) -> DataError:
    """The error for a part that a rendering does not hold."""
    return DataError(
        "the chat template renders every part of a response's message",
        received=f"{part.field} {part.text.strip()[:120]!r}, which is not in the rendering",
        remedy="set chat_template to the template of the sampler, or log token ids",
    )
