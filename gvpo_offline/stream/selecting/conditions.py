"""What a group must fulfil to take part: conditions, one after the other, each with its counts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gvpo_offline.errors import ConfigError
from gvpo_offline.hashing import splitmix64, text_keys
from gvpo_offline.rules import MIN_GROUP_SIZE
from gvpo_offline.store.arrow import column_array, split_list
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.stream.selecting.predicate import shown
from gvpo_offline.stream.selecting.responses import (
    check_patterns,
    choose,
    described,
    take_all_columns,
)
from gvpo_offline.stream.selecting.where import nothing_selected, truths
from gvpo_offline.stream.settings import ResponseSettings

if TYPE_CHECKING:
    import polars as pl

# Shards are ordered by the plain hash of the id; without this the held-out groups would be the
# first ones of the dataset.
_HELD_OUT_KEY = np.uint64(0x48454C444F555421)
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Rows:
    """What is left of a row group.

    Attributes:
        row_group: its number.
        stored: summary columns of all of its rows.
        numbers: (n,) int64, the rows that are left.
        table: the columns of these, with the responses that are left.
    """

    row_group: int
    stored: pa.Table
    numbers: npt.NDArray[np.int64]
    table: pa.Table

    @classmethod
    def whole(cls, row_group: int, stored: pa.Table) -> Rows:
        """All rows of a row group."""
        return cls(row_group, stored, np.arange(stored.num_rows, dtype=np.int64), stored)

    def only(self, mask: BoolArray) -> Rows:
        """Those of the rows that are left for which a (n,) mask is true."""
        return replace(self, numbers=self.numbers[mask], table=self.table.filter(pa.array(mask)))


class Condition(Protocol):
    """Something that groups must fulfil. It sees every row group once, in order.

    Attributes:
        columns: the summary columns that it looks at.
    """

    columns: tuple[str, ...]

    def keep(self, rows: Rows) -> Rows:
        """The rows that fulfil it."""

    def note(self) -> str | None:
        """What came of it, in a line for people; None: nothing to say.

        Raises:
            ConfigError: it left nothing.
        """


class Where:
    """A predicate on groups as they are stored. Comes first; it reads what it names for itself."""

    columns: tuple[str, ...] = ()

    def __init__(self, dataset: GroupDataset, where: str | pl.Expr) -> None:
        self._dataset = dataset
        self._where = where
        self._truths = truths(dataset, where)
        self._n_true = self._n_null = 0

    def keep(self, rows: Rows) -> Rows:
        """The rows of which the predicate is true."""
        mask, n_null = next(self._truths)
        self._n_true += int(mask.sum())
        self._n_null += n_null
        return rows.only(mask)

    def note(self) -> str:
        """How many groups it is true of, and how many null."""
        total, n_null = self._dataset.n_groups, self._n_null
        if not self._n_true:
            raise nothing_selected(self._where, total, n_null, self._dataset.root)
        null = f"; for {n_null:,} it is null, and they are left out" if n_null else ""
        return f"where {shown(self._where)}: {self._n_true:,} of {total:,} groups{null}"


def held_out_mask(group_ids: list[str], fraction: float) -> BoolArray:
    """Which groups belong to the held-out `fraction`: (n,) bool, by a hash of the id alone.

    The same group is held out in every run, whatever its seed, and in every later version of the
    dataset.
    """
    hashes = splitmix64(text_keys(group_ids) ^ _HELD_OUT_KEY)
    return np.asarray(hashes.astype(np.float64) < fraction * 2.0**64)


class HeldOut:
    """The held-out fraction, or all other groups."""

    columns: tuple[str, ...] = ("group_id",)

    def __init__(self, fraction: float, *, held_out: bool) -> None:
        self._fraction = fraction
        self._held_out = held_out

    def keep(self, rows: Rows) -> Rows:
        """The rows on one side of the split."""
        ids = rows.table.column("group_id").to_pylist()
        return rows.only(held_out_mask(ids, self._fraction) == self._held_out)

    def note(self) -> None:
        """Nothing: the counts of both sides are shown anyway."""


class Responses:
    """Enough responses of those that are asked for."""

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
        """Hash of the chosen responses so far."""
        return self._hash.hexdigest()

    def keep(self, rows: Rows) -> Rows:
        """The rows that keep two responses or more, and no others than these responses."""
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
        """How many responses are left, and how many groups had too few."""
        said = described(self.settings)
        check_patterns(self.settings.samplers, self._samplers, self._dataset.root)
        if self._groups and not self._groups_left:
            raise ConfigError(
                f"a group that takes part keeps at least {MIN_GROUP_SIZE} responses",
                received=f"responses {said}: none of {self._groups:,} groups does",
                remedy="loosen responses",
                file=self._dataset.root,
            )
        few = self._groups - self._groups_left
        fallen = f"; {few:,} groups fall out, left with fewer than two" if few else ""
        return f"responses {said}: {self._responses_left:,} of {self._responses:,}{fallen}"


class UnequalRewards:
    """More than one reward among the responses that are left."""

    columns: tuple[str, ...] = ("rewards",)

    def __init__(self, dataset: GroupDataset) -> None:
        _check_rewards(dataset, "drop_equal_rewards")
        self._n_equal = 0

    def keep(self, rows: Rows) -> Rows:
        """The rows whose rewards differ."""
        lists = split_list(column_array(rows.table, "rewards"))
        mask = np.array([row.max() > row.min() for row in lists], dtype=bool)
        self._n_equal += len(mask) - int(mask.sum())
        return rows.only(mask)

    def note(self) -> str:
        """How many groups are left out."""
        return f"drop_equal_rewards: {self._n_equal:,} groups left out"


def _check_rewards(dataset: GroupDataset, setting: str) -> None:
    if not dataset.rewards:
        raise ConfigError(
            "to choose by rewards, a dataset has rewards",
            received=setting,
            remedy="open the dataset with a reward",
            file=dataset.root,
        )
