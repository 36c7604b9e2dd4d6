"""Mixes of several datasets: the dataset of each draw, in closed form.

Draws are divided into cycles with a fixed number of draws of each dataset (its quota). A cycle is
divided into blocks of about a thousand draws, over which the quotas are spread evenly; a
permutation orders the draws of a block. At any draw each dataset's count differs from its exact
share by less than a block, and is computed without the draws before it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from gvpo_offline.errors import ConfigError
from gvpo_offline.hashing import permutation
from gvpo_offline.stream.order import GroupOrder, IndexArray

_BLOCK = 1024
_LONGEST_CYCLE = 1_000_000
_MIX_KEY = 3


def quotas_of(weights: Sequence[float | None], sizes: Sequence[int]) -> list[int]:
    """Draws of each dataset in one cycle.

    Args:
        weights: one per dataset; or None for all: then the quota of each is its number of groups,
            so that a cycle is an epoch of all datasets.
        sizes: groups of each dataset.

    Raises:
        ConfigError: some datasets have a weight and others none, the weights sum to zero, or one of
            them is too small for a draw in the longest cycle.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        return list(sizes)
    if len(given) < len(weights):
        raise ConfigError(
            "either every dataset of a run has a weight or none has",
            received=f"{len(given)} weights for {len(weights)} datasets",
            remedy="add the missing weights, or remove all: then each group has the same weight",
        )
    exact = [Fraction(repr(weight)) for weight in given]
    total = sum(exact)
    if not total:
        raise ConfigError(
            "the weights of a run's datasets sum to more than zero",
            received=given,
            remedy="give at least one dataset a weight above 0",
        )
    whole = [int(weight * math.lcm(*(w.denominator for w in exact))) for weight in exact]
    whole = [count // math.gcd(*whole) for count in whole]
    if sum(whole) <= _LONGEST_CYCLE:
        # Several short cycles are joined: as even, and faster.
        return [count * max(1, _BLOCK // 8 // sum(whole)) for count in whole]
    whole = [int(weight * _LONGEST_CYCLE / total) for weight in exact]
    for weight, count in zip(given, whole, strict=True):
        if weight and not count:
            raise ConfigError(
                f"a weight is 0, or at least one of {_LONGEST_CYCLE:,} of their sum",
                received=f"{weight:g} of {float(total):g}",
                remedy="raise it, or set it to 0",
            )
    return whole


class Mix:
    """The infinite sequence of dataset numbers.

    Args:
        quotas: (D,) draws of each dataset in one cycle; at least one is above 0.
        seed: determines the order within blocks; the quotas hold for every seed.
    """

    def __init__(self, quotas: Sequence[int], *, seed: int) -> None:
        self.quotas = np.array(quotas, np.int64)
        self.cycle = int(self.quotas.sum())
        self.seed = seed
        self._n_blocks = -(-self.cycle // _BLOCK)
        self._block = functools.lru_cache(maxsize=4)(self._permute_block)

    def take(self, start: int, stop: int) -> tuple[IndexArray, IndexArray]:
        """Draws start to stop - 1.

        Returns:
            (stop - start,) dataset numbers, and (stop - start,) number of earlier draws of the same
            dataset, both int64.
        """
        if len(self.quotas) == 1:
            return np.zeros(stop - start, np.int64), np.arange(start, stop, dtype=np.int64)
        members, draws = [], []
        while start < stop:
            cycle, offset = divmod(start, self.cycle)
            block = self._block_at(offset)
            own, before = self._block(cycle, block)
            first = offset - int(self._before(block).sum())
            end = min(first + stop - start, len(own))
            members.append(own[first:end])
            draws.append(before[first:end])
            start += end - first
        empty = np.zeros(0, np.int64)
        return np.concatenate([empty, *members]), np.concatenate([empty, *draws])

    def counts_at(self, n_draws: int) -> IndexArray:
        """Number of draws of each dataset among the first `n_draws`: (D,) int64."""
        cycle, offset = divmod(n_draws, self.cycle)
        block = self._block_at(offset)
        before = self._before(block)
        own, _ = self._block(cycle, block)
        rest = own[: offset - int(before.sum())]
        return cycle * self.quotas + before + np.bincount(rest, minlength=len(self.quotas))

    def _before(self, block: int) -> IndexArray:
        """Draws of each dataset in the blocks before this one of the same cycle: (D,) int64."""
        return np.asarray(block * self.quotas // self._n_blocks)

    def _block_at(self, offset: int) -> int:
        # Rounding moves the begin of a block back by less than one draw per dataset.
        block = offset * self._n_blocks // self.cycle
        while block + 1 < self._n_blocks and int(self._before(block + 1).sum()) <= offset:
            block += 1
        return block

    def _permute_block(self, cycle: int, block: int) -> tuple[IndexArray, IndexArray]:
        before, after = self._before(block), self._before(block + 1)
        members = np.repeat(np.arange(len(self.quotas)), after - before)
        members = members[permutation(len(members), self.seed, cycle, _MIX_KEY, block)]
        draws = np.empty_like(members)
        for number, first in enumerate(cycle * self.quotas + before):
            own = members == number
            draws[own] = first + np.arange(np.count_nonzero(own))
        return members, draws

    def __getstate__(self) -> dict[str, object]:
        # lru_cache wrappers of bound methods cannot be pickled; __setstate__ makes new ones.
        return {k: v for k, v in self.__dict__.items() if k != "_block"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._block = functools.lru_cache(maxsize=4)(self._permute_block)


class MixedOrder:
    """The infinite sequence of groups of several datasets; each keeps its order of a run alone.

    Args:
        orders: (D,) the order of each dataset.
        mix: the dataset of each draw. Default: for a single dataset.
    """

    def __init__(self, orders: Sequence[GroupOrder], mix: Mix | None = None) -> None:
        self.orders = tuple(orders)
        self.mix = Mix([1] * len(self.orders), seed=0) if mix is None else mix

    @property
    def n_groups(self) -> int:
        """Number of groups of all datasets."""
        return sum(order.n_groups for order in self.orders)

    def take(self, start: int, stop: int) -> tuple[IndexArray, IndexArray, IndexArray]:
        """Draws start to stop - 1.

        Returns:
            (stop - start,) dataset numbers, row-group numbers, and rows in the row groups, int64.
        """
        members, draws = self.mix.take(start, stop)
        row_groups, rows = np.empty_like(members), np.empty_like(members)
        for number, order in enumerate(self.orders):
            (own,) = np.nonzero(members == number)
            if len(own):
                first, last = int(draws[own[0]]), int(draws[own[-1]])
                row_groups[own], rows[own] = order.take(first, last + 1)
        return members, row_groups, rows

    def epochs_at(self, n_draws: int) -> list[float]:
        """Epochs of each dataset, as fractions, in the first `n_draws`: (D,)."""
        counts = self.mix.counts_at(n_draws)
        return [int(n) / order.n_groups for n, order in zip(counts, self.orders, strict=True)]
