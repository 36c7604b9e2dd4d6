"""Splits the rendering of a response into the text that the policy emits and the text that it is
given in between: results of tools, and the headers of turns.

For a response of one message, the emitted text begins behind the generation prompt and ends with
the first mark that ends the turn. A response of several messages alternates: each assistant message
begins where the rendering of all messages before it, with the generation prompt, ends. Where a
template renders earlier turns differently once later ones follow, its {% generation %} blocks say
what the policy emits, if it has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gvpo_offline.chat.template import CONTINUE, Arguments, ChatTemplate, Frame
from gvpo_offline.errors import DataError
from gvpo_offline.messages import REASONING, Message

__all__ = ["Piece", "Turns", "message_pieces", "text_pieces"]

# The last tag of a generation prompt (<think>, [THINK]), and white space behind it.
_LAST_TAG = re.compile(r"(<[^<>/\s]+>|\[[A-Z_]+\])\s*$")

_OPENED, _CLOSED = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a response: its text, and whether the policy emits it."""

    text: str
    written: bool


@dataclass(frozen=True, slots=True)
class Turns:
    """A response as pieces of text.

    Attributes:
        pieces: the parts, in order; the first and the last are emitted by the policy.
        as_rendered: whether the template renders the logged text unchanged. If it trims, drops or
            rewrites it, the pieces hold the logged text all the same.
        reopened: whether the text began with a tag (<think>) that the generation prompt holds too;
            the pieces do not repeat it.
    """

    pieces: tuple[Piece, ...]
    as_rendered: bool = True
    reopened: bool = False


def text_pieces(
    template: ChatTemplate,
    frame: Frame,
    prompt: Sequence[Message],
    arguments: Arguments,
    text: str,
    *,
    end: str | None,
) -> Turns:
    """The pieces of a response that is one text.

    Args:
        template: the chat template.
        frame: of the prompt.
        prompt: the prompt's messages.
        arguments: the prompt's arguments of the template.
        text: the response, not empty.
        end: the end of the turn, as `frame.tail`; None where the response was cut.

    Raises:
        DataError: the template refuses the messages.
    """
    text, reopened = _without_repeated_tag(frame.prompt, text)
    body, mark = _split_mark(text, (frame.tail, *template.ends))
    answer: Message = {"role": "assistant", "content": frame.prefill + body}
    turns = [*prompt[:-1], {**prompt[-1], **answer}] if frame.prefill else [*prompt, answer]
    full = template.render(turns, arguments, generation=False)
    head = frame.head or ""
    heads = [head, ""] if head else [""]
    exact = next((h for h in heads if full == frame.prompt + h + body + frame.behind), None)
    if exact is None:
        whole = frame.head is not None and full.startswith(frame.prompt + head)
        head = head if whole else ""
    else:
        head = exact
    close = mark if mark is not None else end or ""
    return Turns((Piece(head + body + close, written=True),), exact is not None, reopened)


def _without_repeated_tag(prompt: str, text: str) -> tuple[str, bool]:
    """The text without the tag that the generation prompt ends with, if it begins with it."""
    tag = _LAST_TAG.search(prompt)
    if tag is None or not text.lstrip().startswith(tag.group(1)):
        return text, False
    if text.startswith(tag.group()):
        return text[len(tag.group()) :], True
    return text.lstrip()[len(tag.group(1)) :], True


def _split_mark(text: str, marks: Sequence[str]) -> tuple[str, str | None]:
    """Text and the end mark that the log holds behind it, None if it holds none."""
    bare = text.rstrip()
    for mark in sorted(filter(None, marks), key=len, reverse=True):
        if bare.endswith(mark):
            return bare[: len(bare) - len(mark)], mark
    return text, None


def message_pieces(
    template: ChatTemplate,
    frame: Frame,
    prompt: Sequence[Message],
    arguments: Arguments,
    response: Sequence[Message],
    *,
    end: str | None,
) -> Turns:
    """The pieces of a response of one or more messages, the first and last by the assistant.

    Args:
        template, frame, prompt, arguments, end: as for `text_pieces`.
        response: normalised messages.

    Raises:
        DataError: the template does not render a part of a message, or renders earlier turns
            differently once later ones follow.
    """
    for message in response:
        template.check_fields(message)
    before = list(prompt)
    if frame.prefill:
        before = before[:-1]
        first = {**response[0], "content": frame.prefill + (response[0]["content"] or "")}
        response = [first, *response[1:]]
    full = template.render([*before, *response], arguments, generation=False)
    own = [i for i, message in enumerate(response) if message["role"] == "assistant"]
    starts = list(_starts(template, frame, before, arguments, response, own))
    broken = next((i for i, s in zip(own, starts, strict=True) if not full.startswith(s)), None)
    if broken is not None and broken > own[0] and full.startswith(frame.prompt):
        marked = template.generated([*before, *response], arguments)
        if len(marked) >= len(own):
            return _marked_pieces(template, full, len(frame.prompt), marked[-len(own) :], end)
    if broken is not None:
        raise DataError(
            "the rendering of a response begins with the rendering of the turns before it",
            received=f"a template that renders them differently before message {broken} of "
            f"{len(response)} (it drops the reasoning of earlier turns, or opens a reasoning that "
            "the message does not have)",
            remedy="log the token ids and the loss mask, split the conversation into one row per "
            "turn, or set chat_template to one whose turns do not change",
        )
    turns = _Assembly(template, full, frame)
    for number, (index, start) in enumerate(zip(own, map(len, starts), strict=True)):
        last = number == len(own) - 1
        turns.add(response[index], start, frame.prefill if number == 0 else "", last, end)
    template.check_rendered(
        [m for m in response if m["role"] != "assistant"], full[len(frame.prompt) :], {}
    )
    return Turns(tuple(turns.pieces), turns.as_rendered)


