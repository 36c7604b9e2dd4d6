"""Pairs of responses to compare within a group, and the win rates from the comparisons."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gvpo_offline.group import FloatArray
from gvpo_offline.hashing import permutation, text_key

Pair = tuple[int, int]


def pairs_of(size: int, opponents: int | None, group_id: str) -> list[Pair]:
    """Pairs in which every response is compared with at least `opponents` others; None: with all.

    The responses form a ring, in an order given by a hash of the group's id. Each is compared with
    its nearest neighbours on both sides, and for an odd number also with the opposite response. All
    responses have equally many pairs; with two or more each, the pairs connect the whole group.

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
    """Mean result of each response: over both orders, when shown first, when shown second.

    Args:
        size: k.
        wins: result of i in (i, j), where i is shown first: 1 won, 0.5 tie, 0 lost. Both orders
            of each pair.

    Returns:
        (3, k); NaN for a response in no pair.
    """
    first, second, met = np.zeros(size), np.zeros(size), np.zeros(size)
    for (i, j), won in wins.items():
        first[i] += won
        second[j] += 1 - won
        met[i] += 1  # as often shown second, since both orders are given
    met[met == 0] = np.nan
    return np.stack([(first + second) / (2 * met), first / met, second / met])
