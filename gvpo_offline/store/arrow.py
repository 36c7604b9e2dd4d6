"""Conversion between groups, NumPy arrays and Arrow tables, without a Python object per token."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gvpo_offline.group import FloatArray, Group
from gvpo_offline.hashing import UInt64Array
from gvpo_offline.store.schema import (
    GROUPS_COLUMNS,
    REFERENCE_COLUMNS,
    arrow_schema,
    rewards_schema,
)

_LISTS = (pa.ListArray, pa.LargeListArray)


def list_offsets(array: pa.ListArray) -> npt.NDArray[np.int64]:
    """Offsets of a list column of n rows into `array.values`: (n + 1,) int64."""
    return np.asarray(array.offsets.to_numpy(zero_copy_only=False)).astype(np.int64)


def list_from_lengths(
    lengths: npt.ArrayLike, values: pa.Array, valid: npt.NDArray[np.bool_] | None = None
) -> pa.ListArray:
    """A list column of n rows over `values`.

    Args:
        lengths: (n,) integers, the number of values of each row; 0 for a null row.
        values: sum(lengths) values, row after row.
        valid: (n,) bool, False where a row is null; None if no row is null.

    Raises:
        pa.ArrowInvalid: the column holds 2^31 values or more.
    """
    # Arrow checks the range here; a cast in NumPy would wrap around past 2**31 tokens.
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), type=pa.int32())
    mask = None if valid is None or valid.all() else pa.array(~valid)
    return pa.ListArray.from_arrays(offsets, values, mask=mask)


def _flat(arrays: Sequence[npt.NDArray[Any]], value_type: pa.DataType) -> pa.Array:
    if not arrays:
        return pa.array([], type=value_type)
    return pa.array(np.concatenate(arrays), type=value_type)


def _lists(rows: Sequence[Sequence[Any] | npt.NDArray[Any] | None], values: pa.Array) -> pa.Array:
    lengths = [0 if row is None else len(row) for row in rows]
    return list_from_lengths(lengths, values, np.array([row is not None for row in rows], bool))


def list_array(rows: Sequence[npt.NDArray[Any] | None], value_type: pa.DataType) -> pa.ListArray:
    """Rows of (T,) numbers as a list column, without a Python object per number.

    None becomes null.
    """
    return _lists(rows, _flat([row for row in rows if row is not None], value_type))


def nested_list_array(
    rows: Sequence[Sequence[npt.NDArray[Any] | None] | None], value_type: pa.DataType
) -> pa.ListArray:
    """Rows of lists of (T,) numbers as a list-of-lists column; None becomes null at both levels."""
    items = [item for row in rows if row is not None for item in row]
    return _lists(rows, list_array(items, value_type))


def as_numpy(array: pa.Array) -> npt.NDArray[Any]:
    """The values of an Arrow array: a read-only view, or a copy for booleans and with nulls."""
    if array.null_count:
        return np.asarray(array.to_numpy(zero_copy_only=False))
    # Not by to_numpy, which imports pandas and takes a quarter of a second for it.
    if pa.types.is_boolean(array.type):
        return np.array(np.from_dlpack(array.cast(pa.uint8())), np.bool_)
    return np.from_dlpack(array)


def column_array(table: pa.Table, name: str) -> pa.Array:
    """A column of a table as one contiguous array."""
    column = table.column(name).combine_chunks()
    return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column


def split_list(array: pa.ListArray) -> list[npt.NDArray[Any]]:
    """A list column as one NumPy view per row."""
    values = as_numpy(array.values)
    return [values[a:b] for a, b in itertools.pairwise(as_numpy(array.offsets).tolist())]


def split_nested_list(array: pa.ListArray) -> list[list[npt.NDArray[Any]] | None]:
    """A list-of-lists column as NumPy views; null rows become None."""
    if array.null_count == len(array):
        return [None] * len(array)
    offsets = as_numpy(array.offsets).tolist()
    items = split_list(array.values)
    valid = array.is_valid().to_pylist()
    return [
        items[a:b] if ok else None
        for (a, b), ok in zip(itertools.pairwise(offsets), valid, strict=True)
    ]


def repetitive_rows(array: pa.ListArray) -> list[tuple[Any, ...] | None]:
    """A list column as tuples, or None for null; equal rows share one tuple."""
    encoded = array.values.dictionary_encode(null_encoding="encode")
    names = encoded.dictionary.to_pylist()
    codes = as_numpy(encoded.indices).astype(np.int32).tobytes()

    @functools.cache
    def row(key: bytes) -> tuple[Any, ...]:
        return tuple(map(names.__getitem__, memoryview(key).cast("i")))

    spans = itertools.pairwise((4 * as_numpy(array.offsets)).tolist())
    valid = array.is_valid().to_pylist()
    return [row(codes[a:b]) if ok else None for (a, b), ok in zip(spans, valid, strict=True)]


def _is_tokens(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _is_token_lists(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    return _is_tokens(kind.value_type) or _is_token_lists(kind.value_type)


def to_rows(array: pa.Array) -> list[Any]:
    """The rows of a column: NumPy arrays for lists of integers or booleans, Python objects else.

    A list-of-lists column gives lists of (T,) arrays; a null at any level is None. Lists of tokens
    that hold nulls are given as Python lists.
    """
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


def prompt_hashes(prompts: pa.ListArray) -> UInt64Array:
    """The first 64 bits of the SHA-256 of each prompt: (n,) uint64.

    The ids are hashed as 32-bit little-endian integers. `importing.fragment.tokens_key` is the
    whole hash, in hexadecimal digits.

    Args:
        prompts: (n,) lists of int32, without nulls.
    """
    values = np.ascontiguousarray(as_numpy(prompts.values), dtype="<i4")
    content = values.tobytes()
    ends = (values.itemsize * list_offsets(prompts)).tolist()
    digests = b"".join(
        hashlib.sha256(content[a:b]).digest()[:8] for a, b in itertools.pairwise(ends)
    )
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def groups_to_table(groups: Sequence[Group]) -> pa.Table:
    """The rows of a groups file for `groups`, in their order."""
    tokens, flags = pa.int32(), pa.bool_()
    prompts = list_array([g.prompt_token_ids for g in groups], tokens)
    values: dict[str, Any] = {
        "group_id": [g.group_id for g in groups],
        "source": [g.source for g in groups],
        "n_tokens": [g.n_tokens for g in groups],
        "prompt_length": [len(g.prompt_token_ids) for g in groups],
        "response_lengths": [g.response_lengths for g in groups],
        "samplers": [g.samplers for g in groups],
        "truncated": [g.truncated for g in groups],
        "prompt_hash": prompt_hashes(prompts),
        "prompt_token_ids": prompts,
        "response_token_ids": nested_list_array([g.response_token_ids for g in groups], tokens),
        "loss_mask": nested_list_array([g.loss_mask for g in groups], flags),
        "prompt": [g.prompt for g in groups],
        "messages": [g.messages for g in groups],
        "responses": [g.responses for g in groups],
        "response_ids": [g.response_ids for g in groups],
        "metadata": [g.metadata for g in groups],
        "sampler_seq_logprobs": [
            None if g.sampler_seq_logprobs is None else g.sampler_seq_logprobs.tolist()
            for g in groups
        ],
        "template_arguments": [g.template_arguments for g in groups],
        # Never null, so that groups of a dataset with such responses and of one without can merge.
        "response_messages": [g.response_messages or ("",) * g.group_size for g in groups],
    }
    schema = arrow_schema(GROUPS_COLUMNS)
    arrays = [
        value if isinstance(value, pa.Array) else pa.array(value, type=schema.field(name).type)
        for name, value in values.items()
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def rewards_to_table(
    group_ids: Sequence[str],
    rewards: Sequence[FloatArray],
    components: Sequence[FloatArray] | None = None,
) -> pa.Table:
    """The rows of a rewards sidecar.

    Args:
        group_ids: one id per group.
        rewards: (k,) per group.
        components: (C, k) per group, NaN where missing; None: without the column.
    """
    arrays = [pa.array(group_ids, pa.string()), list_array(rewards, pa.float64())]
    if components is not None:
        arrays.append(nested_list_array([list(parts) for parts in components], pa.float64()))
    return pa.Table.from_arrays(arrays, schema=rewards_schema(components=components is not None))


def reference_to_table(
    group_ids: Sequence[str],
    seq_logprobs: Sequence[FloatArray],
    token_logprobs: Sequence[Sequence[npt.NDArray[np.float32]] | None],
) -> pa.Table:
    """The rows of a reference sidecar; log-probs in nats. None: a group without those of tokens."""
    return pa.Table.from_arrays(
        [
            pa.array(group_ids, pa.string()),
            list_array(seq_logprobs, pa.float64()),
            nested_list_array(token_logprobs, pa.float32()),
        ],
        schema=arrow_schema(REFERENCE_COLUMNS),
    )


_NUMBER_LISTS = ("prompt_token_ids", "rewards", "ref_seq_logprobs")
_OPTIONAL_LISTS = ("sampler_seq_logprobs",)
_NESTED_LISTS = ("response_token_ids", "loss_mask", "components")
_REPETITIVE_LISTS = ("samplers", "truncated")


def _column_rows(table: pa.Table, name: str) -> list[Any]:
    """A column's value in each row; None where the table has no such column."""
    if name not in table.column_names:
        return [None] * table.num_rows
    if name in _NESTED_LISTS:
        return split_nested_list(column_array(table, name))
    if name in _NUMBER_LISTS:
        return split_list(column_array(table, name))
    if name in _OPTIONAL_LISTS:
        column = column_array(table, name)
        pairs = zip(split_list(column), column.is_valid().to_pylist(), strict=True)
        return [row if valid else None for row, valid in pairs]
    if name in _REPETITIVE_LISTS:
        return repetitive_rows(column_array(table, name))
    rows: list[Any] = table.column(name).to_pylist()
    return rows


def groups_from_table(table: pa.Table) -> list[Group]:
    """The groups of a table with at least the required columns, in its order.

    Optional columns that the table lacks stay None; samplers and truncation, which training only
    counts, become "unknown" and False.
    """
    columns = {field.name: _column_rows(table, field.name) for field in fields(Group)}
    responses = [tuple(row or ()) for row in columns["response_token_ids"]]
    columns["response_token_ids"] = responses
    for name in ("loss_mask", "responses", "response_ids", "response_messages"):
        columns[name] = [None if row is None else tuple(row) for row in columns[name]]
    columns["response_messages"] = [
        row if row is not None and any(row) else None for row in columns["response_messages"]
    ]
    for name, unknown in (("samplers", "unknown"), ("truncated", False)):
        pairs = zip(columns[name], responses, strict=True)
        columns[name] = [(unknown,) * len(ids) if row is None else row for row, ids in pairs]
    columns["components"] = [
        None if parts is None else np.array(parts, np.float64) for parts in columns["components"]
    ]
    columns["source"] = [source or "" for source in columns["source"]]
    return list(map(Group, *columns.values()))
