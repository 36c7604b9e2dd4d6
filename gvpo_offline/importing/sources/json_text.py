"""Reads the values of a JSON text one by one, without holding the text in memory.

Values are parsed by Python's `json`, as JSON lines are: NaN and infinities are numbers, integers
have any length, and escapes of lone surrogates are kept for the checks of the formats. Incremental
parsers with a C library (yajl) refuse NaN, which pandas and trainers write.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from typing import IO, Any, Final

from gvpo_offline.limits import Limits, nesting_of, too_deep, too_long, too_many_digits

__all__ = ["BadJsonError", "JsonText", "is_cut_short"]

_CHUNK = 1 << 18
# The longest token that can be cut by the end of the buffer, apart from strings and numbers, is an
# escaped surrogate pair.
_LONGEST_TOKEN = 12
_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = "\ufeff"
_EVERY: Final = "*"
Step = str | int


class BadJsonError(ValueError):
    """The text is not JSON, or does not have the values that were asked for."""


def is_cut_short(error: json.JSONDecodeError) -> bool:
    """Whether the text that was parsed may be the beginning of a value."""
    return error.msg.startswith("Unterminated string") or (
        error.pos >= len(error.doc.rstrip()) - _LONGEST_TOKEN
    )


class JsonText:
    """A position in a JSON text.

    Args:
        stream: the text in UTF-8, with or without a byte-order mark.
        limits: bounds on a value.

    Attributes:
        element: number of rows that `rows` has returned.
    """

    def __init__(self, stream: IO[bytes], limits: Limits | None = None) -> None:
        self._stream = stream
        self._limits = limits or Limits()
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._parse = json.JSONDecoder().raw_decode
        self._text = ""
        self._at = 0
        self._lines = 0  # line breaks before the buffer
        self._started = self._ended = False
        self.element = 0

    @property
    def line(self) -> int:
        """The line of the position, from 1."""
        return self._lines + self._text.count("\n", 0, self._at) + 1

    def _refill(self, size: int) -> None:
        self._lines += self._text.count("\n", 0, self._at)
        data = self._stream.read(size)
        self._ended = not data
        try:
            text = self._decode.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise BadJsonError(f"the text is not UTF-8: {error.reason}") from error
        if not self._started:
            text = text.removeprefix(_BOM)
            self._started = bool(text)
        self._text = self._text[self._at :] + text
        self._at = 0

    def peek(self) -> str:
        """The next character that is not space; "" at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None  # the pattern matches the empty text
            self._at = found.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._refill(_CHUNK)

    def take(self, characters: str) -> str:
        """The next character, which is one of `characters`.

        Raises:
            BadJsonError: it is another one.
        """
        found = self.peek()
        if not found or found not in characters:
            wanted = " or ".join(map(repr, characters))
            raise BadJsonError(f"{found!r} instead of {wanted}" if found else "the text ends early")
        self._at += 1
        return found

    def value(self) -> Any:
        """The next value, whole.

        Raises:
            BadJsonError: the text is not JSON.
            DataError: the value exceeds a limit.
        """
        self.peek()
        size = _CHUNK
        while True:
            try:
                value, end = self._parse(self._text, self._at)
            except RecursionError as error:
                raise too_deep(self._limits.nesting) from error
            except json.JSONDecodeError as error:
                if self._ended or not is_cut_short(error):
                    raise BadJsonError(_shown(error, self._at)) from error
            except ValueError as error:
                raise too_many_digits() from error
            else:
                # A number at the end of the buffer may go on.
                if end < len(self._text) or self._ended:
                    self._check_nesting(end)
                    self._at = end
                    return value
            if len(self._text) - self._at > self._limits.row_bytes:
                raise too_long(self._limits.row_bytes)
            # The buffer doubles, so that a long value is parsed a bounded number of times over.
            self._refill(size)
            size = max(size, len(self._text))

    def _check_nesting(self, end: int) -> None:
        most = self._limits.nesting
        brackets = sum(self._text.count(bracket, self._at, end) for bracket in "[{")
        if brackets > most and nesting_of(self._text[self._at : end], most) > most:
            raise too_deep(most)

    def rows(self, path: Sequence[Step]) -> Iterator[Any]:
        """The values at a path of every value of the text, or the elements of those that are lists.

        Args:
            path: names of fields, positions in lists, and "*" for every field or element. Only
                the values on the path are parsed as a stream: each of the others is held in memory
                until it is skipped.

        Raises:
            BadJsonError: the text is not JSON, or has nothing at the path.
            DataError: a value exceeds a limit.
        """
        while self.peek():
            yield from self._below(path, None)
            if self.peek() == ",":
                raise BadJsonError("a comma between values that are not in a list")

    def _below(self, path: Sequence[Step], name: str | None) -> Iterator[Any]:
        opening = self.peek()
        if not path:
            if opening == "[":
                yield from self._elements((), None)
            else:
                value = self.value()
                if name is not None and isinstance(value, dict):
                    value = {_EVERY: name, **value}
                yield self._row(value)
        elif opening == "{" and not isinstance(path[0], int):
            yield from self._fields(path)
        elif opening == "[" and (path[0] == _EVERY or isinstance(path[0], int)):
            yield from self._elements(path[1:], path[0])
        else:
            raise BadJsonError(f"{_kind(opening)} where rows_at names {path[0]!r}")

    def _row(self, value: Any) -> Any:
        self.element += 1
        return value

    def _elements(self, rest: Sequence[Step], wanted: Step | None) -> Iterator[Any]:
        """The elements of a list: all (None, "*"), or the one at a position."""
        self.take("[")
        position = 0
        if self.peek() == "]":
            self.take("]")
        else:
            while True:
                if wanted is None:
                    yield self._row(self.value())
                elif wanted in (_EVERY, position):
                    yield from self._below(rest, None)
                else:
                    self.value()
                position += 1
                if self.take(",]") == "]":
                    break
        if isinstance(wanted, int) and not 0 <= wanted < position:
            raise BadJsonError(f"a list of {position} where rows_at names element {wanted}")

    def _fields(self, path: Sequence[Step]) -> Iterator[Any]:
        self.take("{")
        names: list[str] = []
        more = self.peek() != "}"
        if not more:
            self.take("}")
        while more:
            if self.peek() != '"':
                raise BadJsonError(f"{self.peek()!r} instead of the name of a field")
            name = self.value()
            self.take(":")
            names.append(name)
            # A name that contains dots may be written as it is.
            matched = _matched(path, name)
            if matched:
                yield from self._below(path[matched:], name if path[0] == _EVERY else None)
            else:
                self.value()
            more = self.take(",}") == ","
        if path[0] != _EVERY and not any(_matched(path, name) for name in names):
            shown = ", ".join(names[:20]) or "none"
            raise BadJsonError(f"no field {path[0]!r}, which rows_at names, among {shown}")