def _marked_pieces(
    template: ChatTemplate,
    full: str,
    start: int,
    spans: Sequence[tuple[int, int]],
    end: str | None,
) -> Turns:
    """The pieces by the template's own {% generation %} blocks, one for each assistant message."""
    pieces: list[Piece] = []
    position = start
    for number, (first, last) in enumerate(spans):
        if number:
            pieces.append(Piece(full[position:first], written=False))
            position = first
        closed = template.closing_mark(full[position:last])
        if closed < 0:
            closed = template.end_of_turn(full, last) - position
        if number == len(spans) - 1 and end is None:
            closed = len(full[position:last]) if closed > last - position else closed
        pieces.append(Piece(full[position : position + closed], written=True))
        position += closed
    return Turns(tuple(pieces))


def _starts(
    template: ChatTemplate,
    frame: Frame,
    before: Sequence[Message],
    arguments: Arguments,
    response: Sequence[Message],
    own: Sequence[int],
) -> Iterator[str]:
    """The rendering before each assistant message, generation prompt included."""
    yield frame.prompt
    fresh = {**arguments, CONTINUE: False}
    for index in own[1:]:
        yield template.render([*before, *response[:index]], fresh, generation=True)


class _Assembly:
    """Cuts one rendering into pieces, turn by turn."""

    def __init__(self, template: ChatTemplate, full: str, frame: Frame) -> None:
        self._template = template
        self._full = full
        self._position = len(frame.prompt)
        self.pieces: list[Piece] = []
        self.as_rendered = True

    def add(self, message: Message, start: int, prefill: str, last: bool, end: str | None) -> None:
        """Append the text between the turns, and the text of an assistant message."""
        if self.pieces:
            self.pieces.append(Piece(self._full[self._position : start], written=False))
        position, written = start, ""
        for name, text in _needed(message, prefill):
            found, length = self._find(text, position)
            if found < 0 and name == "content":
                text, length = self._reasoning_moved(text, position)
                found = position if length else -1
            if found < 0:
                raise DataError(
                    "the chat template renders every part of a response's message",
                    received=f"{name} {text[:120]!r}, which is not in the rendering",
                    remedy="set chat_template to the template of the sampler, or log token ids",
                )
            rendered = self._full[found : found + length]
            if name == "content" and rendered != text:  # trimmed by the template
                self.as_rendered, rendered = False, text
            written += self._full[position:found] + rendered
            position = found + length
        closed = self._template.end_of_turn(self._full, position)
        if last:
            self.pieces.append(Piece(self._last(written, position, closed, end), written=True))
            return
        if closed < 0:
            raise DataError(
                "the chat template ends each turn of the assistant with a special token",
                received=f"none behind {self._full[max(0, position - 60) : position]!r}",
                remedy="log the token ids and the loss mask",
            )
        self.pieces.append(Piece(written + self._full[position:closed], written=True))
        self._position = closed

    def _reasoning_moved(self, text: str, start: int) -> tuple[str, int]:
        """A text whose reasoning the template takes out, to set it between its own tags.

        Args:
            text: a text with </think>; that of the reasoning's beginning may be missing.
            start: where its rendering begins.

        Returns:
            The text that the policy emits, the logged one behind a tag that it may lack, and the
            length of what the template renders instead: 0 if it drops a part of the text.
        """
        thought, tag, rest = text.partition(_CLOSED)
        if not tag:
            return text, 0
        bare, _ = _without_repeated_tag(self._full[:start], text)
        pieces = (thought.strip().removeprefix(_OPENED).strip(), tag, rest.strip())
        between, position = ["", _OPENED], start
        for piece in filter(None, pieces):
            found = self._full.find(piece, position)
            if found < 0 or self._full[position:found].strip() not in between:
                return text, 0
            if position == start and not text.lstrip().startswith(_OPENED):
                bare = self._full[start:found] + bare
            between, position = [""], found + len(piece)
        blank = text[len(text.rstrip()) :]
        if blank and self._full.startswith(blank, position):
            position += len(blank)
        return bare, position - start

    def _last(self, written: str, position: int, closed: int, end: str | None) -> str:
        if end is None:
            return written
        return written + (self._full[position:closed] if closed >= 0 else end)

    def _find(self, text: str, start: int) -> tuple[int, int]:
        """Where a text, or its stripped or JSON-escaped form, is next in the rendering; (-1, 0) if
        nowhere."""
        forms = [text, text.strip()]
        forms += [json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
        places = [(self._full.find(form, start), form) for form in dict.fromkeys(forms)]
        # The nearest: the result of a tool may repeat what its call holds in another form.
        near = [(place, -len(form)) for place, form in places if place >= 0]
        return (min(near)[0], -min(near)[1]) if near else (-1, 0)


def _needed(message: Message, prefill: str) -> Iterator[tuple[str, str]]:
    """Each text of an assistant message that its rendering holds, with its field, in order."""
    if message.get(REASONING, "").strip():
        yield REASONING, message[REASONING].strip()
    content = (message["content"] or "").removeprefix(prefill)
    if content.strip():
        yield "content", content
    for call in message.get("tool_calls") or ():
        yield "tool call", call["function"]["name"]
        for leaf in _leaves(call["function"].get("arguments")):
            yield f"tool call {call['function']['name']} with", leaf


def _leaves(value: Any) -> Iterator[str]:
    """The texts within the arguments of a tool call, in order."""
    if isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif isinstance(value, dict):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
