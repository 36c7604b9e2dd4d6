"""The conditions that select groups. They are applied in order, and each reports its counts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gvpo_offline.errors import ConfigError
from gvpo_offline.group import BoolArray
from gvpo_offline.hashing import UInt64Array, splitmix64, text_keys
from gvpo_offline.rules import MIN_GROUP_SIZE
from gvpo_offline.store.arrow import as_numpy, column_array, split_list
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.prompts import PROMPT_HASH, PromptCounter
from gvpo_offline.stream.selecting.predicate import shown
from gvpo_offline.stream.selecting.responses import (
    check_sampler_patterns,
    choose,
    response_summary,
    take_all_columns,
)
from gvpo_offline.stream.selecting.where import nothing_selected, predicate_masks
from gvpo_offline.stream.settings import HeldOutRule, ResponseSettings

if TYPE_CHECKING:
    import polars as pl

# Datasets are sorted by the hash of the id, and ids may be hashes of prompts; without this key the
# held-out groups would be the first ones of the dataset.
_HELD_OUT_KEY = np.uint64(0x48454C444F555421)


@dataclass(frozen=True)
class SelectedRows:
    """The rows of a row group that fulfil the conditions so far.

    Attributes:
        row_group: its number.
        stored: summary columns of all of its rows.
        numbers: (n,) int64, numbers of the selected rows.
        table: (n,) rows, the columns of the selected rows, with their selected responses.
    """

    row_group: int
    stored: pa.Table
    numbers: npt.NDArray[np.int64]
    table: pa.Table

    @classmethod
    def whole(cls, row_group: int, stored: pa.Table) -> SelectedRows:
        """All rows of a row group."""
        return cls(row_group, stored, np.arange(stored.num_rows, dtype=np.int64), stored)

    def only(self, mask: BoolArray) -> SelectedRows:
        """The rows for which `mask`, (n,) bool, is true."""
        return replace(self, numbers=self.numbers[mask], table=self.table.filter(pa.array(mask)))


class Condition(Protocol):
    """A condition on groups. It is applied to every row group once, in order.

    Attributes:
        columns: the summary columns that it reads.
    """

    columns: tuple[str, ...]

    def keep(self, rows: SelectedRows) -> SelectedRows:
        """The rows that fulfil it."""

    def note(self) -> str | None:
        """A line for the log with its counts; None: nothing to report.

        Raises:
            ConfigError: no group fulfils it.
        """


class WhereCondition:
    """A predicate on groups as they are stored. It comes first, and reads its own columns."""

    columns: tuple[str, ...] = ()

    def __init__(self, dataset: GroupDataset, where: str | pl.Expr) -> None:
        self._dataset = dataset
        self._where = where
        self._masks = predicate_masks(dataset, where)
        self._n_true = self._n_null = 0

    def keep(self, rows: SelectedRows) -> SelectedRows:
        """The rows for which the predicate is true."""
        mask, n_null = next(self._masks)
        self._n_true += int(mask.sum())
        self._n_null += n_null
        return rows.only(mask)

    def note(self) -> str:
        """The number of groups for which it is true, and for which it is null."""
        total, n_null = self._dataset.n_groups, self._n_null
        if not self._n_true:
            raise nothing_selected(self._where, total, n_null, self._dataset.root)
        null = f"; it is null for {n_null:,}, which are left out" if n_null else ""
        return f"where {shown(self._where)}: {self._n_true:,} of {total:,} groups{null}"


def held_out_mask(keys: UInt64Array, fraction: float) -> BoolArray:
    """Whether groups belong to the held-out `fraction`: (n,) bool.

    A hash alone decides, so that a group is held out in every run, with any seed, in every later
    version of the dataset, and in every other dataset.

    Args:
        keys: (n,) uint64: the `prompt_hash` of each group; or, by the rule of earlier versions,
            `text_keys` of the group ids.
        fraction: in [0, 1].
    """
    hashes = splitmix64(keys ^ _HELD_OUT_KEY)
    return np.asarray(hashes.astype(np.float64) < fraction * 2.0**64)


class HeldOutCondition:
    """The held-out fraction of the groups, or all other groups.

    Args:
        fraction: in (0, 1).
        held_out: which side.
        by: what is held out. prompt: all groups of a prompt are on one side. group: each group by
            its id, as in earlier versions; groups of one prompt may then be on both sides.
    """

    columns: tuple[str, ...] = ("group_id", PROMPT_HASH)

    def __init__(self, fraction: float, *, held_out: bool, by: HeldOutRule = "prompt") -> None:
        self._fraction = fraction
        self._held_out = held_out
        self._by = by
        self._counter = PromptCounter()

    def keep(self, rows: SelectedRows) -> SelectedRows:
        """The rows on one side of the split."""
        prompts = as_numpy(column_array(rows.table, PROMPT_HASH))
        keys = prompts
        if self._by == "group":
            keys = text_keys(rows.table.column("group_id").to_pylist())
        mask = held_out_mask(keys, self._fraction)
        self._counter.add(prompts, mask)
        return rows.only(mask == self._held_out)

    def note(self) -> str:
        """The held-out prompts and groups, and how many groups share a prompt."""
        found = self._counter.counts()
        about, held = found.about, found.marked_prompts
        both = ""
        if self._by == "group":
            both = (
                f"; {about}{found.on_both_sides:,} of {about}{held:,} held-out prompts are trained "
                "on as well (in a new run, held_out_by: prompt prevents it)"
            )
        return (
            f"eval_fraction {self._fraction:g}, by {self._by}: {about}{held:,} of "
            f"{about}{found.prompts:,} prompts are held out, {found.marked_groups:,} of "
            f"{found.groups:,} groups; {found.shared_text()}{both}"
        )


class ResponseCondition:
    """At least two responses that fulfil the settings."""

    def __init__(self, dataset: GroupDataset, settings: ResponseSettings) -> None:
        spreads = settings.prefer == "spread"
        if spreads:
            _check_rewards(dataset, "prefer: spread")
        self.columns: tuple[str, ...] = ("samplers", "rewards") if spreads else ("samplers",)
        self.settings = settings
        self._dataset = dataset
        self._hash = hashlib.sha256()
        self._samplers: set[str] = set()
        self._groups, self._groups_left, self._responses, self._responses_left = 0, 0, 0, 0

    @property
    def sha256(self) -> str:
        """Hash of the responses selected so far."""
        return self._hash.hexdigest()

    def keep(self, rows: SelectedRows) -> SelectedRows:
        """The rows that keep two responses or more, with only these responses."""
        names = column_array(rows.stored, "samplers").flatten()
        self._samplers.update(names.unique().to_pylist())
        index = choose(rows.table, self.settings).at_least(MIN_GROUP_SIZE)
        self._groups += len(rows.numbers)
        self._groups_left += len(index.first)
        self._responses += pc.sum(pc.list_value_length(rows.table.column("samplers"))).as_py() or 0
        self._responses_left += len(index.rows)
        header = np.array([rows.row_group, len(index.rows)])
        for numbers in (header, rows.numbers[index.rows], index.items):
            self._hash.update(np.ascontiguousarray(numbers, dtype="<i8").tobytes())
        return replace(
            rows, numbers=rows.numbers[index.first], table=take_all_columns(rows.table, index)
        )

    def note(self) -> str:
        """The number of selected responses, and of groups with too few of them."""
        said = response_summary(self.settings)
        check_sampler_patterns(self.settings.samplers, self._samplers, self._dataset.root)
        if self._groups and not self._groups_left:
            raise ConfigError(
                f"a selected group keeps at least {MIN_GROUP_SIZE} responses",
                received=f"responses {said}: none of {self._groups:,} groups does",
                remedy="loosen responses",
                file=self._dataset.root,
            )
        few = self._groups - self._groups_left
        fallen = f"; {few:,} groups are left out, with fewer than two" if few else ""
        return f"responses {said}: {self._responses_left:,} of {self._responses:,}{fallen}"


class UnequalRewardsCondition:
    """Different rewards among the selected responses."""

    columns: tuple[str, ...] = ("rewards",)

    def __init__(self, dataset: GroupDataset) -> None:
        _check_rewards(dataset, "drop_equal_rewards")
        self._n_equal = 0

    def keep(self, rows: SelectedRows) -> SelectedRows:
        """The rows whose rewards differ."""
        lists = split_list(column_array(rows.table, "rewards"))
        mask = np.array([row.max() > row.min() for row in lists], dtype=bool)
        self._n_equal += len(mask) - int(mask.sum())
        return rows.only(mask)

    def note(self) -> str:
        """The number of groups that are left out."""
        return f"drop_equal_rewards: {self._n_equal:,} groups left out"


def _check_rewards(dataset: GroupDataset, setting: str) -> None:
    if not dataset.rewards:
        raise ConfigError(
            "a selection by rewards needs a dataset with rewards",
            received=setting,
            remedy="open the dataset with a reward",
            file=dataset.root,
        )
