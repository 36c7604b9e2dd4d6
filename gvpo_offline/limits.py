"""Bounds on what is read from outside: logs, archives, answers of servers, JSON and YAML.

Without a bound, a few kilobytes of a compressed file, or one line without an end, fill the memory.
The defaults are far above what logs of agents hold. Every error names the limit, the value that was
received and the setting that raises it.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import IO, Any, ClassVar

from gvpo_offline.errors import ConfigError, DataError

__all__ = ["BoundedReader", "Limits", "bounded_lines", "nesting_of", "parse_json"]

MOST_NESTING = 300
"""Most levels that `Limits.nesting` may allow: Python functions that walk a value need a few frames
of the interpreter's 1,000 for each level."""
ANSWER_NESTING = 100
"""Most levels of nesting of a server's answer."""
ANSWER_BYTES = 256 * 2**20
"""Default of `max_answer_bytes`."""

_FREE_BYTES = 2**30  # that a compressed file may always give
_KEPT = b'[]{}"'
_DROPPED = bytes(set(range(256)) - set(_KEPT))
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_STRING = re.compile(rb'"[^"]*"')


@dataclass(kw_only=True)
class Limits:
    """Bounds on what an input may hold. A file that exceeds one is refused, and nothing is read
    past it. None of them changes a dataset."""

    row_bytes: int = 512 * 2**20
    """Most bytes of one row, uncompressed: a line, a value of a JSON document, a record of CSV, a
    sample of a `.eval` log."""
    expansion: int = 1000
    """Most bytes that a compressed file may give for each of its own, after the first GiB."""
    nesting: int = 100
    """Most levels of lists and records inside each other in one row, up to 300."""
    columns: int = 10_000
    """Most columns of a CSV or Parquet file."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value <= 0:
                raise ConfigError(f"limits.{field.name} is positive", received=value)
        if self.nesting > MOST_NESTING:
            raise ConfigError(f"limits.nesting is at most {MOST_NESTING}", received=self.nesting)

    def check_columns(self, count: int, file: Any) -> None:
        """Raise DataError if a file has too many columns."""
        if count > self.columns:
            raise DataError(
                f"a file has at most {self.columns:,} columns",
                received=f"{count:,}",
                remedy="leave columns out of the file, or raise limits.columns",
                file=file,
            )

    def check_expansion(self, expanded: int, compressed: int, file: Any) -> None:
        """Raise DataError if a compressed file gives too many bytes.

        Args:
            expanded: bytes so far.
            compressed: size of the file in bytes.
            file: the file, for the error.
        """
        if expanded > _FREE_BYTES and expanded > self.expansion * compressed:
            raise DataError(
                f"a compressed file gives at most {self.expansion:,} bytes for each of its own, "
                "after the first GiB",
                received=f"more than {expanded:,} bytes from {compressed:,}",
                remedy="decompress the file if it is what you expect, or raise limits.expansion",
                file=file,
            )


def too_long(limit: int, *, file: Any = None, row: int | None = None) -> DataError:
    """The error for a row of more than `limit` bytes."""
    return DataError(
        f"a row has at most {limit:,} bytes, uncompressed",
        received="more, without an end of the row",
        remedy="correct the file, or raise limits.row_bytes",
        file=file,
        row=row,
    )


def bounded_lines(stream: IO[bytes], limit: int, file: Any = None) -> Iterator[bytes]:
    """The lines of a stream, with their ends; memory holds one line.

    Args:
        stream: the bytes.
        limit: most bytes of a line, its end included.
        file: the file, for the error.

    Raises:
        DataError: a line is longer; the rest of it is not read.
    """
    number = 0
    while line := stream.readline(limit + 1):
        if len(line) > limit:
            raise too_long(limit, file=file, row=number)
        yield line
        number += 1


class BoundedReader(io.RawIOBase):
    """The content of a compressed file, bounded by its size.

    Args:
        content: the decompressed bytes.
        size: bytes of the compressed file.
        limits: `expansion` bounds the ratio.
        file: the file, for the error.
    """

    def __init__(self, content: IO[bytes], size: int, limits: Limits, file: Any) -> None:
        super().__init__()
        self._content, self._size, self._limits, self._file = content, size, limits, file
        self._read = 0

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read at most as many bytes as the buffer has.

        Raises:
            DataError: the file gives too many bytes.
        """
        data = self._content.read(len(buffer))
        buffer[: len(data)] = data
        self._read += len(data)
        self._limits.check_expansion(self._read, self._size, self._file)
        return len(data)


def parse_json(text: str | bytes, *, nesting: int, setting: str | None = "limits.nesting") -> Any:
    """The value of a JSON text.

    Args:
        text: in UTF-8, if it is bytes.
        nesting: most levels of lists and records inside each other.
        setting: the setting that raises that limit, for the error; None: there is none.

    Raises:
        DataError: it is nested more deeply, or has a number of more digits than Python converts.
        ValueError: it is not JSON.
    """
    _check_nesting(text, nesting, setting)
    try:
        return json.loads(text)
    except RecursionError as error:  # unbalanced, so that the levels could not be counted
        raise too_deep(nesting, setting) from error
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise too_many_digits() from error


def too_many_digits() -> DataError:
    """The error for an integer of more digits than Python converts to a number."""
    return DataError(
        f"an integer has at most {sys.get_int_max_str_digits():,} digits",
        received="more",
        remedy="write it as text, or raise PYTHONINTMAXSTRDIGITS in the environment",
    )


def too_deep(nesting: int, setting: str | None = "limits.nesting") -> DataError:
    """The error for a value that is nested too deeply."""
    raised = f", or raise {setting} (at most {MOST_NESTING})" if setting else ""
    return DataError(
        f"lists and records are nested at most {nesting:,} levels deep",
        received="a value with more levels",
        remedy=f"correct the value{raised}",
    )


def _check_nesting(text: str | bytes, nesting: int, setting: str | None) -> None:
    if nesting_of(text, nesting) > nesting:
        raise too_deep(nesting, setting)


def nesting_of(text: str | bytes, most: int) -> int:
    """The levels of nesting of a JSON text, as far as they are counted.

    Python's parser says nothing of depth below the one at which it fails, and a walk over the
    parsed value visits every token id. Here the text is reduced to its brackets by functions of C.

    Args:
        text: JSON; of a text that is none, the result is some number.
        most: how far to count.

    Returns:
        The number of levels, at most `most` + 1; a text with at most `most` brackets gives that
        number of brackets, which is no less.
    """
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    opened = sum(data.count(bracket) for bracket in (b"[", b"{"))
    if opened <= most:
        return opened
    data = data.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _DROPPED)
    # Of valid JSON both kinds of brackets match, so that one kind is enough to count.
    data = _STRING.sub(b"", data).translate(_ONE_KIND)
    levels = 0
    while data and levels <= most:
        smaller = data.replace(b"[]", b"")  # the innermost level
        if len(smaller) == len(data):  # ]]][[[: no JSON
            return min(levels + data.count(b"["), most + 1)
        data = smaller
        levels += 1
    return levels
