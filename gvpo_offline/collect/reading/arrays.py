"""Between Arrow columns and Python rows, without a Python object per token.

Rows of lists of integers or flags are NumPy views on the column; everything else is what Arrow
makes of it. Nulls are None at every level.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from gvpo_offline.schema import list_array

_LISTS = (pa.ListArray, pa.LargeListArray)


def _is_tokens(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _is_token_lists(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    return _is_tokens(kind.value_type) or _is_token_lists(kind.value_type)


def to_rows(array: pa.Array) -> list[Any]:
    """The rows of a column; see the module's description."""
    if not (isinstance(array, _LISTS) and _is_token_lists(array.type)):
        rows: list[Any] = array.to_pylist()
        return rows
    offsets = array.offsets.to_numpy(zero_copy_only=False)
    first, last = int(offsets[0]), int(offsets[-1])
    values = array.values.slice(first, last - first)
    if _is_tokens(values.type):
        if values.null_count:
            rows = array.to_pylist()
            return rows
        items: Any = values.to_numpy(zero_copy_only=False)
    else:
        items = to_rows(values)
    pieces = [items[a - first : b - first] for a, b in itertools.pairwise(offsets.tolist())]
    if not array.null_count:
        return pieces
    valid = array.is_valid().to_pylist()
    return [piece if ok else None for piece, ok in zip(pieces, valid, strict=True)]


def from_arrays(rows: Sequence[Any], value_type: pa.DataType) -> pa.ListArray:
    """Rows of (T,) arrays, or None, as a list column."""
    column = list_array([row if row is not None else _EMPTY for row in rows], value_type)
    if all(row is not None for row in rows):
        return column
    missing = pa.array([row is None for row in rows])
    return pa.ListArray.from_arrays(column.offsets, column.values, mask=missing)


def from_array_lists(rows: Sequence[Any], value_type: pa.DataType) -> pa.ListArray:
    """Rows of lists of (T,) arrays, with None at either level, as a list-of-lists column."""
    inner = from_arrays([item for row in rows if row is not None for item in row], value_type)
    lengths = [0 if row is None else len(row) for row in rows]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    missing = pa.array([row is None for row in rows]) if any(r is None for r in rows) else None
    return pa.ListArray.from_arrays(offsets, inner, mask=missing)


_EMPTY = np.empty(0, np.int32)
