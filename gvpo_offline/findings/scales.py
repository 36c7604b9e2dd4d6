"""Rewards of several scales in one dataset, and rewards that are times."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from gvpo_offline.findings.batch import Batch, Floats, Ints
from gvpo_offline.store.arrow import as_numpy

FEW_RESPONSES = 30
"""A sampler with fewer responses may have one reward for all of them by chance."""
K = TypeVar("K", bound=Hashable)
_MOST_SOURCES = 4096
# The largest reward of a scale is at most this multiple of the mean one: otherwise a few outliers
# make the range, and the rule reward-outliers is about them.
_TAIL = 20
_SINCE, _UNTIL = 946_684_800, 4_102_444_800  # 2000 and 2100 in seconds since 1970


@dataclass
class Scale:
    """Rewards of one sampler, or of one source.

    Attributes:
        count: responses.
        total: sum of the rewards.
        low, high: the smallest and the largest reward.
    """

    count: int = 0
    total: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    @property
    def largest(self) -> float:
        """The largest absolute reward."""
        return max(abs(self.low), abs(self.high))

    @property
    def judged(self) -> bool:
        """Whether there are enough different rewards, and not only outliers."""
        varied = self.count >= FEW_RESPONSES and math.isfinite(self.total) and self.low < self.high
        return varied and abs(self.total / self.count) * _TAIL >= self.largest

    def outside(self, other: Scale) -> bool:
        """Whether the mean lies outside the rewards of `other`, also if they spread three times as
        far."""
        span, mean = other.high - other.low, self.total / self.count
        return not other.low - span <= mean <= other.high + span


def add_scales(scales: dict[K, Scale], keys: Sequence[K], codes: Ints, rewards: Floats) -> None:
    """Count (N,) rewards by (N,) codes, which are indices into `keys`."""
    order = np.argsort(codes, kind="stable")
    present, starts, counts = np.unique(codes[order], return_index=True, return_counts=True)
    own = rewards[order]
    with np.errstate(over="ignore", invalid="ignore"):
        totals = np.add.reduceat(own, starts)
    lows, highs = np.minimum.reduceat(own, starts), np.maximum.reduceat(own, starts)
    for code, count, total, low, high in zip(
        *(each.tolist() for each in (present, counts, totals, lows, highs)), strict=True
    ):
        scale = scales.setdefault(keys[code], Scale())
        scale.count, scale.total = scale.count + count, scale.total + total
        scale.low, scale.high = min(scale.low, low), max(scale.high, high)


@dataclass
class SourceScales:
    """Rewards by the source of the group."""

    scales: dict[str, Scale] = field(default_factory=dict)

    def add(self, batch: Batch, rewards: Floats) -> None:
        """Count a batch, with its (N,) rewards."""
        if "source" not in batch.table.column_names or len(self.scales) > _MOST_SOURCES:
            return
        encoded = batch.table.column("source").combine_chunks().dictionary_encode()
        keys = [*encoded.dictionary.to_pylist(), "unknown"]
        codes = as_numpy(encoded.indices.fill_null(len(keys) - 1)).astype(np.int64)
        add_scales(self.scales, keys, np.repeat(codes, batch.sizes), rewards)


def two_scales(scales: Mapping[str, Scale], ratio: float) -> tuple[str, str] | None:
    """The names of a small and a large scale, whose largest rewards differ by more than `ratio`.

    None if there are none. The mean reward of the large one lies outside the rewards of the small
    one. Scales of fewer than 30 responses, of one reward, and of a few outliers are not compared.
    """
    judged = sorted(
        ((key, scale) for key, scale in scales.items() if scale.judged),
        key=lambda each: each[1].largest,
    )
    if not judged:
        return None
    (small, least), (large, most) = judged[0], judged[-1]
    if most.largest > ratio * least.largest and most.outside(least):
        return small, large
    return None


def are_times(low: float, high: float) -> bool:
    """Whether rewards from `low` to `high` look like times: (milli)seconds since 1970, of this
    century."""
    return any(_SINCE * unit <= low <= high <= _UNTIL * unit for unit in (1, 1000))
