"""Which responses of a group take part: by sampler, at most so many, the most different first."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gvpo_offline.schema import column_array, split_list
from gvpo_offline.store.pick import Pick
from gvpo_offline.stream.config import ResponseSettings

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def choose(table: pa.Table, settings: ResponseSettings) -> Pick:
    """The responses of each row that take part, in the order in which they are stored.

    First those of the samplers that are asked for; of these at most `max_responses`: the first
    ones, or (spread) the best, the worst, and then again and again the one whose reward is farthest
    from all rewards chosen so far. Of equally far ones the one whose reward was chosen least often
    comes first, then the one stored first. So of rewards 0 and 1 both are taken in turn.

    Args:
        table: rows with `samplers` and, to spread, `rewards`.
        settings: what to choose.

    Returns:
        The rows that keep at least one response, as groups.
    """
    lists = column_array(table, "samplers")
    sizes = np.diff(np.asarray(lists.offsets.to_numpy(zero_copy_only=False)).astype(np.int64))
    rows = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
    items = np.arange(len(rows), dtype=np.int64) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    if settings.samplers:
        kept = np.flatnonzero(_of_samplers(lists.flatten(), settings.samplers))
        rows, items = rows[kept], items[kept]
    else:
        kept = np.arange(len(rows), dtype=np.int64)
    if settings.max_responses is not None:
        if settings.prefer == "spread":
            rewards = np.concatenate([*split_list(column_array(table, "rewards")), np.zeros(0)])
            few = _spread(rewards[kept], rows, settings.max_responses)
        else:
            few = np.flatnonzero(_ranks(rows) < settings.max_responses)
        rows, items = rows[few], items[few]
    first, counts = np.unique(rows, return_counts=True)
    return Pick(first, counts.astype(np.int64), rows, items)


def _of_samplers(names: pa.Array, patterns: Sequence[str]) -> npt.NDArray[np.bool_]:
    encoded = names.dictionary_encode()
    matching = [
        any(fnmatchcase(name, pattern) for pattern in patterns)
        for name in encoded.dictionary.to_pylist()
    ]
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    return np.array(matching, dtype=bool)[codes] if matching else np.zeros(0, dtype=bool)


def _ranks(rows: Indices) -> Indices:
    """The place of each element among those of its row; row numbers ascend. (n,) int64"""
    return np.arange(len(rows), dtype=np.int64) - np.searchsorted(rows, rows)


def _spread(rewards: Floats, rows: Indices, most: int) -> Indices:
    """At most `most` elements of each row, chosen greedily: (n,) int64, ascending.

    One round chooses one element of every row that has one left.

    Args:
        rewards: (n,).
        rows: (n,) ascending row numbers.
        most: rounds.
    """
    distinct, run = np.unique(rows, return_inverse=True)
    places = (run, _ranks(rows))
    shape = (len(distinct), 1 + int(places[1].max(initial=0)))
    value, left = np.zeros(shape), np.zeros(shape, dtype=bool)
    value[places], left[places] = rewards, True
    distance, often = np.full(shape, np.inf), np.zeros(shape)
    for number in range(min(most, shape[1])):
        best = left.copy()
        for score in (distance if number > 1 else value if number == 0 else -value, -often):
            open_score = np.where(best, score, -np.inf)
            best &= open_score == open_score.max(axis=1, keepdims=True)
        at = (np.arange(shape[0]), best.argmax(axis=1))  # of equals the first one
        left[at] = False
        chosen = value[at][:, None]
        with np.errstate(over="ignore"):
            distance = np.minimum(distance, np.abs(value - chosen))
        often += value == chosen
    return np.flatnonzero(~left[places]).astype(np.int64)
