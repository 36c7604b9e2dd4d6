"""JSON documents as inputs: a list of objects, objects one after the other, or rows under a field.

Rows are numbered from 0 in the order of the file. The file is read as a stream.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gvpo_offline.errors import DataError
from gvpo_offline.importing.sources.compressed import (
    FACTOR,
    damage_named,
    decompressed,
    is_compressed,
)
from gvpo_offline.importing.sources.files import Advance, Source
from gvpo_offline.importing.sources.json_text import BadJsonError, JsonText, Step, is_cut_short
from gvpo_offline.importing.sources.rows import Row
from gvpo_offline.json_text import kind_of
from gvpo_offline.limits import Limits
from gvpo_offline.paths import has

__all__ = ["JsonDocuments", "holds_lines"]

_HEAD = 1 << 16
_REPORT_ROWS = 64


class JsonDocuments(Source):
    """A JSON file that is not one object per line.

    Args:
        label: as in `Source`.
        name: as in `Source`.
        path: the file, optionally compressed.
        rows_at: steps of the path of the rows; none: the file is one or several lists of rows, or
            one or several rows.
        limits: bounds on what the file may hold. Default: the defaults.
    """

    def __init__(
        self,
        label: str,
        name: str,
        path: Path,
        rows_at: Sequence[Step] = (),
        limits: Limits | None = None,
    ) -> None:
        super().__init__(label, name, [path])
        self.limits = limits or self.limits
        self.text_bytes = self.size * (FACTOR if is_compressed(path) else 1)
        self._rows_at = rows_at

    def rows(self, columns: Sequence[str] | None, advance: Advance) -> Iterator[Row]:
        """See `Source.rows`."""
        suffix, row, reported = self.files[0].suffix, [0], 0
        with self.files[0].open("rb") as raw:
            stream = decompressed(raw, suffix, self.limits, self.label)
            text = JsonText(stream, self.limits)
            values = text.rows(self._rows_at)
            for number in itertools.count():
                row[0] = number
                try:
                    with damage_named(self.label, suffix, row):
                        value = next(values, text)
                except BadJsonError as error:
                    raise self._invalid(f"{error} (line {text.line})", number) from error
                except DataError as error:  # of a limit
                    raise error.replaced(file=self.label, row=number) from error
                if value is text:
                    break
                if not isinstance(value, dict):
                    received = f"{kind_of(value)}: {str(value)[:80]!r}"
                    self.refuse(self._invalid(received, number))
                else:
                    yield number, value
                if number % _REPORT_ROWS == 0:
                    position = raw.tell()
                    advance(position - reported)
                    reported = position
            advance(self.size - reported)

    def _invalid(self, received: str, row: int) -> DataError:
        return DataError(
            "a JSON file holds objects, in a list or one after the other, in UTF-8",
            received=received,
            remedy="correct the file, or rows_at"
            if self._rows_at
            else "correct the file; if its rows are below a field, set rows_at to that field",
            file=self.label,
            row=row,
        )


def holds_lines(path: Path) -> bool:
    """Whether a JSON file holds one object per line, by the first characters of its content.

    A file that cannot be read or parsed counts as lines, which are then refused one by one.
    """
    with path.open("rb") as raw:
        try:
            head = decompressed(raw, path.suffix).read(_HEAD)
        except Exception:  # damaged: reading the rows raises the error
            return True
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    if not text.startswith(("{", "[")):
        return True
    first, _, rest = text.partition("\n")
    if text.startswith("["):
        return bool(rest.strip()) and _is_json(first)
    if not rest and len(head) == _HEAD:
        return True  # the first line is longer than the head
    try:
        json.loads(first)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return not first[error.pos :].lstrip().startswith("{")
        # A line break is not allowed inside a text, so a text that a line cuts off is an error.
        several_lines = is_cut_short(error) and not error.msg.startswith("Unterminated string")
        return not (several_lines and rest.strip())
    except (ValueError, RecursionError):
        return True
    return True


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def list_fields(record: Any, wanted: str) -> list[str]:
    """Paths of the fields that hold lists of objects, which may be the rows of the file.

    A field of an object in the object counts only if its rows have the column `wanted`.
    """
    found = []
    for name, value in record.items():
        inner = value if isinstance(value, dict) else {}
        found += [name] * _is_table(value)
        found += [
            f"{name}.{field}"
            for field, rows in inner.items()
            if _is_table(rows) and has(rows[0], wanted)
        ]
    return found


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)
