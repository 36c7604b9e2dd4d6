"""Checks of single columns that are read from a Parquet file.

They run at every read, vectorised per column, because shards and sidecars may be written by other
programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gvpo_offline.errors import DataError
from gvpo_offline.rules import LOGPROB_REMEDY, LOGPROB_RULE, impossible_logprobs
from gvpo_offline.store.arrow import as_numpy, list_from_lengths
from gvpo_offline.store.schema import Column

_SCALARS = {"rewards": "reward", "ref_seq_logprobs": "reference log-prob"}


@dataclass(frozen=True, slots=True)
class RowGroupLocation:
    """The location of a row group: its file, and the number of its first row within the file."""

    file: Path | str
    first_row: int

    def of_row(self, table: pa.Table, row: int) -> dict[str, Any]:
        """The `file`, `row` and `group` of an error about one row of a table with group ids."""
        group = table.column("group_id")[row].as_py()
        return {"file": self.file, "row": self.first_row + row, "group": group}


def check_present(present: Sequence[str], known: Sequence[Column], file: Path | str) -> None:
    """Raise DataError if a file lacks a column that a file of its kind must have."""
    missing = [c.name for c in known if c.required and c.name not in present]
    if missing:
        raise DataError(
            "a file has the required columns of schemas/",
            received=f"no column {', '.join(missing)}",
            remedy="write the missing columns, or convert the log with `gvpo-offline import`",
            file=file,
        )


def cast_columns(table: pa.Table, known: Sequence[Column], location: RowGroupLocation) -> pa.Table:
    """The table, cast to the types of `known`.

    Raises:
        DataError: a column cannot be cast, or a list holds a null.
    """
    kinds = {column.name: column.type for column in known}
    columns = []
    for name in table.column_names:
        kind = kinds[name]
        try:
            columns.append(table.column(name).cast(kind))
        except pa.ArrowException as error:
            raise DataError(
                f"column {name} has the type {kind} of schemas/, or one that converts to it",
                received=f"{table.column(name).type}: {error}",
                remedy="write the column with that type",
                file=location.file,
            ) from error
    result = pa.Table.from_arrays(columns, names=table.column_names)
    for name in result.column_names:
        _check_no_nulls(result, name, location)
    return result


def _check_no_nulls(table: pa.Table, name: str, location: RowGroupLocation) -> None:
    for chunk in table.column(name).chunks:
        while pa.types.is_list(chunk.type):
            chunk = chunk.flatten()
            if chunk.null_count:
                rows = table.column(name).to_pylist()
                row = next(number for number, value in enumerate(rows) if _holds_null(value))
                raise DataError(
                    f"a list in column {name} holds no nulls",
                    received="null",
                    remedy="write a value, or null instead of the whole list where schemas/ allow",
                    **location.of_row(table, row),
                )


def _holds_null(value: Any) -> bool:
    return isinstance(value, list) and any(item is None or _holds_null(item) for item in value)


def check_scalars(
    table: pa.Table,
    name: str,
    sizes: pa.ChunkedArray,
    location: RowGroupLocation,
    *,
    gaps: bool = False,
) -> None:
    """Check that a joined column (rewards, ref_seq_logprobs) has one finite number per response.

    Args:
        table: with `group_id` and `name`.
        name: the column.
        sizes: responses of each row.
        location: location of the column's row group.
        gaps: whether NaN stands for a response without a number, which is no error.

    Raises:
        DataError: a list has another length than its group, or holds a number that is not finite.
    """
    lengths = _lengths(table.column(name))
    wrong = pc.not_equal(lengths, sizes)
    if pc.any(wrong).as_py():
        row = int(np.flatnonzero(wrong.to_numpy())[0])
        raise DataError(
            f"there is one {_SCALARS[name]} per response",
            received=f"{lengths[row].as_py()} for {sizes[row].as_py()} responses",
            remedy="write the column again for these groups",
            **location.of_row(table, row),
        )
    values = pc.list_flatten(table.column(name))
    finite = pc.is_finite(values)
    if gaps:
        finite = pc.or_(finite, pc.is_nan(values))
    if not pc.all(finite).as_py() and len(finite):
        index = int(np.flatnonzero(~finite.to_numpy())[0])
        ends = np.cumsum(lengths.to_numpy())
        row = int(np.searchsorted(ends, index, side="right"))
        response = index - int(ends[row] - lengths[row].as_py())
        value = table.column(name)[row][response].as_py()
        raise DataError(
            f"a {_SCALARS[name]} is a finite number",
            received=f"{value} for response {response}",
            remedy="score the response again, or leave it out of the log",
            **location.of_row(table, row),
        )


def check_logprobs(
    table: pa.Table, response_token_ids: pa.ListArray, location: RowGroupLocation
) -> None:
    """Check that each reference log-prob is one that a model can give; NaN stands for none.

    Args:
        table: with `group_id`, and perhaps `ref_seq_logprobs`.
        response_token_ids: of the same rows.
        location: location of the row group.

    Raises:
        DataError: a log-prob is above 0 by more than rounding, or absurdly low.
    """
    if "ref_seq_logprobs" not in table.column_names:
        return
    values = as_numpy(pc.list_flatten(table.column("ref_seq_logprobs")).combine_chunks())
    lengths = as_numpy(pc.list_value_length(response_token_ids.flatten()))
    bad = np.flatnonzero(impossible_logprobs(values, lengths))
    if len(bad):
        ends = np.cumsum(as_numpy(pc.list_value_length(response_token_ids)))
        row = int(np.searchsorted(ends, bad[0], side="right"))
        raise DataError(
            LOGPROB_RULE,
            received=f"{values[bad[0]]} for a response of {lengths[bad[0]]} tokens",
            remedy=LOGPROB_REMEDY,
            **location.of_row(table, row),
        )


def add_weighted(
    before: pa.ChunkedArray | None, rewards: pa.ChunkedArray, weight: float
) -> pa.ChunkedArray:
    """`before + weight * rewards` per response; both columns have lists of the same lengths."""
    values = pc.multiply(pc.list_flatten(rewards), weight)
    if before is not None:
        values = pc.add(pc.list_flatten(before), values)
    sizes = pc.list_value_length(rewards).to_numpy()
    flat = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    return pa.chunked_array([list_from_lengths(sizes, flat)])


def check_components(
    table: pa.Table, sizes: pa.ChunkedArray, n_parts: int, location: RowGroupLocation
) -> None:
    """Check the shape (C, k) of the column `components` in each row.

    Args:
        table: with `group_id` and `components`.
        sizes: k, responses of each row.
        n_parts: C, number of components that the reward family names.
        location: location of the column's row group.

    Raises:
        DataError: a row is not null and not (C, k), or holds an infinite number.
    """
    if _have_shape(table.column("components"), sizes, n_parts):
        return
    rows = zip(table.column("components").to_pylist(), sizes.to_pylist(), strict=True)
    for number, (parts, k) in enumerate(rows):
        if parts is None:
            continue
        lengths = [len(part) for part in parts]
        if lengths != [k] * n_parts:
            raise DataError(
                f"there is one number per response of each of the reward's {n_parts} components",
                received=f"lists of {lengths} numbers for {k} responses",
                remedy="write the column again for these groups",
                **location.of_row(table, number),
            )
        if any(np.isinf(part).any() for part in parts):
            raise DataError(
                "a component of a reward is a finite number, or NaN where it is missing",
                received=parts,
                remedy="score the group again",
                **location.of_row(table, number),
            )


def _have_shape(components: pa.ChunkedArray, sizes: pa.ChunkedArray, n_parts: int) -> bool:
    """Whether each row is null, or n_parts lists of as many numbers as its size, none infinite."""
    column, counts = components.combine_chunks(), sizes.combine_chunks()
    valid = column.is_valid()
    rows, counts = column.filter(valid), counts.filter(valid)
    if not pc.all(pc.equal(pc.list_value_length(rows), n_parts)).as_py():
        return not len(rows)
    parts = rows.flatten()
    if parts.null_count or parts.flatten().null_count:
        return False
    wanted = np.repeat(as_numpy(counts), n_parts)
    lengths = as_numpy(pc.list_value_length(parts))
    if not np.array_equal(lengths, wanted):
        return False
    return not pc.any(pc.is_inf(parts.flatten())).as_py()


def response_counts(table: pa.Table) -> pa.ChunkedArray | None:
    """Responses of each row, from the tokens or the lengths; None if the table has neither."""
    if "response_token_ids" in table.column_names:
        return _lengths(table.column("response_token_ids"))
    stored = "response_lengths" in table.column_names
    if stored and not table.column("response_lengths").null_count:
        return pc.list_value_length(table.column("response_lengths"))
    return None


def _lengths(column: pa.ChunkedArray) -> pa.ChunkedArray:
    # Null counts as 0. `fill_null` is only called where needed: it imports pandas.
    lengths = pc.list_value_length(column)
    return pc.fill_null(lengths, 0) if lengths.null_count else lengths
