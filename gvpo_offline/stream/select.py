"""Which groups train and which are held out, and with which of their responses."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gvpo_offline.errors import ConfigError
from gvpo_offline.hashing import splitmix64, text_keys
from gvpo_offline.rules import MIN_GROUP_SIZE
from gvpo_offline.schema import column_array, split_list
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.light import light_columns
from gvpo_offline.stream.config import ResponseSettings
from gvpo_offline.stream.order import Selection
from gvpo_offline.stream.responses import check_patterns, choose, described, takes_all, with_pick
from gvpo_offline.stream.where import Truths, nothing_selected, truths

if TYPE_CHECKING:
    import polars as pl

# Shards are ordered by the plain hash of the id; without this the held-out groups would be the
# first ones of the dataset.
_HELD_OUT_KEY = np.uint64(0x48454C444F555421)
_ALL = ResponseSettings()


def held_out_mask(group_ids: list[str], fraction: float) -> npt.NDArray[np.bool_]:
    """Which groups belong to the held-out `fraction`: (n,) bool, by a hash of the id alone.

    The same group is held out in every run, whatever its seed, and in every later version of the
    dataset.
    """
    hashes = splitmix64(text_keys(group_ids) ^ _HELD_OUT_KEY)
    return np.asarray(hashes.astype(np.float64) < fraction * 2.0**64)


def select(
    dataset: GroupDataset,
    *,
    where: str | pl.Expr | None = None,
    responses: ResponseSettings = _ALL,
    eval_fraction: float = 0.0,
    held_out: bool = False,
    drop_equal_rewards: bool = False,
) -> Selection | None:
    """The groups of a dataset to train on, or (`held_out`) those kept for evaluation.

    A function of its arguments and the dataset's content alone. The result is small and can be
    pickled, so one process can resolve it for all.

    Args:
        dataset: with rewards where a condition needs them.
        where: only groups for which this holds; see docs/selecting.md. It is asked of groups as
            they are stored, before any of their responses are left out.
        responses: which of their responses take part; a group that is left with fewer than two
            falls out.
        eval_fraction, held_out: of those, the groups that are held out, or all others.
        drop_equal_rewards: leave out groups whose remaining responses all have one reward.

    Returns:
        None where that is all groups, whole.

    Raises:
        ConfigError: the predicate breaks a rule of `truths`, or it or `responses` leave nothing.
        DataError, IntegrityError: as `GroupDataset.table`.
    """
    if where is None and takes_all(responses) and not eval_fraction and not drop_equal_rewards:
        return None
    resolving = _Resolving(
        dataset,
        responses,
        eval_fraction=eval_fraction,
        held_out=held_out,
        drop_equal_rewards=drop_equal_rewards,
    )
    if where is not None:
        resolving.truths = truths(dataset, where)
    selection = Selection(dataset.row_group_sizes, resolving.mask)
    if not takes_all(responses):
        selection.responses = responses
        selection.responses_sha256 = resolving.responses_sha256
    selection.notes = resolving.notes(where)
    return selection


class _Resolving:
    """One pass over the light columns of a dataset, row group by row group, and what it counts."""

    def __init__(
        self,
        dataset: GroupDataset,
        responses: ResponseSettings,
        *,
        eval_fraction: float,
        held_out: bool,
        drop_equal_rewards: bool,
    ) -> None:
        self.truths: Iterator[Truths] | None = None
        self._dataset = dataset
        self._settings = responses
        self._chooses = not takes_all(responses)
        self._fraction = eval_fraction
        self._held_out = held_out
        self._drops_equal = drop_equal_rewards
        self._columns = _columns(dataset, responses, self._chooses, drop_equal_rewards)
        self._hash = hashlib.sha256()
        self._samplers: set[str] = set()
        self._n_true = self._n_null = self._n_equal = 0
        self._n_before = self._n_after = 0  # groups, before and after choosing responses
        self._responses_before = self._responses_after = 0

    @property
    def responses_sha256(self) -> str:
        """Hash of the chosen responses so far."""
        return self._hash.hexdigest()

    def mask(self, row_group: int) -> npt.NDArray[np.bool_]:
        """Which groups of a row group take part: (n,) bool."""
        mask = np.ones(int(self._dataset.row_group_sizes[row_group]), dtype=bool)
        if self.truths is not None:
            mask, n_null = next(self.truths)
            self._n_true += int(mask.sum())
            self._n_null += n_null
        if not (self._chooses or self._fraction or self._drops_equal):
            return mask
        table = light_columns(self._dataset, row_group, self._columns)
        if self._chooses:
            self._samplers.update(column_array(table, "samplers").flatten().unique().to_pylist())
        if self._fraction:
            ids = table.column("group_id").to_pylist()
            mask = mask & (held_out_mask(ids, self._fraction) == self._held_out)
        rows = np.flatnonzero(mask)
        if self._chooses:
            rows, table = self._choose(row_group, rows, table.take(pa.array(rows)))
        elif self._drops_equal:
            table = table.take(pa.array(rows))
        if self._drops_equal:
            unequal = _unequal(table)
            self._n_equal += len(rows) - int(unequal.sum())
            rows = rows[unequal]
        mask = np.zeros(len(mask), dtype=bool)
        mask[rows] = True
        return mask

    def _choose(
        self, row_group: int, rows: npt.NDArray[np.int64], table: pa.Table
    ) -> tuple[npt.NDArray[np.int64], pa.Table]:
        """The rows that keep enough responses, and what they keep."""
        pick = choose(table, self._settings).at_least(MIN_GROUP_SIZE)
        self._n_before += len(rows)
        self._n_after += len(pick.first)
        self._responses_before += len(column_array(table, "samplers").flatten())
        self._responses_after += len(pick.rows)
        for numbers in (np.array([row_group, len(pick.rows)]), rows[pick.rows], pick.items):
            self._hash.update(np.ascontiguousarray(numbers, dtype="<i8").tobytes())
        return rows[pick.first], with_pick(table, pick)

    def notes(self, where: str | pl.Expr | None) -> tuple[str, ...]:
        """What came of each condition.

        Raises:
            ConfigError: one of them left nothing, or a sampler that it names is none.
        """
        notes = []
        total = self._dataset.n_groups
        if where is not None:
            if not self._n_true:
                raise nothing_selected(where, total, self._n_null, self._dataset.root)
            null = f"; for {self._n_null:,} it is null, and they are left out"
            notes.append(
                f"where {' '.join(str(where).split())}: {self._n_true:,} of {total:,} groups"
                + (null if self._n_null else "")
            )
        if self._chooses:
            said = described(self._settings)
            check_patterns(self._settings.samplers, self._samplers, self._dataset.root)
            few = self._n_before - self._n_after
            if self._n_before and not self._n_after:
                raise ConfigError(
                    f"a group that takes part keeps at least {MIN_GROUP_SIZE} responses",
                    received=f"responses {said}: none of {self._n_before:,} groups does",
                    remedy="loosen responses",
                    file=self._dataset.root,
                )
            notes.append(
                f"responses {said}: {self._responses_after:,} of {self._responses_before:,}"
                + (f"; {few:,} groups fall out, left with fewer than two" if few else "")
            )
        if self._drops_equal:
            notes.append(f"drop_equal_rewards: {self._n_equal:,} groups left out")
        return tuple(notes)


def _columns(
    dataset: GroupDataset, responses: ResponseSettings, chooses: bool, drops_equal: bool
) -> Sequence[str]:
    needs_rewards = drops_equal or responses.prefer == "spread"
    if needs_rewards and not dataset.rewards:
        raise ConfigError(
            "to choose by rewards, a dataset has rewards",
            received="prefer: spread" if responses.prefer == "spread" else "drop_equal_rewards",
            remedy="open the dataset with a reward",
            file=dataset.root,
        )
    return [*(["samplers"] if chooses else []), *(["rewards"] if needs_rewards else [])]


def _unequal(table: pa.Table) -> npt.NDArray[np.bool_]:
    lists = split_list(column_array(table, "rewards"))
    return np.array([row.max() > row.min() for row in lists], dtype=bool)
