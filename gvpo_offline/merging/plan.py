"""Selects the responses of each group from the spilled rows of a bucket."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gvpo_offline.errors import DataError
from gvpo_offline.merging.inputs import LOCATION_COLUMNS
from gvpo_offline.rules import MIN_GROUP_SIZE
from gvpo_offline.settings import ErrorOrDrop
from gvpo_offline.store.arrow import column_array, list_offsets, split_list, split_nested_list
from gvpo_offline.store.columns import RowGroupLocation
from gvpo_offline.store.response_index import Indices, ResponseIndex

# Columns that a plan needs, apart from rewards.
PLAN_COLUMNS = (*LOCATION_COLUMNS, "group_id", "prompt_token_ids", "response_token_ids")


@dataclass(frozen=True)
class Planner:
    """Plans the groups of spilled rows.

    Attributes:
        duplicates, singletons: as in `RewriteSettings`.
        rewards: names of the columns of rewards.
        waiting: numbers of the inputs that are incomplete groups.
        location: maps the numbers of an input and of its row group to a location, for errors.
        counts: numbers of joined groups, duplicates and dropped responses; `plan` adds to it.
    """

    duplicates: Literal["keep", "drop", "count"]
    singletons: ErrorOrDrop
    rewards: Sequence[str]
    location: Callable[[int, int], RowGroupLocation]
    counts: Counter[str]
    waiting: Sequence[int] = ()

    @property
    def columns(self) -> list[str]:
        """The columns that `plan` needs."""
        return [*PLAN_COLUMNS, *(self.rewards if self.duplicates != "keep" else ())]

    def plan(self, table: pa.Table) -> tuple[ResponseIndex | None, ResponseIndex | None]:
        """Plan the groups of a table, ordered by the hash of their id, then by id.

        Args:
            table: spilled rows; it holds all rows of each of its groups.

        Returns:
            The responses of each group, ordered by input, row and position within the row; and
            those of the incomplete groups that remain incomplete, since all of their responses but
            one are dropped as duplicates. None instead of no group.

        Raises:
            DataError: rows of one group have different prompts, or only a single response of a
                group remains; names file, row and group.
        """
        keys = [(name, "ascending") for name in ("key", "group_id", *LOCATION_COLUMNS[1:])]
        order = pc.sort_indices(table, sort_keys=keys).to_numpy().astype(np.int64)
        ids = column_array(table, "group_id").take(pa.array(order))
        new = np.append(True, pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False))
        starts = np.flatnonzero(new)
        self._check_prompts(table, order, starts)
        self.counts["joined_groups"] += int((np.diff(np.append(starts, len(order))) > 1).sum())
        k = pc.list_value_length(column_array(table, "response_token_ids")).to_numpy()
        k = k.astype(np.int64)[order]
        rows = np.repeat(order, k)
        items = np.arange(len(rows)) - np.repeat(np.cumsum(k) - k, k)
        sizes = np.add.reduceat(k, starts)
        index = ResponseIndex(order[starts], sizes, rows, items)
        return self._with_min_size(table, index, self._keep(table, index))

    def _check_prompts(self, table: pa.Table, order: Indices, starts: Indices) -> None:
        prompts = split_list(column_array(table, "prompt_token_ids"))
        for a, b in itertools.pairwise([*starts.tolist(), len(order)]):
            for row in order[a + 1 : b]:
                if np.array_equal(prompts[row], prompts[order[a]]):
                    continue
                first = self._where(table, int(order[a]))
                raise DataError(
                    "all rows of a group have the same prompt",
                    received="prompt token ids that differ from those of "
                    f"{first['file']}, row {first['row']}",
                    remedy="if the two logs gave this id to different prompts, merge with "
                    "match: prompt",
                    **self._where(table, int(row)),
                )

    def _where(self, table: pa.Table, row: int) -> dict[str, Any]:
        """Keyword arguments of an error about one spilled row: file, row and group."""
        number, row_group, local = (table.column(n)[row].as_py() for n in LOCATION_COLUMNS[1:])
        location = self.location(number, row_group)
        group = table.column("group_id")[row].as_py()
        return {"file": location.file, "row": location.first_row + local, "group": group}

    def _keep(self, table: pa.Table, index: ResponseIndex) -> npt.NDArray[np.bool_]:
        """Flags of the responses that are kept: (R,) bool."""
        keep = np.ones(len(index.rows), bool)
        if self.duplicates == "keep":
            return keep
        twins = _twins(table, index)
        doubled = np.flatnonzero(twins >= 0)
        self.counts["duplicates"] += len(doubled)
        differ = np.zeros(len(doubled), bool)
        for name in self.rewards:
            array = column_array(table, name)
            at = list_offsets(array)[index.rows] + index.items
            values = array.values.to_numpy()[at]
            one, other = values[doubled], values[twins[doubled]]
            differ |= (one != other) & ~np.isnan(one) & ~np.isnan(other)  # NaN: no reward yet
        self.counts["differing_rewards"] += int(differ.sum())
        if self.duplicates == "drop":
            keep[doubled] = False
            self.counts["dropped_duplicates"] += len(doubled)
        return keep

    def _with_min_size(
        self, table: pa.Table, index: ResponseIndex, keep: npt.NDArray[np.bool_]
    ) -> tuple[ResponseIndex | None, ResponseIndex | None]:
        """The index of the kept responses, without groups below the minimum size; and that of
        incomplete groups below it.
        """
        sizes = np.add.reduceat(keep.astype(np.int64), index.starts)
        few = sizes < MIN_GROUP_SIZE
        still = np.zeros(len(few), bool)
        if self.waiting:
            apart = np.isin(table.column("input").to_numpy()[index.rows], self.waiting)
            still = few & np.logical_and.reduceat(apart, index.starts)
            completed = ~few & np.logical_or.reduceat(apart, index.starts)
            self.counts["completed_groups"] += int(completed.sum())
            few &= ~still
        if few.any() and self.singletons == "error":
            group = int(np.flatnonzero(few)[0])
            raise DataError(
                f"a group needs at least {MIN_GROUP_SIZE} responses",
                received=f"{sizes[group]} of {index.sizes[group]}; the others are duplicates",
                remedy="keep duplicates, or drop such groups (singletons: drop)",
                **self._where(table, int(index.first[group])),
            )
        self.counts["dropped_singletons"] += int(few.sum())
        return _chosen(index, keep, sizes, ~few & ~still), _chosen(index, keep, sizes, still)


def _chosen(
    index: ResponseIndex,
    keep: npt.NDArray[np.bool_],
    sizes: Indices,
    groups: npt.NDArray[np.bool_],
) -> ResponseIndex | None:
    """The kept responses of some groups; None if there is no group."""
    if not groups.any():
        return None
    keep = keep & np.repeat(groups, index.sizes)
    return ResponseIndex(index.first[groups], sizes[groups], index.rows[keep], index.items[keep])


def _twins(table: pa.Table, index: ResponseIndex) -> Indices:
    """For each response, the index of the first response of its group with the same token ids.

    -1 for the first response itself: (R,) int64.
    """
    ids = split_nested_list(column_array(table, "response_token_ids"))
    twins = np.full(len(index.rows), -1, np.int64)
    for start, size in zip(index.starts.tolist(), index.sizes.tolist(), strict=True):
        seen: dict[bytes, int] = {}
        for at in range(start, start + size):
            responses = ids[index.rows[at]]
            assert responses is not None  # a required column
            first = seen.setdefault(responses[index.items[at]].tobytes(), at)
            twins[at] = first if first < at else -1
    return twins
