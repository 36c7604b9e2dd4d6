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
from gvpo_offline.store.arrow import column_array
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.light import summary_columns
from gvpo_offline.store.passes import PrefetchedRowGroups
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
        n_groups, n_responses, n_tokens: totals; each group's prompt tokens are counted once.
        equal_reward_groups: groups whose responses all have the same reward. Training uses them:
            their target is the reference.
        truncated_responses: number of truncated responses.
        samplers: number of responses per sampler.
        sampler_rewards: sum of rewards per sampler.
        max_group_size, max_group_tokens: the largest group in responses and in tokens, the prompt
            counted once.
        max_row_tokens: largest number of tokens of a prompt and one of its responses.
        longest_row: row group, row within it, and group id of `max_row_tokens`.
        gap_bins: histogram of max - min reward over groups of unequal rewards.
    """

    n_groups: int = 0
    n_responses: int = 0
    n_tokens: int = 0
    equal_reward_groups: int = 0
    truncated_responses: int = 0
    samplers: Counter[str] = field(default_factory=Counter)
    sampler_rewards: Counter[str] = field(default_factory=Counter)
    max_group_size: int = 0
    max_group_tokens: int = 0
    max_row_tokens: int = 0
    longest_row: tuple[int, int, str] = (0, 0, "")
    gap_bins: npt.NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(_N_BINS, dtype=np.int64)
    )

    @property
    def median_reward_gap(self) -> float:
        """Median of max - min reward over groups of unequal rewards, within 1.2%; NaN if none."""
        total = int(self.gap_bins.sum())
        if total == 0:
            return math.nan
        middle = [(total + 1) // 2, total // 2 + 1]  # the same one if the total is odd
        bins = np.searchsorted(np.cumsum(self.gap_bins), middle)
        return float(np.mean(10.0 ** (_LOWEST_DECADE + (bins + 0.5) / _BINS_PER_DECADE)))

    def __add__(self, other: Survey) -> Survey:
        """Counts over the groups of both."""
        # The first of several longest rows, as in a single pass.
        first = min(self, other, key=lambda own: (-own.max_row_tokens, own.longest_row))
        return Survey(
            n_groups=self.n_groups + other.n_groups,
            n_responses=self.n_responses + other.n_responses,
            n_tokens=self.n_tokens + other.n_tokens,
            equal_reward_groups=self.equal_reward_groups + other.equal_reward_groups,
            truncated_responses=self.truncated_responses + other.truncated_responses,
            samplers=_summed(self.samplers, other.samplers),
            sampler_rewards=_summed(self.sampler_rewards, other.sampler_rewards),
            max_group_size=max(self.max_group_size, other.max_group_size),
            max_group_tokens=max(self.max_group_tokens, other.max_group_tokens),
            max_row_tokens=first.max_row_tokens,
            longest_row=first.longest_row,
            gap_bins=self.gap_bins + other.gap_bins,
        )

    def add(
        self, table: pa.Table, row_group: int = 0, rows: npt.NDArray[np.int64] | None = None
    ) -> None:
        """Count the rows of a table with the summary columns and, optionally, rewards.

        Args:
            table: some rows of a row group.
            row_group: number of the row group.
            rows: numbers of the rows within the row group; None: all.
        """
        lengths, starts = _flat(table, "response_lengths")
        sizes = np.diff(starts, append=len(lengths))
        prompts = table.column("prompt_length").to_numpy()
        self.n_groups += table.num_rows
        self.n_responses += int(sizes.sum())
        self.max_group_size = max(self.max_group_size, int(sizes.max(initial=0)))
        tokens = prompts + np.add.reduceat(lengths, starts, dtype=np.int64)
        longest = prompts + np.maximum.reduceat(lengths, starts).astype(np.int64)
        self.n_tokens += int(tokens.sum())
        self.max_group_tokens = max(self.max_group_tokens, int(tokens.max(initial=0)))
        if longest.max(initial=0) > self.max_row_tokens:
            self.max_row_tokens = int(longest.max())
            at = int(longest.argmax())
            row = at if rows is None else int(rows[at])
            self.longest_row = (row_group, row, table.column("group_id")[at].as_py())
        samplers = column_array(table, "samplers").flatten().dictionary_encode()
        names, codes = samplers.dictionary.to_pylist(), samplers.indices.to_numpy()
        self.samplers.update(dict(zip(names, np.bincount(codes).tolist(), strict=True)))
        self.truncated_responses += int(
            pc.sum(pc.list_flatten(table.column("truncated"))).as_py() or 0
        )
        if "rewards" in table.column_names:
            rewards, starts = _flat(table, "rewards")
            self._add_gaps(
                np.maximum.reduceat(rewards, starts), np.minimum.reduceat(rewards, starts)
            )
            sums = np.bincount(codes, weights=rewards)
            for name, reward in zip(names, sums, strict=True):
                self.sampler_rewards[name] += float(reward)  # type: ignore[assignment]

    def _add_gaps(self, best: npt.NDArray[np.float64], worst: npt.NDArray[np.float64]) -> None:
        with np.errstate(over="ignore"):  # an infinite gap counts in the last bin
            gaps = best - worst
        unequal = gaps[gaps > 0]
        self.equal_reward_groups += len(gaps) - len(unequal)
        bins = np.floor((np.log10(unequal) - _LOWEST_DECADE) * _BINS_PER_DECADE)
        np.add.at(self.gap_bins, np.clip(bins, 0, _N_BINS - 1).astype(int), 1)


def _summed(one: Counter[str], other: Counter[str]) -> Counter[str]:
    # Not by +, which drops counts that are not positive.
    both = one.copy()
    both.update(other)
    return both


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
