"""Rows of columnar files, whose columns may hold values that no row can have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa

from gvpo_offline.errors import DataError
from gvpo_offline.importing.sources.rows import Row
from gvpo_offline.store.arrow import to_rows

__all__ = ["bad_names", "rows_of_batch", "check_names"]

# What pyarrow raises for a value without a Python object: text that is not UTF-8, a record with a
# field twice, a date before the year 1 or after 9999.
_NO_OBJECT = (ValueError, OverflowError, pa.ArrowException)


def rows_of_batch(batch: pa.RecordBatch, first: int, label: str) -> Iterator[Row]:
    """The rows of a batch.

    Args:
        batch: the batch.
        first: the number of its first row.
        label: the input, for the error.

    Raises:
        DataError: a value is not valid; names its column and row.
    """
    names = batch.schema.names
    columns = []
    for name, column in zip(names, batch.columns, strict=True):
        try:
            columns.append(to_rows(column))
        except _NO_OBJECT as error:
            raise _invalid(name, column, first, label) from error
    for offset, values in enumerate(zip(*columns, strict=True)):
        yield first + offset, dict(zip(names, values, strict=True))


def _invalid(name: str, column: pa.Array, first: int, label: str) -> DataError:
    at = next((i for i in range(len(column)) if not _has_object(column, i)), 0)
    return DataError(
        "texts of a columnar file are UTF-8, its records have each field once, and its dates are "
        "of the years 1 to 9999",
        received=f"another value in the column {name!r}, of the type {column.type}",
        remedy="write the column again, or leave it out of the file",
        file=label,
        row=first + at,
    )


def _has_object(column: pa.Array, index: int) -> bool:
    try:
        column[index].as_py()
    except _NO_OBJECT:
        return False
    return True


def check_names(names: Sequence[str], label: str) -> None:
    """Check that each column has a name of its own, as each value of a row needs one.

    Raises:
        DataError: a name occurs twice.
    """
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise DataError(
            "each column of a file has a name of its own",
            received=f"{', '.join(map(repr, twice))} more than once",
            remedy="rename the columns",
            file=label,
        )


def bad_names(error: UnicodeDecodeError, label: str) -> DataError:
    """The error for names of columns that are not text."""
    return DataError(
        "the names of columns are text in UTF-8",
        received=repr(error.object),
        remedy="rename the column",
        file=label,
    )
