"""The search of `gvpo-offline tune` on a log of the study, without access to the verifier."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import BETA, STEPS, Runner
from learn import cosine, fit, train
from world import MIXED, N_HELD_OUT

from gvpo_offline.group import Group
from gvpo_offline.losses import GroupStatistics
from gvpo_offline.train.objective import Objective
from gvpo_offline.tune import (
    Metrics,
    RangePoint,
    Trial,
    beta_candidates,
    diverged,
    initial_beta,
    largest_usable_rate,
    misfit,
    propose,
    range_rate,
    score,
)


@dataclass(frozen=True)
class Search:
    """Proposes beta and learning rate of GVPO for the log of a task, and stores the result.

    Attributes:
        runner: loads the worlds and logs.
        folder: where `tune-TASK.json` is written.
        seed: seed of the log and the training order.
    """

    runner: Runner
    folder: Path
    seed: int = 1

    def __call__(self, task: str) -> dict[str, Any]:
        """Search with beta given, and with beta searched; read from `tune-TASK.json` if done."""
        path = self.folder / f"tune-{task}.json"
        if path.exists():
            return json.loads(path.read_text())  # type: ignore[no-any-return]
        torch.set_num_threads(1)
        world, log = self.runner.world(task), self.runner.log(task, MIXED, self.seed)
        trial = self._trial(task, world.policy, log)
        gap = reward_gap(log[: len(log) - N_HELD_OUT])
        found: dict[str, Any] = {"task": task, "reward_gap": gap}
        candidates = beta_candidates(gap)
        for name, betas in (("rate", [BETA]), ("both", candidates)):
            first = initial_beta(betas, gap)
            largest = largest_usable_rate(self._range(world.policy, log, first))
            done = propose(
                trial, betas=betas, initial_beta=first, largest_rate=largest, steps=STEPS
            )
            found[name] = {
                "beta": done.beta,
                "rate": done.learning_rate,
                "largest_rate": largest,
                "trials": [_plain(own) for own in done.trials],
            }
        path.write_text(json.dumps(found, indent=1) + "\n")
        return found

    def _trial(
        self, task: str, policy: Any, log: list[Group]
    ) -> Callable[[float, float, int], Metrics]:
        known: dict[tuple[float, float], Metrics] = {}

        def trial(beta: float, rate: float, steps: int) -> Metrics:
            if (beta, rate) not in known:
                schedule = cosine(rate, steps)
                model = train(
                    policy, log, Objective(beta), rate=schedule, steps=steps, seed=self.seed
                )
                known[beta, rate] = fit(model, log[len(log) - N_HELD_OUT :], beta)
            return known[beta, rate]

        return trial

    def _range(self, policy: Any, log: list[Group], beta: float) -> list[RangePoint]:
        points: list[RangePoint] = []

        def each_step(step: int, seen: GroupStatistics) -> bool:
            points.append(RangePoint(range_rate(step, STEPS), misfit(seen.metrics())))
            return not diverged(points)

        train(
            policy,
            log,
            Objective(beta),
            rate=lambda step: range_rate(step, STEPS),
            steps=STEPS,
            seed=self.seed,
            each_step=each_step,
        )
        return points


def _plain(trial: Trial) -> dict[str, float]:
    return {
        "beta": trial.beta,
        "rate": trial.learning_rate,
        "score": score(trial.metrics),
        "explained_variance": trial.metrics["explained_variance"],
    }


def reward_gap(groups: Sequence[Group]) -> float:
    """The median of the best minus the worst reward, over groups with unequal rewards."""
    gaps = [float(np.ptp(group.rewards)) for group in groups if group.rewards is not None]
    return float(np.median([gap for gap in gaps if gap > 0]))
