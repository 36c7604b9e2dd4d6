"""Splits the rendering of a response into the text that the policy emits and the text that it is
given in between: results of tools, and the headers of turns.

For a response of one message, the emitted text begins behind the generation prompt and ends with
the first mark that ends the turn. A response of several messages alternates: each assistant message
begins where the rendering of all messages before it, with the generation prompt, ends. Where a
template renders earlier turns differently once later ones follow, its {% generation %} blocks say
what the policy emits, if it has them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gvpo_offline.chat.parts import Found, align, not_found, parts_of, search, without_parts
from gvpo_offline.chat.reasoning import as_logged, split_reasoning
from gvpo_offline.chat.template import PROBE, Arguments, ChatTemplate, Frame
from gvpo_offline.errors import DataError
from gvpo_offline.messages import CONTINUE, Message

__all__ = ["Piece", "Turns", "message_pieces", "text_pieces"]

# The last tag of a generation prompt (<think>, [THINK]), and white space behind it.
_LAST_TAG = re.compile(r"(<[^<>/\s]+>|\[[A-Z_]+\])\s*$")


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
    if frame.like is not None:
        return text_pieces(template, frame.like, [PROBE], arguments, text, end=end)
    text, reopened = _without_repeated_tag(template, frame, text)
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


def _without_repeated_tag(template: ChatTemplate, frame: Frame, text: str) -> tuple[str, bool]:
    """The text without the tag that the generation prompt ends with, if it begins with it.

    A tag at the end of what a person wrote, or of a text to be continued, is no such tag.
    """
    tag = _LAST_TAG.search(frame.prompt)
    if tag is None or not text.lstrip().startswith(tag.group(1)):
        return text, False
    opened = tag.group(1) in template.source and not frame.prefill
    if not opened and frame.prefill.strip() != tag.group(1):
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
        template.check_written(message)
    if frame.like is not None:
        frame, prompt = frame.like, [PROBE]
    response, mark = _without_marks(response, (frame.tail, *template.ends))
    before = list(prompt)
    if frame.prefill:
        before = before[:-1]
        first = {**response[0], "content": frame.prefill + (response[0]["content"] or "")}
        response = [first, *response[1:]]
    response, contents = split_reasoning(template, response)
    full = template.render([*before, *response], arguments, generation=False)
    own = [i for i, message in enumerate(response) if message["role"] == "assistant"]
    starts = list(_starts(template, frame, before, arguments, response, own))
    broken = next((i for i, s in zip(own, starts, strict=True) if not full.startswith(s)), None)
    if broken is not None and broken > own[0] and full.startswith(frame.prompt):
        marked = template.generated([*before, *response], arguments)
        if len(marked) >= len(own):
            spans = marked[-len(own) :]
            for part in parts_of(response, frame.prefill):
                search(full, *spans[own.index(part.message)], part)
            return _marked_pieces(template, full, frame, spans, mark or end)
    if broken is not None:
        raise DataError(
            "the rendering of a response begins with the rendering of the turns before it",
            received=f"a template that renders them differently before message {broken} of "
            f"{len(response)} (it drops the reasoning of earlier turns, or opens a reasoning that "
            "the message does not have)",
            remedy="log the token ids and the loss mask, split the conversation into one row per "
            "turn, or set chat_template to one whose turns do not change",
        )
    turns = _Assembly(template, frame, before, arguments, response, full, contents)
    for number, (index, start) in enumerate(zip(own, map(len, starts), strict=True)):
        if number < len(own) - 1:
            turns.add(index, start, len(starts[number + 1]))
        else:
            turns.add_last(index, start, mark, end)
    template.check_rendered(
        [m for m in response if m["role"] != "assistant"], full[len(frame.prompt) :], {}
    )
    return Turns(tuple(turns.pieces), turns.as_rendered)


def _without_marks(
    response: Sequence[Message], marks: Sequence[str]
) -> tuple[list[Message], str | None]:
    """The messages without the end marks that the log holds behind their content, and the last's.

    The template writes the mark of each turn itself.
    """
    found: list[Message] = []
    mark = None
    for message in response:
        mark = None
        if message["role"] == "assistant" and message["content"]:
            body, mark = _split_mark(message["content"], marks)
            message = {**message, "content": body}
        found.append(message)
    return found, mark


def _marked_pieces(
    template: ChatTemplate,
    full: str,
    frame: Frame,
    spans: Sequence[tuple[int, int]],
    end: str | None,
) -> Turns:
    """The pieces by the template's own {% generation %} blocks, one for each assistant message."""
    pieces: list[Piece] = []
    position = len(frame.prompt)
    for number, (first, last) in enumerate(spans):
        if number:
            pieces.append(Piece(full[position:first], written=False))
            position = first
        closed = template.closing_mark(full[position:last])
        if closed < 0:
            closed = template.end_of_turn(full, last, None, frame.mark) - position
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
    """Cuts the rendering of a response into pieces, turn by turn."""

    def __init__(
        self,
        template: ChatTemplate,
        frame: Frame,
        before: Sequence[Message],
        arguments: Arguments,
        response: Sequence[Message],
        full: str,
        contents: Mapping[int, str],
    ) -> None:
        self._template, self._frame, self._full = template, frame, full
        self._contents = contents
        self._before, self._arguments, self._response = before, arguments, response
        self._parts = parts_of(response, frame.prefill)
        self._aligned = self._align()
        self._position = len(frame.prompt)
        self.pieces: list[Piece] = []
        self.as_rendered = True

    def _align(self) -> list[Found] | None:
        words = without_parts(self._response, self._parts)
        try:
            text = self._template.render([*self._before, *words], self._arguments, generation=False)
        except DataError:  # a template that checks a text (the name of a tool)
            return None
        return align(self._full, text, self._parts)

    def add(self, index: int, start: int, following: int) -> None:
        """Append the text between the turns, and the turn of an assistant message, closed.

        Args:
            index: of the message.
            start: where the policy's text begins.
            following: where its text of the next turn begins.
        """
        full = self._full
        alone = self._template.render(
            [*self._before, *self._response[: index + 1]], self._arguments, generation=False
        )
        bare = alone.rstrip()
        bound = len(bare) if full.startswith(bare) else None
        written, position = self._turn(index, start, following if bound is None else bound)
        closed = self._template.end_of_turn(full, position, bound, self._frame.mark)
        if closed < 0:
            raise DataError(
                "the chat template ends each turn of the assistant with a special token",
                received=f"none behind {full[max(0, position - 60) : position]!r}",
                remedy="log the token ids and the loss mask",
            )
        self.pieces.append(Piece(written + full[position:closed], written=True))
        self._position = closed

    def add_last(self, index: int, start: int, mark: str | None, end: str | None) -> None:
        """Append the last turn; its end is the template's, unless the log holds another mark."""
        full = self._full
        written, position = self._turn(index, start, len(full))
        message = self._response[index]
        calls = bool(message.get("tool_calls"))
        if end is None and mark is None:
            self.pieces.append(Piece(written, written=True))
            return
        closed = self._template.end_of_turn(full, position, len(full), self._frame.mark)
        if mark is not None and not calls:
            close = mark
        elif closed >= 0:
            close = full[position:closed]
        else:  # a template that marks the end of a turn by the next one
            turns = [*self._before, *self._response]
            found = self._template.end_before_result(turns, self._arguments, full) if calls else ""
            behind = "" if message["content"] and not calls else full[position:].rstrip()
            close = behind + (found or end or "")
        self.pieces.append(Piece(written + close, written=True))

    def _turn(self, index: int, start: int, bound: int) -> tuple[str, int]:
        """What the policy wrote of a turn up to the end of its last part, and where that is."""
        full = self._full
        if self.pieces:
            self.pieces.append(Piece(full[self._position : start], written=False))
        found: list[Found] = []
        for part in self._parts:
            if part.message != index:
                continue
            if self._aligned is None:
                found.append(search(full, start, max(start, bound), part))
                continue
            places = [f for f in self._aligned if f.part is part and start <= f.start < bound]
            if not places:
                raise not_found(part)
            found += places
        if index in self._contents:
            return self._with_reasoning(index, start, found)
        written, position = "", start
        for place in sorted(found, key=lambda f: f.start):
            rendered = full[place.start : place.end]
            if place.part.field == "content" and rendered != place.part.text:
                # The template trims it, or writes other white space.
                self.as_rendered, rendered = False, place.part.text
            if place.start >= position:  # a search may find parts within each other
                written += full[position : place.start] + rendered
                position = place.end
            else:
                written += full[position : place.end]
                position = max(position, place.end)
        return written, position

    def _with_reasoning(self, index: int, start: int, found: Sequence[Found]) -> tuple[str, int]:
        """As `_turn`, for a content that holds its reasoning."""
        full, content = self._full, self._contents[index]
        own = [f for f in found if not f.part.field.startswith("tool call")]
        end = max(f.end for f in own)
        last = max(own, key=lambda f: f.end).part
        if last.field != "content":
            closing = re.compile(r"\s*</think>").match(full, end)
            end = closing.end() if closing else end
        text = as_logged(full[:start], full[start:end], content)
        if text is None:
            raise not_found(last)
        if last.field != "content":
            # White space behind the reasoning is the template's.
            text = text.rstrip()
        self.as_rendered = self.as_rendered and text == full[start:end]
        position = max(f.end for f in found)
        return text + full[end : max(end, position)], max(end, position)
