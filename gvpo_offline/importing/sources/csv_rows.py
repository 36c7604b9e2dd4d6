"""CSV files as inputs: a header line, then one row per record; every value is text."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from gvpo_offline.errors import DataError
from gvpo_offline.importing.sources.files import Advance, Source
from gvpo_offline.importing.sources.rows import Row


class CsvRows(Source):
    """A CSV file in UTF-8. Rows are numbered from 0 after the header; values stay text.

    Raises:
        DataError: the file has no header.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), path.stem, [path])
        with path.open(encoding="utf-8-sig", newline="", errors="replace") as file:
            self.columns = next(csv.reader(file), None)
        if not self.columns:
            raise DataError("a CSV file begins with a header", received="no line", file=path)

    def rows(self, columns: Sequence[str] | None, advance: Advance) -> Iterator[Row]:
        """See `Source.rows`."""
        number = -1
        try:
            with self.files[0].open(encoding="utf-8-sig", newline="") as file:
                for number, record in enumerate(csv.DictReader(file, strict=True)):
                    if None in record or None in record.values():
                        raise ValueError("the number of values differs from the header")
                    yield number, {k: v for k, v in record.items() if not columns or k in columns}
        except (csv.Error, ValueError) as error:
            if isinstance(error, DataError):  # raised by the caller that consumes the rows
                raise
            raise DataError(
                "a row of a CSV file in UTF-8 has a value for each column of the header",
                received=str(error),
                remedy="correct the row; quote a value that contains commas or line breaks",
                file=self.label,
                row=number,
            ) from error
        advance(self.size)
