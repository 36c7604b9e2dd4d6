"""Who meets whom within a group, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gvpo_offline.group import FloatArray
from gvpo_offline.hashing import permutation, text_key

Pair = tuple[int, int]


def pairs_of(size: int, opponents: int | None, group_id: str) -> list[Pair]:
    """Pairs in which every response meets at least `opponents` others; None: all of them.

    A ring in an order that is a hash of the group's id: everybody meets the next ones on either
    side, and those across where the number is odd. All degrees are equal, and the pairs connect the
    whole group where each meets two or more.

    Returns:
        Pairs (i, j), i < j, each once.
    """
    if opponents is None or opponents >= size - 1:
        return [(i, j) for j in range(size) for i in range(j)]
    steps = list(range(1, opponents // 2 + 1))
    if opponents % 2:
        steps.append(size // 2 if size % 2 == 0 else opponents // 2 + 1)
    ring = permutation(size, text_key(group_id)).tolist()
    met = {
        (min(one, other), max(one, other))
        for step in steps
        for one, other in zip(ring, ring[step:] + ring[:step], strict=True)
    }
    return sorted(met)


def win_rates(size: int, wins: Mapping[Pair, float]) -> FloatArray:
    """What each response won on average: over both orders, when shown first, when shown second.

    Args:
        size: k.
        wins: for (i, j), i shown first: what i won, 1, 0.5 or 0. Both orders of each pair.

    Returns:
        (3, k); NaN for a response in no pair.
    """
    first, second, met = np.zeros(size), np.zeros(size), np.zeros(size)
    for (i, j), won in wins.items():
        first[i] += won
        second[j] += 1 - won
        met[i] += 1  # and, as both orders are there, as often in second place
    met[met == 0] = np.nan
    return np.stack([(first + second) / (2 * met), first / met, second / met])
