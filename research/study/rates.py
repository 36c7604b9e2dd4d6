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
SEED, SECOND_SEED = 0, 1
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
    """The learning rate of each point, by reward - beta KL on validation prompts.

    Each point begins with three rates of `LADDER` around the one of its neighbour, at one seed.
    While the best is at an end, the next rate beyond it is tried. If other rates are within one
    standard error of the best (`contenders`), these and the best are run at a second seed, and the
    best mean over both seeds is taken: the best of one seed alone can be a rate at which other
    seeds diverge.

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
                chosen[name] = best_rate(contenders(found), run)
    return chosen


def contenders(rows: Sequence[Row]) -> list[Row]:
    """The rows whose objective is within one standard error of the best, the best included.

    The standard error is that of the difference, paired by validation prompt.
    """
    best = max(rows, key=_objective)
    return [row for row in rows if row is best or _close(row, best)]


def best_rate(rows: Sequence[Row], run: Run) -> float:
    """The rate of the row with the best mean objective over its own and the second seed."""
    if len(rows) == 1:
        return float(rows[0]["job"]["rate"])
    again = run([replace(Job(**row["job"]), seed=SECOND_SEED) for row in rows])
    means = [_objective(row) + _objective(other) for row, other in zip(rows, again, strict=True)]
    return float(rows[means.index(max(means))]["job"]["rate"])


def _close(row: Row, best: Row) -> bool:
    if not math.isfinite(row["objective"]):
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
