"""The runs of a study: each is one line of a file, and finished runs are not repeated."""

from __future__ import annotations

import functools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learn import cosine, evaluate, train, train_in_rounds
from world import MIXED, N_HELD_OUT, World, load_world, make_log

from gvpo_offline.group import Group
from gvpo_offline.train.objective import Objective

BETA = 0.1
STEPS = 100
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """The settings of a run.

    Attributes:
        task, loss: names; the loss "none" means no training.
        rate: the peak learning rate.
        seed: seed of the log, the training order and the sampled answers.
        beta: beta of the loss and of reward - beta KL. With several rounds each round trains with
            beta * rounds, which leaves the optimum of the run unchanged.
        mix: number of responses to a prompt, by sampler.
        steps: optimizer steps.
        rounds: number of rounds of equal length, each with its own reference.
        start: "policy", or "rft": the policy after a run of rft with ten times the rate.
        anchor, weights: settings of the GVPO loss.
        equal_groups: whether to train on groups whose rewards are all equal.
        validate: evaluate on validation prompts instead of test prompts.
    """

    task: str
    loss: str
    rate: float
    seed: int
    beta: float = BETA
    mix: dict[str, int] = field(default_factory=lambda: dict(MIXED))
    steps: int = STEPS
    rounds: int = 1
    start: str = "policy"
    anchor: float = 0.0
    weights: str = "equal"
    equal_groups: bool = True
    validate: bool = False

    @property
    def key(self) -> str:
        """A unique key of the settings."""
        return json.dumps(asdict(self), sort_keys=True)


class Runner:
    """Executes jobs; each process loads a world and makes a log only once.

    Args:
        folder: the folder with the models (`world.make_models`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def world(self, task: str) -> World:
        """The world of a task."""
        return _world(task, self.folder / task)

    def log(self, task: str, mix: dict[str, int], seed: int) -> list[Group]:
        """The groups of a log."""
        return _log(task, self.folder / task, json.dumps(mix), seed)

    def __call__(self, job: Job) -> Row:
        """Train and evaluate; returns the row for `runs.jsonl`."""
        torch.set_num_threads(1)
        started = time.process_time()
        world, log = self.world(job.task), self.log(job.task, job.mix, job.seed)
        policy = world.policy
        if job.loss != "none":
            policy = self._trained(job, world, log)
        prompts = world.validation if job.validate else world.test
        outcome = evaluate(world, policy, log, prompts, beta=job.beta, seed=job.seed)
        seconds = time.process_time() - started
        return {"job": asdict(job), **asdict(outcome), "cpu_seconds": round(seconds, 2)}

    def _trained(self, job: Job, world: World, log: list[Group]) -> Any:
        objective = Objective(job.beta * job.rounds, job.loss, job.anchor, job.weights)
        if not job.equal_groups:
            n = len(log) - N_HELD_OUT
            log = [group for group in log[:n] if _unequal(group)] + log[n:]
        if job.rounds > 1:
            return train_in_rounds(
                world,
                log,
                objective,
                peak=job.rate,
                steps=job.steps,
                seed=job.seed,
                rounds=job.rounds,
            )
        start = world.policy
        if job.start == "rft":
            warm = Objective(job.beta, "rft")
            rate = cosine(10 * job.rate, job.steps)
            start = train(start, log, warm, rate=rate, steps=job.steps, seed=job.seed + 100)
        rate = cosine(job.rate, job.steps)
        return train(start, log, objective, rate=rate, steps=job.steps, seed=job.seed)


def _unequal(group: Group) -> bool:
    return group.rewards is not None and bool(np.ptp(group.rewards))


@functools.cache
def _world(task: str, folder: Path) -> World:
    return load_world(task, folder)


@functools.lru_cache(maxsize=8)
def _log(task: str, folder: Path, mix: str, seed: int) -> list[Group]:
    return make_log(_world(task, folder), json.loads(mix), seed)


def in_processes(work: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterable[Any]:
    """Results of `work` on each item in worker processes, in the order of completion."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(work, items)
        pool.close()
        pool.join()


def run_all(jobs: Iterable[Job], runner: Runner, path: Path, workers: int) -> list[Row]:
    """The rows of all jobs, in their order; jobs missing in `path` are run and appended to it."""
    wanted = list({job.key: job for job in jobs}.values())
    found = _done(path)
    pending = [job for job in wanted if job.key not in found]
    with path.open("a") as file:
        for number, row in enumerate(in_processes(runner, pending, workers), 1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            job = Job(**row["job"])
            found[job.key] = row
            print(
                f"[{number}/{len(pending)}] {job.task} {job.loss} beta {job.beta:g} rate "
                f"{job.rate:g} seed {job.seed}: reward {row['reward']:.3f}, KL {row['kl']:.2f}, "
                f"{row['objective']:.3f}; {row['cpu_seconds']} s",
                flush=True,
            )
    return [found[job.key] for job in wanted]


def _done(path: Path) -> dict[str, Row]:
    """The rows of finished runs by key; an incomplete last line is ignored."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[Job(**row["job"]).key] = row
    return rows
