"""Counts of a dataset's groups, in one pass over its summary columns and constant memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gvpo_offline.errors import DataError
from gvpo_offline.rules import impossible_logprobs
from gvpo_offline.store.arrow import column_array
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.row_groups import PrefetchedRowGroups, summary_columns
from gvpo_offline.store.schema import SUMMARY_COLUMNS

# Reward gaps are counted in logarithmic bins: constant memory for any number of groups.
_BINS_PER_DECADE = 100
_LOWEST_DECADE = -9
_N_BINS = 24 * _BINS_PER_DECADE
Progress = Callable[[Iterable[int]], Iterable[int]]
SummaryRows = tuple[pa.Table, npt.NDArray[np.int64] | None]


@dataclass
class Survey:
    """Counts over some groups of a dataset.

    Attributes:
        group_sizes: groups per number of responses.
        prompt_lengths, response_lengths: prompts, and responses, per length in tokens.
        samplers, sampler_tokens, sampler_truncated: responses, their tokens, and truncated
            responses, per sampler.
        sampler_rewards: sum of rewards per sampler; empty if the dataset has no rewards.
        equal_reward_groups: groups whose responses all have one reward. They take part in training:
            their target is the reference.
        lowest_reward_groups: those of them whose reward is the lowest of all groups.
        reward_range: lowest and highest reward; (inf, -inf) if there is none.
        gap_bins: histogram of max reward - min reward of the groups with unequal rewards.
        max_group_tokens: tokens of the largest group, its prompt counted once.
        max_row_tokens: the longest prompt with one of its responses.
        longest_row: row group, row within it and id of the group where that is.
        sampler_unrewarded: responses without a reward, per sampler, which a partial reward has.
            Groups with one are not among the counts and ranges of rewards above, and these
            responses add nothing to `sampler_rewards`.
        unrewarded_groups, first_unrewarded: as of `unscored_groups`.
        unscored_responses: responses without a reference log-prob, which a reference of a selection
            or a partial one may leave out; 0 if the dataset has no reference.
        unscored_groups: groups with at least one such response.
        first_unscored: row group, row within it and id of the first such group; None: no group.
        first_impossible: the same of the first group with a reference log-prob that no model gives.
    """

    group_sizes: Counter[int] = field(default_factory=Counter)
    prompt_lengths: Counter[int] = field(default_factory=Counter)
    response_lengths: Counter[int] = field(default_factory=Counter)
    samplers: Counter[str] = field(default_factory=Counter)
    sampler_tokens: Counter[str] = field(default_factory=Counter)
    sampler_truncated: Counter[str] = field(default_factory=Counter)
    sampler_rewards: Counter[str] = field(default_factory=Counter)
    equal_reward_groups: int = 0
    lowest_reward_groups: int = 0
    reward_range: tuple[float, float] = (math.inf, -math.inf)
    gap_bins: npt.NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(_N_BINS, dtype=np.int64)
    )
    max_group_tokens: int = 0
    max_row_tokens: int = 0
    longest_row: tuple[int, int, str] = (0, 0, "")
    sampler_unrewarded: Counter[str] = field(default_factory=Counter)
    unrewarded_groups: int = 0
    first_unrewarded: tuple[int, int, str] | None = None
    unscored_responses: int = 0
    unscored_groups: int = 0
    first_unscored: tuple[int, int, str] | None = None
    first_impossible: tuple[int, int, str] | None = None

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return self.group_sizes.total()

    @property
    def n_responses(self) -> int:
        """Number of responses."""
        return self.samplers.total()

    @property
    def n_tokens(self) -> int:
        """Number of tokens, each prompt counted once."""
        prompts = sum(length * count for length, count in self.prompt_lengths.items())
        return prompts + self.sampler_tokens.total()

    @property
    def truncated_responses(self) -> int:
        """Number of truncated responses."""
        return self.sampler_truncated.total()

    @property
    def unrewarded_responses(self) -> int:
        """Number of responses without a reward."""
        return self.sampler_unrewarded.total()

    @property
    def max_group_size(self) -> int:
        """Responses of the group that has most."""
        return max(self.group_sizes, default=0)

    @property
    def reward_mean(self) -> float:
        """Mean reward of all responses; nan if there is none."""
        n_responses = self.n_responses - self.unrewarded_responses
        return self.sampler_rewards.total() / n_responses if n_responses else math.nan

    @property
    def median_reward_gap(self) -> float:
        """Median of max - min reward over groups of unequal rewards, within 1.2%; NaN if none."""
        total = int(self.gap_bins.sum())
        if total == 0:
            return math.nan
        middle = [(total + 1) // 2, total // 2 + 1]  # the same one if the total is odd
        bins = np.searchsorted(np.cumsum(self.gap_bins), middle)
        return float(np.mean(10.0 ** (_LOWEST_DECADE + (bins + 0.5) / _BINS_PER_DECADE)))

    def gaps_above(self, bound: float) -> int:
        """Groups whose max - min reward is above `bound` > 0, to within the 2.3% of a bin."""
        if not math.isfinite(bound):
            return 0
        first = math.ceil((math.log10(bound) - _LOWEST_DECADE) * _BINS_PER_DECADE)
        return int(self.gap_bins[min(max(first, 0), _N_BINS) :].sum())

    def __add__(self, other: Survey) -> Survey:
        """Counts over the groups of both."""
        # The first of several longest rows, as in a single pass.
        first = min(self, other, key=lambda own: (-own.max_row_tokens, own.longest_row))
        (low, high), (other_low, other_high) = self.reward_range, other.reward_range
        counters = {
            name: _summed(mine, getattr(other, name))
            for name, mine in vars(self).items()
            if isinstance(mine, Counter)
        }
        return Survey(
            **counters,
            equal_reward_groups=self.equal_reward_groups + other.equal_reward_groups,
            lowest_reward_groups=self.lowest_reward_groups * (low <= other_low)
            + other.lowest_reward_groups * (other_low <= low),
            reward_range=(min(low, other_low), max(high, other_high)),
            gap_bins=self.gap_bins + other.gap_bins,
            max_group_tokens=max(self.max_group_tokens, other.max_group_tokens),
            max_row_tokens=first.max_row_tokens,
            longest_row=first.longest_row,
            unrewarded_groups=self.unrewarded_groups + other.unrewarded_groups,
            first_unrewarded=_first(self.first_unrewarded, other.first_unrewarded),
            unscored_responses=self.unscored_responses + other.unscored_responses,
            unscored_groups=self.unscored_groups + other.unscored_groups,
            first_unscored=_first(self.first_unscored, other.first_unscored),
            first_impossible=_first(self.first_impossible, other.first_impossible),
        )

    def add(
        self, table: pa.Table, row_group: int = 0, rows: npt.NDArray[np.int64] | None = None
    ) -> None:
        """Count the rows of a table with the summary columns and, optionally, rewards.

        Args:
            table: some rows of a row group.
            row_group: its number.
            rows: (n,) their row numbers in the row group; None: all of its rows.
        """
        lengths, starts = _flat(table, "response_lengths")
        prompts = table.column("prompt_length").to_numpy()
        _count(self.group_sizes, np.diff(starts, append=len(lengths)))
        _count(self.prompt_lengths, prompts)
        _count(self.response_lengths, lengths)
        tokens = prompts + np.add.reduceat(lengths, starts, dtype=np.int64)
        longest = prompts + np.maximum.reduceat(lengths, starts).astype(np.int64)
        self.max_group_tokens = max(self.max_group_tokens, int(tokens.max(initial=0)))
        if longest.max(initial=0) > self.max_row_tokens:
            self.max_row_tokens = int(longest.max())
            at = int(longest.argmax())
            row = at if rows is None else int(rows[at])
            self.longest_row = (row_group, row, table.column("group_id")[at].as_py())
        encoded = column_array(table, "samplers").flatten().dictionary_encode()
        names, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()

        def per_sampler(values: npt.NDArray[Any] | None = None) -> dict[str, Any]:
            sums = np.bincount(codes, weights=values, minlength=len(names))
            return dict(zip(names, sums.tolist(), strict=True))

        self.samplers.update(per_sampler())
        cut = column_array(table, "truncated").flatten().fill_null(False)
        for counter, values in (
            (self.sampler_tokens, lengths),
            (self.sampler_truncated, cut.to_numpy(zero_copy_only=False)),
        ):  # sums of integers below 2^53, which float64 holds exactly
            counter.update({name: int(total) for name, total in per_sampler(values).items()})
        if "rewards" in table.column_names:
            rewards, starts = _flat(table, "rewards")
            absent = np.isnan(rewards)
            if absent.any():
                self.sampler_unrewarded.update(
                    {name: int(n) for name, n in per_sampler(absent).items() if n}
                )
            self.sampler_rewards.update(per_sampler(np.where(absent, 0.0, rewards)))
            self._add_rewards(table, row_group, rows, rewards, starts)
        if "ref_seq_logprobs" in table.column_names:
            self._add_unscored(table, row_group, rows)

    def _add_rewards(
        self,
        table: pa.Table,
        row_group: int,
        rows: npt.NDArray[np.int64] | None,
        rewards: npt.NDArray[np.float64],
        starts: npt.NDArray[np.int64],
    ) -> None:
        """Count the rewards of the groups in which every response has one."""
        absent = np.add.reduceat(np.isnan(rewards), starts, dtype=np.int64)
        self.unrewarded_groups += int(np.count_nonzero(absent))
        self.first_unrewarded = self.first_unrewarded or _first_of(absent, table, row_group, rows)
        whole = absent == 0
        if whole.any():
            best = np.maximum.reduceat(rewards, starts)[whole]
            worst = np.minimum.reduceat(rewards, starts)[whole]
            low, high = self.reward_range
            self.reward_range = min(low, float(worst.min())), max(high, float(best.max()))
            lowest = int((best == self.reward_range[0]).sum())
            self.lowest_reward_groups *= low == self.reward_range[0]
            self.lowest_reward_groups += lowest
            self._add_gaps(best, worst)

    def _add_unscored(
        self, table: pa.Table, row_group: int, rows: npt.NDArray[np.int64] | None
    ) -> None:
        values, starts = _flat(table, "ref_seq_logprobs")
        missing = np.add.reduceat(np.isnan(values), starts, dtype=np.int64)
        self.unscored_responses += int(missing.sum())
        self.unscored_groups += int(np.count_nonzero(missing))

        wrong = impossible_logprobs(values, _flat(table, "response_lengths")[0])
        self.first_unscored = self.first_unscored or _first_of(missing, table, row_group, rows)
        self.first_impossible = self.first_impossible or _first_of(
            np.add.reduceat(wrong, starts, dtype=np.int64), table, row_group, rows
        )

    def _add_gaps(self, best: npt.NDArray[np.float64], worst: npt.NDArray[np.float64]) -> None:
        with np.errstate(over="ignore"):  # an infinite gap counts in the last bin
            gaps = best - worst
        unequal = gaps[gaps > 0]
        self.equal_reward_groups += len(gaps) - len(unequal)
        bins = np.floor((np.log10(unequal) - _LOWEST_DECADE) * _BINS_PER_DECADE)
        np.add.at(self.gap_bins, np.clip(bins, 0, _N_BINS - 1).astype(int), 1)


def _first_of(
    flags: npt.NDArray[Any],
    table: pa.Table,
    row_group: int,
    rows: npt.NDArray[np.int64] | None,
) -> tuple[int, int, str] | None:
    """Row group, row within it and id of the first row with a flag; None if there is none."""
    at = np.flatnonzero(flags)
    if not len(at):
        return None
    row = int(at[0] if rows is None else rows[at[0]])
    return row_group, row, table.column("group_id")[int(at[0])].as_py()


def _first(
    one: tuple[int, int, str] | None, other: tuple[int, int, str] | None
) -> tuple[int, int, str] | None:
    return min(filter(None, [one, other]), default=None)


def _summed(one: Counter[Any], other: Counter[Any]) -> Counter[Any]:
    # Not by +, which drops entries that are not positive.
    both = one.copy()
    both.update(other)
    return both


def _count(counter: Counter[int], values: npt.NDArray[Any]) -> None:
    distinct, counts = np.unique(values, return_counts=True)
    counter.update(dict(zip(distinct.tolist(), counts.tolist(), strict=True)))


def _flat(table: pa.Table, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """The values of a list column, and the offset of each row; DataError if a row has none."""
    column = column_array(table, name)
    sizes = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    if not sizes.all():
        raise DataError(
            f"a group has at least one response, and {name} one value for each",
            received="none",
            remedy="leave the group out of the log",
            group=table.column("group_id")[int(sizes.argmin())].as_py(),
        )
    return column.flatten().to_numpy(zero_copy_only=False), np.cumsum(sizes) - sizes


def summary_table(dataset: GroupDataset, row_group: int) -> pa.Table:
    """The summary columns of a row group, with rewards and reference log-probs where joined.

    Lengths that a file does not store are computed from its tokens, which is slower.
    """
    return summary_columns(dataset, row_group, [*SUMMARY_COLUMNS, "rewards", "ref_seq_logprobs"])


def survey(
    dataset: GroupDataset,
    summary: Callable[[int], SummaryRows] | None = None,
    progress: Progress | None = None,
    part: slice = slice(None),
) -> Survey:
    """Count a dataset, or the rows that `summary(row_group)` returns.

    Args:
        dataset: the dataset.
        summary: summary columns of some rows of a row group, and their numbers (None: all rows).
        progress: wraps the row group numbers.
        part: slice of the row groups.

    Raises:
        IntegrityError, DataError: as `GroupDataset.table`; every reward and reference log-prob is
            read, so that errors in them are raised before training.
    """
    result = Survey()
    numbers: Iterable[int] = PrefetchedRowGroups(
        dataset, [*SUMMARY_COLUMNS, "rewards", "ref_seq_logprobs"], part
    )
    for row_group in progress(numbers) if progress else numbers:
        table, rows = summary(row_group) if summary else (summary_table(dataset, row_group), None)
        if table.num_rows:
            result.add(table, row_group, rows)
    return result
