"""A learning rate of its own for every comparison, from validation prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jobs import Job, Row

# Half decades: 1e-5, 3e-5, ..., 3e-2.
LADDER = tuple(float(f"{10.0 ** (n / 2):.0e}") for n in range(-10, -2))
SEED = 0
Run = Callable[[Sequence[Job]], list[Row]]


@dataclass(frozen=True)
class Point:
    """Something that needs a learning rate of its own.

    Attributes:
        job: the run; its rate, seed and `validate` are ignored.
        near: where the search begins: a rate, or the name of another point, whose rate is taken.
    """

    job: Job
    near: float | str


def choose_rates(points: Mapping[str, Point], run: Run) -> dict[str, float]:
    """The learning rate of each point, by reward - beta KL on validation prompts at one seed.

    Each point begins with three rates of `LADDER` around the one of its neighbour. While the best
    is at an end, the next rate beyond it is tried. See `best_rate` for near ties.

    Args:
        points: the points by name. A neighbour is another point; there are no cycles.
        run: maps jobs to their rows, in the same order (`jobs.run_all`).

    Raises:
        ValueError: a neighbour is missing, or neighbours form a cycle.
    """
    chosen: dict[str, float] = {}
    tried: dict[str, list[int]] = {}
    while len(chosen) < len(points):
        for name, point in points.items():
            near = chosen.get(point.near) if isinstance(point.near, str) else point.near
            if name not in tried and near is not None:
                at = LADDER.index(near)
                tried[name] = [n for n in (at - 1, at, at + 1) if 0 <= n < len(LADDER)]
        open_points = [name for name in tried if name not in chosen]
        if not open_points:
            waiting = sorted(set(points) - set(chosen))
            raise ValueError(f"points without a neighbour that has a rate: {waiting}")
        wanted = {name: [_trial(points[name], n) for n in tried[name]] for name in open_points}
        jobs_of_all = [job for own in wanted.values() for job in own]
        rows = {Job(**row["job"]).key: row for row in run(jobs_of_all)}
        for name, jobs in wanted.items():
            found = [rows[job.key] for job in jobs]
            objectives = [_objective(row) for row in found]
            best = tried[name][objectives.index(max(objectives))]
            beyond = {min(tried[name]): best - 1, max(tried[name]): best + 1}.get(best, -1)
            if 0 <= beyond < len(LADDER):
                tried[name] = sorted([*tried[name], beyond])
            else:
                chosen[name] = best_rate(found)
    return chosen


def best_rate(rows: Sequence[Row]) -> float:
    """The smallest rate that is not worse than the best by more than one standard error.

    The standard error is that of the difference, paired by validation prompt. A larger rate varies
    more between seeds, so it must be visibly better.
    """
    best = max(rows, key=_objective)
    level = [row for row in rows if row is best or _behind(row, best)]
    return float(min(row["job"]["rate"] for row in level))


def _behind(row: Row, best: Row) -> bool:
    """Whether a row with a smaller rate is within one standard error of the best."""
    if row["job"]["rate"] > best["job"]["rate"] or not math.isfinite(row["objective"]):
        return False
    gaps = np.subtract(best["by_prompt"], row["by_prompt"])
    return bool(gaps.mean() <= gaps.std(ddof=1) / math.sqrt(len(gaps)))


def _objective(row: Row) -> float:
    """reward - beta KL; -inf if training diverged."""
    value = float(row["objective"])
    return value if math.isfinite(value) else -math.inf


def _trial(point: Point, rung: int) -> Job:
    return replace(point.job, rate=LADDER[rung], seed=SEED, validate=True)


def with_rate(point: Point, rate: float, seed: int) -> Job:
    """The run of a point at its rate, on test prompts."""
    changes: dict[str, Any] = {"rate": rate, "seed": seed, "validate": False}
    return replace(point.job, **changes)
