"""CSV and TSV files as inputs: a header line, then one row per record; every value is text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from gvpo_offline.cells import Cell
from gvpo_offline.errors import DataError
from gvpo_offline.importing.sources.compressed import (
    FACTOR,
    damage_named,
    decompressed,
    is_compressed,
    without_suffix,
)
from gvpo_offline.importing.sources.files import Advance, Source
from gvpo_offline.importing.sources.rows import Row
from gvpo_offline.limits import Limits, too_long

__all__ = ["DELIMITERS", "CsvRows"]

DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
# Of a whole field: more than any response, and little enough that a quote that is never closed does
# not fill the memory.
_MAX_FIELD_CHARACTERS = 1 << 26
_REPORT_ROWS = 256
_SEPARATORS = ("\t", ";", "|", ",")


class CsvRows(Source):
    """A CSV or TSV file in UTF-8, optionally compressed.

    Rows are numbered from 0 after the header; blank lines are skipped and not counted. Values are
    `Cell`, text which the formats that need numbers read as numbers.

    Raises:
        DataError: the file has no header, a name occurs twice in it, or it seems to have another
            delimiter.
        IntegrityError: the compressed file is damaged.

    Args:
        path: the file.
        limits: bounds on what it may hold. Default: the defaults.
    """

    def __init__(self, path: Path, limits: Limits | None = None) -> None:
        plain = without_suffix(path)
        super().__init__(str(path), plain.stem, [path])
        self.limits = limits or self.limits
        self.text_bytes = self.size * (FACTOR if is_compressed(path) else 1)
        self._delimiter = DELIMITERS[plain.suffix]
        with path.open("rb") as raw, damage_named(self.label, path.suffix, [0]):
            header = self._header(raw)
        self.limits.check_columns(len(header), path)
        if not header or len(set(header)) < len(header):
            raise DataError(
                "a CSV file begins with a header, in which each name occurs once",
                received=", ".join(header) or "no line",
                remedy="give each column a name of its own"
                if header
                else "add a line with the names of the columns",
                file=path,
            )
        if len(header) == 1 and (other := [d for d in _SEPARATORS if d in header[0]]):
            raise DataError(
                f"{self._delimiter!r} stands between the values of a {plain.suffix} file",
                received=f"{header[0]!r}, where {other[0]!r} may be meant",
                remedy="write the file with commas, or with tabs under the suffix .tsv",
                file=path,
            )
        self.columns = header

    def _header(self, raw: IO[bytes]) -> list[str]:
        try:
            return next(self._records(raw, errors="replace"), [])
        except csv.Error as error:
            raise self._invalid(str(error), 0) from error

    def _records(self, raw: IO[bytes], *, errors: str = "strict") -> Iterator[list[str]]:
        most = self.limits.row_bytes
        csv.field_size_limit(max(csv.field_size_limit(), min(_MAX_FIELD_CHARACTERS, most)))
        stream: Any = decompressed(raw, self.files[0].suffix, self.limits, self.label)
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="", errors=errors)
        held = 0  # characters of the record so far; a quoted value may take several lines

        def lines() -> Iterator[str]:
            nonlocal held
            while line := text.readline(most - held + 1):
                held += len(line)
                if held > most:
                    raise too_long(most)
                yield line

        for record in csv.reader(lines(), delimiter=self._delimiter, strict=True):
            held = 0
            if record:
                yield record

    def rows(self, columns: Sequence[str] | None, advance: Advance) -> Iterator[Row]:
        """See `Source.rows`."""
        assert self.columns is not None
        wanted = [(i, n) for i, n in enumerate(self.columns) if columns is None or n in columns]
        row, reported = [0], 0
        with self.files[0].open("rb") as raw:
            records = self._records(raw)
            self._next(records, row)
            while (record := self._next(records, row)) is not None:
                if len(record) != len(self.columns):
                    received = f"{len(record)} values for {len(self.columns)} columns"
                    self.refuse(self._invalid(received, row[0]))
                else:
                    yield row[0], {name: Cell(record[i]) for i, name in wanted}
                row[0] += 1
                if row[0] % _REPORT_ROWS == 0:
                    position = raw.tell()
                    advance(position - reported)
                    reported = position
        advance(self.size - reported)

    def _next(self, records: Iterator[list[str]], row: list[int]) -> list[str] | None:
        try:
            with damage_named(self.label, self.files[0].suffix, row):
                return next(records, None)
        except DataError as error:  # of a limit
            raise error.replaced(file=self.label, row=row[0]) from error
        except UnicodeDecodeError as error:
            remedy = "save the file in UTF-8 (spreadsheets call it CSV UTF-8)"
            raise self._invalid(str(error), row[0], remedy) from error
        except (csv.Error, ValueError) as error:
            raise self._invalid(str(error), row[0]) from error

    def _invalid(
        self,
        received: str,
        row: int,
        remedy: str = "correct the row; quote a value that contains delimiters or line breaks",
    ) -> DataError:
        return DataError(
            "a row of a CSV file in UTF-8 has a value for each column of the header",
            received=received,
            remedy=remedy,
            file=self.label,
            row=row,
        )
