"""Reference log-probs by position: sums per sampler and range of positions."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gvpo_offline.group import FloatArray
from gvpo_offline.report.dataset.batch import MOST_SAMPLERS, Int64Array, ReportBatch

# Ranges of positions: 0, 1, 2-3, 4-7, … The last one has no end.
EDGES = np.array([0, 1, *(2**n for n in range(1, 21))], np.int64)


def range_text(number: int) -> str:
    """A range of positions, counted from 0."""
    low = int(EDGES[number])
    if number == len(EDGES) - 1:
        return f"{low:,} and later"
    high = int(EDGES[number + 1]) - 1
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _table() -> FloatArray:
    return np.zeros((MOST_SAMPLERS + 1, len(EDGES)))


@dataclass
class PositionSums:
    """Sums over the tokens that count, by sampler and range of positions.

    Attributes:
        sums: (S, B) nats.
        counts: (S, B) tokens.
    """

    sums: FloatArray = field(default_factory=_table)
    counts: FloatArray = field(default_factory=_table)

    def add(
        self, batch: ReportBatch
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None:
        """Add the tokens of a batch.

        Returns:
            (N,) float32 twice: the log-prob of each response's first and last token, NaN where it
            does not count or is not stored; None if the batch has no log-probs of tokens.
        """
        held = batch.token_logprobs
        if held is None:
            return None
        scored = np.flatnonzero(held.stops > held.starts)
        starts, stops = held.starts[scored], held.stops[scored]
        weights = None if held.counted is None else held.counted.astype(np.float32)
        values = held.values if weights is None else held.values * weights
        samplers = batch.samplers[scored]
        # Responses are neighbours, so the end of a response is the beginning of the next: the
        # beginnings of all ranges that are not empty divide the tokens into the ranges.
        begins = starts[:, None] + EDGES[None, :]
        filled = begins < stops[:, None]
        at = begins[filled]
        sums = np.add.reduceat(values, at, dtype=np.float64)
        sizes = (
            _sizes(at, len(values))
            if weights is None
            else np.add.reduceat(weights, at, dtype=np.float64)
        )
        rows, columns = np.nonzero(filled)
        place = samplers[rows] * len(EDGES) + columns
        for table, own in ((self.sums, sums), (self.counts, sizes)):
            table += np.bincount(place, own, table.size).reshape(table.shape)
        return (
            _tokens(batch, scored, held.values, held.counted, starts),
            _tokens(batch, scored, held.values, held.counted, stops - 1),
        )


def _sizes(at: Int64Array, total: int) -> FloatArray:
    return np.diff(np.append(at, total)).astype(np.float64)


def _tokens(
    batch: ReportBatch,
    scored: Int64Array,
    values: npt.NDArray[np.float32],
    counted: npt.NDArray[np.bool_] | None,
    at: Int64Array,
) -> npt.NDArray[np.float32]:
    found = np.full(len(batch.lengths), np.nan, np.float32)
    found[scored] = values[at] if counted is None else np.where(counted[at], values[at], np.nan)
    return found
