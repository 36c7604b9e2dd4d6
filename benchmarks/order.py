"""What the order of training costs: laying out an epoch of a billion groups, and resuming in it.

    .venv/bin/python benchmarks/order.py

Prints, also as one JSON object on its last line: `groups`, `lay_out_s` (the first draw of an epoch,
which permutes its row groups), `next_s` (draws from a window that was not in use), `resume_s` (the
draws amid a later epoch, by an order that has made none before), `peak_mb`; and `spread`,
how far apart neighbours of one row group come, over what a permutation of their window gives.
"""

from __future__ import annotations

import json
import resource
import time

import numpy as np

from gvpo_offline.stream.order import GroupOrder

ROW_GROUPS = 3_906_250
ROWS = 256
WINDOW = 4
STEP = 1_024


def timed(order: GroupOrder, start: int) -> float:
    """Seconds that the draws of one step take."""
    started = time.perf_counter()
    order.take(start, start + STEP)
    return time.perf_counter() - started


def spread() -> float:
    """Mean distance of neighbours on disk within an epoch, over a third of a window."""
    order = GroupOrder(np.full(256, ROWS, np.int64), seed=1, window=WINDOW)
    row_groups, rows = order.take(0, order.n_groups)
    position = np.empty((256, ROWS), np.int64)
    position[row_groups, rows] = np.arange(order.n_groups)
    return float(np.abs(np.diff(position, axis=1)).mean() / (WINDOW * ROWS / 3))


def main() -> None:
    """Measure and print."""
    sizes = np.full(ROW_GROUPS, ROWS, np.int64)
    order = GroupOrder(sizes, seed=1, window=WINDOW)
    figures = {
        "groups": order.n_groups,
        "lay_out_s": round(timed(order, 0), 3),
        "next_s": round(timed(order, order.n_groups // 3), 5),
        "resume_s": round(
            timed(GroupOrder(sizes, seed=1, window=WINDOW), 2 * order.n_groups + 12_345_678), 3
        ),
        "spread": round(spread(), 3),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    for name, value in figures.items():
        print(f"{name:<10} {value:>16,}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
