"""What the groups of a dataset are like, counted from the summary columns in one pass and in memory
that does not grow with the dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gvpo_offline.report.holding import reward_label
from gvpo_offline.store.choice import WeightedReward
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.survey import summary_table

QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class SamplerContent:
    """What one sampler wrote.

    Attributes:
        responses: how many.
        truncated: of them, those that were cut.
        mean_tokens: their mean length, in tokens.
        mean_rewards: their mean reward, by label.
    """

    responses: int
    truncated: int
    mean_tokens: float
    mean_rewards: dict[str, float]


@dataclass(frozen=True)
class RewardContent:
    """One reward over all responses, and the groups whose responses all have one value of it."""

    mean: float
    min: float
    max: float
    equal_groups: int


@dataclass(frozen=True)
class Content:
    """What the groups are like.

    Attributes:
        samplers: by name.
        rewards: by label.
        group_sizes: groups by their number of responses.
        lengths: of prompts and of responses in tokens: the smallest value that at least a share
            `QUANTILES` of them does not exceed.
    """

    samplers: dict[str, SamplerContent]
    rewards: dict[str, RewardContent]
    group_sizes: dict[int, int]
    lengths: dict[str, list[int]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return {**asdict(self), "quantiles": list(QUANTILES)}


def content(dataset: GroupDataset, progress: Progress | None = None) -> Content:
    """Count a dataset's groups, with every reward that its manifest names.

    Args:
        dataset: opened without rewards and references.
        progress: wraps the row-group numbers.

    Raises:
        IntegrityError, DataError: as `GroupDataset.table`.
    """
    joined = {
        reward_label(family): GroupDataset(
            dataset.storage, dataset.manifest, [WeightedReward(family)]
        )
        for family in dataset.manifest.rewards
    }
    tally = _Tally(list(joined))
    numbers: Iterable[int] = range(dataset.n_row_groups)
    for row_group in progress(numbers) if progress else numbers:
        values = {
            label: _flat(summary_table(one, row_group), "rewards") for label, one in joined.items()
        }
        tally.add(summary_table(dataset, row_group), values)
    return tally.content()


class _Tally:
    """Counts that grow with samplers and lengths, not with groups."""

    def __init__(self, labels: list[str]) -> None:
        self._sizes = _Counts()
        self._lengths = {"prompt": _Counts(), "response": _Counts()}
        # Per sampler: responses, truncated, tokens, then the sum of each reward.
        self._samplers: dict[str, FloatArray] = {}
        self._labels = labels
        self._lowest = dict.fromkeys(labels, np.inf)
        self._highest = dict.fromkeys(labels, -np.inf)
        self._equal = dict.fromkeys(labels, 0)

    def add(self, table: pa.Table, rewards: dict[str, FloatArray]) -> None:
        """Count the groups of one row group; `rewards`: (n responses,) float64 by label."""
        if not table.num_rows:
            return
        sizes = pc.list_value_length(table.column("response_lengths")).to_numpy()
        lengths = _flat(table, "response_lengths")
        self._sizes.add(sizes)
        self._lengths["prompt"].add(table.column("prompt_length").to_numpy())
        self._lengths["response"].add(lengths)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        for label, values in rewards.items():
            low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
            self._lowest[label] = min(self._lowest[label], float(low.min()))
            self._highest[label] = max(self._highest[label], float(high.max()))
            self._equal[label] += int((low == high).sum())
        cut = _flat(table, "truncated")
        numbers = np.stack([np.ones(len(cut)), cut, lengths, *rewards.values()])
        encoded = pc.list_flatten(table.column("samplers")).combine_chunks().dictionary_encode()
        codes = encoded.indices.to_numpy()
        for code, name in enumerate(encoded.dictionary.to_pylist()):
            own = numbers[:, codes == code].sum(axis=1)
            self._samplers[name] = self._samplers.get(name, np.zeros(len(own))) + own

    def content(self) -> Content:
        """What was counted."""
        samplers = {
            name: SamplerContent(
                responses=int(n),
                truncated=int(truncated),
                mean_tokens=float(tokens / n),
                mean_rewards=dict(zip(self._labels, (np.array(sums) / n).tolist(), strict=True)),
            )
            for name, (n, truncated, tokens, *sums) in sorted(self._samplers.items())
        }
        n_responses = sum(each.responses for each in samplers.values())
        rewards = {
            label: RewardContent(
                mean=sum(s.mean_rewards[label] * s.responses for s in samplers.values())
                / n_responses,
                min=float(self._lowest[label]),
                max=float(self._highest[label]),
                equal_groups=self._equal[label],
            )
            for label in (self._labels if n_responses else [])
        }
        sizes = {k: int(n) for k, n in enumerate(self._sizes.counts) if n}
        lengths = {name: counts.quantiles() for name, counts in self._lengths.items()}
        return Content(samplers, rewards, sizes, lengths)


class _Counts:
    """How often each small number occurred."""

    def __init__(self) -> None:
        self.counts: Int64Array = np.zeros(1, np.int64)

    def add(self, values: npt.NDArray[Any]) -> None:
        new = np.bincount(values.astype(np.int64), minlength=len(self.counts))
        new[: len(self.counts)] += self.counts
        self.counts = new

    def quantiles(self) -> list[int]:
        """The smallest number that at least the share q does not exceed, for each of QUANTILES."""
        total = int(self.counts.sum())
        ranks = np.maximum(np.ceil(np.array(QUANTILES) * total), 1)
        return np.searchsorted(np.cumsum(self.counts), ranks).tolist() if total else []


def _flat(table: pa.Table, name: str) -> npt.NDArray[Any]:
    return np.asarray(pc.list_flatten(table.column(name)).to_numpy())