def _matched(path: Sequence[Step], name: str) -> int:
    """The number of steps of a path that a field's name takes; 0: it is not on the path."""
    if path[0] == _EVERY:
        return 1
    for n in range(len(path), 0, -1):
        if all(isinstance(step, str) for step in path[:n]) and ".".join(map(str, path[:n])) == name:
            return n
    return 0


def _kind(opening: str) -> str:
    return {"{": "an object", "[": "a list", '"': "a text", "": "nothing"}.get(opening, "a value")


def _shown(error: json.JSONDecodeError, start: int) -> str:
    near = error.doc[max(start, error.pos - 20) : error.pos + 40]
    return f"{error.msg} at {near!r}"


_STEPS = re.compile(r"\[(-?\d+|\*)\]|\.?([^.\[\]]+)")


def path_steps(path: str) -> list[Step]:
    """The steps of a path: `results.results`, `eval[0].samples`, `runs.*.samples`.

    Raises:
        ValueError: it is not a path.
    """
    steps: list[Step] = []
    at = 0
    while at < len(path):
        found = _STEPS.match(path, at)
        if found is None or (at == 0 and path[0] == "."):
            raise ValueError(path)
        index = found.group(1)
        steps.append(found.group(2) or (_EVERY if index == _EVERY else int(index)))
        at = found.end()
    return steps
