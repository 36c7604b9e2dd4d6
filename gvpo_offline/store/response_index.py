"""Selects and regroups responses in the list columns of a table of groups and its sidecars."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gvpo_offline.errors import DataError
from gvpo_offline.store.arrow import (
    column_array,
    list_from_lengths,
    list_offsets,
    nested_list_array,
    split_nested_list,
)
from gvpo_offline.store.schema import Column, arrow_schema

# Axis of a column's lists that runs over the responses: 0 for (k, ...), 1 for (C, k).
# A column that is not listed has one value per group.
RESPONSE_AXIS = {
    "response_lengths": 0,
    "samplers": 0,
    "truncated": 0,
    "response_token_ids": 0,
    "loss_mask": 0,
    "responses": 0,
    "response_ids": 0,
    "response_messages": 0,
    "rewards": 0,
    "ref_seq_logprobs": 0,
    "sampler_seq_logprobs": 0,
    "ref_token_logprobs": 0,
    "components": 1,
}

Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class ResponseIndex:
    """Which rows' responses make up each of G new groups. No two groups share a row.

    Attributes:
        first: (G,) int64: for each group the row that gives its prompt, source and metadata.
        sizes: (G,) int64: number of responses of each group, at least 1.
        rows: (R,) int64, R = sum(sizes): the row of each response, group after group.
        items: (R,) int64: index of each response within that row.
    """

    first: Indices
    sizes: Indices
    rows: Indices
    items: Indices

    @property
    def starts(self) -> Indices:
        """Offset of each group's first response: (G,) int64."""
        return np.cumsum(self.sizes) - self.sizes

    def at_least(self, size: int) -> ResponseIndex:
        """The groups with at least `size` responses."""
        keep = self.sizes >= size
        of_kept = np.repeat(keep, self.sizes)
        return ResponseIndex(
            self.first[keep], self.sizes[keep], self.rows[of_kept], self.items[of_kept]
        )

    def pieces(self, responses_at_once: int) -> list[ResponseIndex]:
        """The same groups, split into consecutive parts of about `responses_at_once` responses."""
        starts = self.starts
        cuts = np.flatnonzero(np.diff(starts // responses_at_once)) + 1
        edges = [0, *cuts.tolist(), len(starts)]
        ends = np.append(starts, len(self.rows))
        return [
            ResponseIndex(self.first[a:b], self.sizes[a:b], *self._responses(ends[a], ends[b]))
            for a, b in itertools.pairwise(edges)
            if b > a
        ]

    def _responses(self, start: int, stop: int) -> tuple[Indices, Indices]:
        return self.rows[start:stop], self.items[start:stop]


def take_responses(table: pa.Table, columns: Sequence[Column], index: ResponseIndex) -> pa.Table:
    """The groups of an index: (G,) rows of `columns`.

    A value that is null in one of a group's rows is null in the group. Loss masks are an exception:
    null means that every token counts, so it becomes a mask of ones if another row has a mask.

    Args:
        table: with `columns`; a list over responses has one item per response of its row.
        columns: of the result.
        index: the groups.

    Raises:
        DataError: rows of one group differ in their number of reward components, C.
    """
    schema = arrow_schema(columns)
    arrays = []
    for column in columns:
        array = column_array(table, column.name)
        axis = RESPONSE_AXIS.get(column.name)
        if column.name == "loss_mask" and 0 < array.null_count < len(array):
            array = _with_full_masks(array, column_array(table, "response_token_ids"), index)
        if axis is None:
            array = array.take(pa.array(index.first))
        elif axis == 0:
            array = _outer(array, index)
        else:
            _check_parts(table, column.name, index)
            array = _inner(array, index)
        arrays.append(array.cast(schema.field(column.name).type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _valid(array: pa.Array) -> Flags:
    return np.asarray(array.is_valid().to_numpy(zero_copy_only=False))


def _every(flags: Flags, index: ResponseIndex) -> Flags:
    """For each group whether a flag is set for all of its rows: (G,) bool."""
    return np.asarray(np.logical_and.reduceat(flags[index.rows], index.starts))


def _outer(array: pa.ListArray, index: ResponseIndex) -> pa.ListArray:
    """(k, ...) lists: the item of each response."""
    valid = _every(_valid(array), index)
    keep = np.repeat(valid, index.sizes)
    flat = list_offsets(array)[index.rows[keep]] + index.items[keep]
    values = array.values.take(pa.array(flat))
    return list_from_lengths(np.where(valid, index.sizes, 0), values, valid)


def _inner(array: pa.ListArray, index: ResponseIndex) -> pa.ListArray:
    """(C, k) lists: the item of each response in each of the C lists."""
    valid = _every(_valid(array), index)
    outer, inner = list_offsets(array), list_offsets(array.values)
    counts = np.where(valid, np.diff(outer)[index.first], 0)
    flat = [
        inner[outer[index.rows[a : a + size]] + c] + index.items[a : a + size]
        for a, size, count in zip(index.starts, index.sizes, counts, strict=True)
        for c in range(count)
    ]
    indices = np.concatenate(flat) if flat else np.zeros(0, np.int64)
    values = array.values.values.take(pa.array(indices))
    lists = list_from_lengths(np.repeat(index.sizes, counts), values)
    return list_from_lengths(counts, lists, valid)


def _check_parts(table: pa.Table, name: str, index: ResponseIndex) -> None:
    array = column_array(table, name)
    counts = np.diff(list_offsets(array))
    wrong = (counts[index.rows] != np.repeat(counts[index.first], index.sizes)) & _valid(array)[
        index.rows
    ]
    if wrong.any():
        row = int(index.rows[np.flatnonzero(wrong)[0]])
        raise DataError(
            f"all rows of a group have the same number of lists in {name}",
            received=f"{counts[row]} lists in one row, and another number in the first",
            remedy="score the datasets with one reward of one configuration",
            group=table.column("group_id")[row].as_py(),
        )


def n_partly_null(table: pa.Table, name: str, index: ResponseIndex) -> int:
    """The number of groups whose rows have a value in a column in part, so that it becomes null."""
    valid = _valid(column_array(table, name))
    return int((~_every(valid, index) & ~_every(~valid, index)).sum())


def _with_full_masks(
    masks: pa.ListArray, tokens: pa.ListArray, index: ResponseIndex
) -> pa.ListArray:
    """The masks, with a mask of ones for each null row whose group has another row with a mask."""
    valid = _valid(masks)
    mixed = ~_every(valid, index) & ~_every(~valid, index)
    bare = np.repeat(mixed, index.sizes) & ~valid[index.rows]
    if not bare.any():
        return masks
    rows, ids = split_nested_list(masks), split_nested_list(tokens)
    for row in np.unique(index.rows[bare]):
        rows[row] = [np.ones(len(response), bool) for response in ids[row] or ()]
    return nested_list_array(rows, pa.bool_())
