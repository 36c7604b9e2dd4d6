"""The search of `gvpo-offline tune --judge sample` on logs of the study."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import BETA, STEPS, Job, Runner
from learn import answered, cosine, train
from transformers import PreTrainedModel
from world import MIXED, N_HELD_OUT, World

from gvpo_offline.errors import DataError
from gvpo_offline.group import Group
from gvpo_offline.losses import GroupStatistics
from gvpo_offline.train.objective import Objective
from gvpo_offline.tune import RangePoint, diverged, largest_usable_rate, misfit, range_rate
from gvpo_offline.tune.judged import (
    JudgedProposal,
    JudgedTrial,
    LossCandidates,
    TrialSettings,
    propose_judged,
)
from gvpo_offline.tune.racing import PromptEstimates

# What is searched; the grid that the proposals are compared with has the same settings.
BETAS = (BETA / 2, BETA, 2 * BETA)
IMITATIONS = (0.0, 1.0, 10.0)
RATES = (1e-4, 3e-4, 1e-3)
# Answers to each prompt are drawn in batches of this size, each with a seed of its own.
BATCH = 8
# A case: a task, and the seed of its log.
Case = tuple[str, int]


def grid(task: str, seed: int) -> list[Job]:
    """The grid of a case: three betas without imitation, and imitation at the beta of the study."""
    settings = [*((beta, 0.0) for beta in BETAS), *((BETA, alpha) for alpha in IMITATIONS[1:])]
    return [
        Job(task, "gvpo", rate, seed, beta, imitation=alpha)
        for beta, alpha in settings
        for rate in RATES
    ]


def proposed(found: dict[str, Any]) -> Job:
    """The run with the proposal of a search."""
    own = found["chosen"]["settings"]
    if own is None:
        return Job(found["task"], "none", 0.0, found["seed"])
    return Job(
        found["task"],
        own["loss_type"],
        own["learning_rate"],
        found["seed"],
        own["beta"],
        imitation=own["imitation"],
    )


@dataclass(frozen=True)
class Search:
    """Proposes imitation, beta and learning rate for a log, and stores the result.

    Trials answer the prompts of the log's held-out groups. Their answers are scored as the log is:
    for the task with a simulated reward model by its scores.

    Attributes:
        runner: loads the worlds and logs.
        folder: where `tune-TASK-SEED.json` is written.
    """

    runner: Runner
    folder: Path

    def __call__(self, case: Case) -> dict[str, Any]:
        """Search; read from `tune-TASK-SEED.json` if done."""
        task, seed = case
        path = self.folder / f"tune-{task}-{seed}.json"
        if path.exists():
            return json.loads(path.read_text())  # type: ignore[no-any-return]
        torch.set_num_threads(1)
        world, log = self.runner.world(task), self.runner.log(task, MIXED, seed)
        largest = largest_usable_rate(_range(world.policy, log, seed))
        found = propose_judged(
            _trial(world.policy, log, seed),
            _judge(world, seed),
            untouched=world.policy,
            losses=[LossCandidates("gvpo", IMITATIONS, BETAS)],
            largest_rate=largest,
            judge_beta=BETA,
        )
        told = {"task": task, "seed": seed, "largest_rate": largest, **_plain(found)}
        path.write_text(json.dumps(told, indent=1) + "\n")
        return told


def _trial(
    policy: PreTrainedModel, log: Sequence[Group], seed: int
) -> Callable[[TrialSettings], PreTrainedModel | None]:
    def trial(own: TrialSettings) -> PreTrainedModel | None:
        objective = Objective(own.beta, own.loss_type, imitation=own.imitation)
        rate = cosine(own.learning_rate, STEPS)
        try:
            return train(policy, log, objective, rate=rate, steps=STEPS, seed=seed)
        except DataError:  # log-probs that are not finite
            return None

    return trial


def _judge(world: World, seed: int) -> Callable[[PreTrainedModel, int], PromptEstimates]:
    """Estimates from n answers to each held-out prompt, the same random numbers for each policy."""
    prompts = world.prompts[len(world.prompts) - N_HELD_OUT :]
    drawn: dict[tuple[int, int], tuple[Any, Any]] = {}

    def batch(model: PreTrainedModel, number: int) -> tuple[Any, Any]:
        if (id(model), number) not in drawn:
            drawn[id(model), number] = answered(
                world, model, prompts, k=BATCH, seed=1000 + 100 * seed + number, as_logged=True
            )
        return drawn[id(model), number]

    def judge(model: PreTrainedModel, n: int) -> PromptEstimates:
        parts = [batch(model, number) for number in range(n // BATCH)]
        rewards, log_ratios = (np.concatenate(own, axis=1) for own in zip(*parts, strict=True))
        return PromptEstimates(rewards.mean(1), log_ratios.mean(1))

    return judge


def _range(policy: PreTrainedModel, log: Sequence[Group], seed: int) -> list[RangePoint]:
    points: list[RangePoint] = []

    def each_step(step: int, seen: GroupStatistics) -> bool:
        points.append(RangePoint(range_rate(step, STEPS), misfit(seen.metrics())))
        return not diverged(points)

    train(
        policy,
        log,
        Objective(BETA),
        rate=lambda step: range_rate(step, STEPS),
        steps=STEPS,
        seed=seed,
        each_step=each_step,
    )
    return points


def _plain(found: JudgedProposal) -> dict[str, Any]:
    trained = [_trial_of(own) for own in found.trials]
    return {"chosen": _trial_of(found.chosen), "trials": trained, "samples": found.samples}


def _trial_of(own: JudgedTrial) -> dict[str, Any]:
    settings = None if own.settings is None else asdict(own.settings)
    return {
        "settings": settings,
        "samples": own.samples,
        "reward": own.reward.mean,
        "objective": own.objective.mean,
        "objective_se": own.objective.se,
    }
