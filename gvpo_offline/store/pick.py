"""Responses picked out of any column of groups: what carries tokens and sidecars along alike."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gvpo_offline.errors import DataError
from gvpo_offline.store.arrow import column_array, nested_list_array, split_nested_list
from gvpo_offline.store.schema import Column, arrow_schema

# Which level of a column's lists goes through the responses: 0 for (k, ...), 1 for (C, k).
# A column that is not here has one value for the whole group.
RESPONSE_AXIS = {
    "response_lengths": 0,
    "samplers": 0,
    "truncated": 0,
    "response_token_ids": 0,
    "loss_mask": 0,
    "responses": 0,
    "response_ids": 0,
    "rewards": 0,
    "ref_seq_logprobs": 0,
    "sampler_seq_logprobs": 0,
    "ref_token_logprobs": 0,
    "components": 1,
}

Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Pick:
    """Groups, each made of responses that lie in some rows of a table; no two share a row.

    Attributes:
        first: (G,) int64: for each group the row that speaks for it (prompt, source, metadata).
        sizes: (G,) int64: its responses, at least 1.
        rows: (R,) int64, R = sum(sizes): the row of each response, group after group.
        items: (R,) int64: its place among the responses of that row.
    """

    first: Indices
    sizes: Indices
    rows: Indices
    items: Indices

    @property
    def starts(self) -> Indices:
        """Where each group's responses begin: (G,) int64."""
        return np.cumsum(self.sizes) - self.sizes

    def at_least(self, size: int) -> Pick:
        """The groups that have so many responses."""
        keep = self.sizes >= size
        of_kept = np.repeat(keep, self.sizes)
        return Pick(self.first[keep], self.sizes[keep], self.rows[of_kept], self.items[of_kept])

    def pieces(self, responses_at_once: int) -> list[Pick]:
        """The same groups in runs of about so many responses."""
        starts = self.starts
        cuts = np.flatnonzero(np.diff(starts // responses_at_once)) + 1
        edges = [0, *cuts.tolist(), len(starts)]
        ends = np.append(starts, len(self.rows))
        return [
            Pick(self.first[a:b], self.sizes[a:b], *self._responses(ends[a], ends[b]))
            for a, b in itertools.pairwise(edges)
            if b > a
        ]

    def _responses(self, start: int, stop: int) -> tuple[Indices, Indices]:
        return self.rows[start:stop], self.items[start:stop]


def picked(table: pa.Table, columns: Sequence[Column], pick: Pick) -> pa.Table:
    """The groups of a pick: (G,) rows of `columns`.

    A value that is null for one of a group's rows is null for the group, but for a loss mask: null
    means that every token counts, and that is said in full where another row has a mask.

    Args:
        table: with `columns`; lists that go through the responses are as long as
            their group is large.
        columns: of the result.
        pick: the groups.

    Raises:
        DataError: rows of one group have another number of parts, C.
    """
    schema = arrow_schema(columns)
    arrays = []
    for column in columns:
        array = column_array(table, column.name)
        axis = RESPONSE_AXIS.get(column.name)
        if column.name == "loss_mask" and 0 < array.null_count < len(array):
            array = _with_full_masks(array, column_array(table, "response_token_ids"), pick)
        if axis is None:
            array = array.take(pa.array(pick.first))
        elif axis == 0:
            array = _outer(array, pick)
        else:
            _check_parts(table, column.name, pick)
            array = _inner(array, pick)
        arrays.append(array.cast(schema.field(column.name).type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _offsets(array: pa.ListArray) -> Indices:
    return np.asarray(array.offsets.to_numpy(zero_copy_only=False)).astype(np.int64)


def _valid(array: pa.Array) -> Flags:
    return np.asarray(array.is_valid().to_numpy(zero_copy_only=False))


def _every(flags: Flags, pick: Pick) -> Flags:
    """For each group whether a flag of rows holds for all of its rows: (G,) bool."""
    return np.asarray(np.logical_and.reduceat(flags[pick.rows], pick.starts))


def _lists(lengths: Indices, values: pa.Array, valid: Flags | None = None) -> pa.ListArray:
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), type=pa.int32())
    mask = None if valid is None or valid.all() else pa.array(~valid)
    return pa.ListArray.from_arrays(offsets, values, mask=mask)


def _outer(array: pa.ListArray, pick: Pick) -> pa.ListArray:
    """(k, ...) lists: each response's entry."""
    valid = _every(_valid(array), pick)
    keep = np.repeat(valid, pick.sizes)
    flat = _offsets(array)[pick.rows[keep]] + pick.items[keep]
    return _lists(np.where(valid, pick.sizes, 0), array.values.take(pa.array(flat)), valid)


def _inner(array: pa.ListArray, pick: Pick) -> pa.ListArray:
    """(C, k) lists: of each of C lists, each response's entry. C is that of the group's rows."""
    valid = _every(_valid(array), pick)
    outer, inner = _offsets(array), _offsets(array.values)
    counts = np.where(valid, np.diff(outer)[pick.first], 0)
    flat = [
        inner[outer[pick.rows[a : a + size]] + c] + pick.items[a : a + size]
        for a, size, count in zip(pick.starts, pick.sizes, counts, strict=True)
        for c in range(count)
    ]
    indices = np.concatenate(flat) if flat else np.zeros(0, np.int64)
    values = array.values.values.take(pa.array(indices))
    return _lists(counts, _lists(np.repeat(pick.sizes, counts), values), valid)


def _check_parts(table: pa.Table, name: str, pick: Pick) -> None:
    array = column_array(table, name)
    counts = np.diff(_offsets(array))
    wrong = (counts[pick.rows] != np.repeat(counts[pick.first], pick.sizes)) & _valid(array)[
        pick.rows
    ]
    if wrong.any():
        row = int(pick.rows[np.flatnonzero(wrong)[0]])
        raise DataError(
            f"all rows of a group have the same parts in {name}",
            received=f"{counts[row]} parts in one of them, and another number in the first",
            remedy="score the datasets with one reward of one configuration",
            group=table.column("group_id")[row].as_py(),
        )


def n_partly_known(table: pa.Table, name: str, pick: Pick) -> int:
    """The groups that lose what some of their rows, but not all, have in a column."""
    valid = _valid(column_array(table, name))
    return int((~_every(valid, pick) & ~_every(~valid, pick)).sum())


def _with_full_masks(masks: pa.ListArray, tokens: pa.ListArray, pick: Pick) -> pa.ListArray:
    """Masks with every flag set for the rows that have none and join rows that have one."""
    valid = _valid(masks)
    mixed = ~_every(valid, pick) & ~_every(~valid, pick)
    bare = np.repeat(mixed, pick.sizes) & ~valid[pick.rows]
    if not bare.any():
        return masks
    rows, ids = split_nested_list(masks), split_nested_list(tokens)
    for row in np.unique(pick.rows[bare]):
        rows[row] = [np.ones(len(response), bool) for response in ids[row] or ()]
    return nested_list_array(rows, pa.bool_())
