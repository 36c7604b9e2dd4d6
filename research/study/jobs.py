"""One run of a study, and many of them: each a line of a file, none done twice."""

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
from learn import cosine, in_rounds, judged, trained
from world import MIXED, N_HELD_OUT, World, load_world, make_log

from gvpo_offline.group import Group
from gvpo_offline.train.objective import Objective

BETA = 0.1
STEPS = 100
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        task, loss: by name; the loss "none" leaves the policy as it is.
        rate: the peak learning rate.
        seed: decides log, order and answers.
        beta: the loss's, and that of reward - beta KL. In `rounds`, each round trains with
            beta * rounds, so that the optimum stays where it was.
        mix: responses to a prompt, by sampler.
        steps: optimizer steps.
        rounds: of equal length, each with its own reference.
        start: "policy", or "rft": the policy after a run of rft with ten times the rate.
        anchor, weights: GVPO's.
        equal_groups: whether groups of equal rewards are trained on.
        validate: judged on validation prompts, not on test prompts.
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
        """What tells it from all others."""
        return json.dumps(asdict(self), sort_keys=True)


class Runner:
    """Does jobs; worlds and logs are made once in each process.

    Args:
        folder: of the worlds (`world.make_models`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def world(self, task: str) -> World:
        """A task's."""
        return _world(task, self.folder / task)

    def log(self, task: str, mix: dict[str, int], seed: int) -> list[Group]:
        """A log's groups."""
        return _log(task, self.folder / task, json.dumps(mix), seed)

    def __call__(self, job: Job) -> Row:
        """Train and judge."""
        torch.set_num_threads(1)
        started = time.process_time()
        world, log = self.world(job.task), self.log(job.task, job.mix, job.seed)
        policy = world.policy
        if job.loss != "none":
            policy = self._trained(job, world, log)
        prompts = world.validation if job.validate else world.test
        outcome = judged(world, policy, log, prompts, beta=job.beta, seed=job.seed)
        seconds = time.process_time() - started
        return {"job": asdict(job), **asdict(outcome), "cpu_seconds": round(seconds, 2)}

    def _trained(self, job: Job, world: World, log: list[Group]) -> Any:
        objective = Objective(job.beta * job.rounds, job.loss, job.anchor, job.weights)
        if not job.equal_groups:
            n = len(log) - N_HELD_OUT
            log = [group for group in log[:n] if _unequal(group)] + log[n:]
        if job.rounds > 1:
            return in_rounds(
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
            start = trained(start, log, warm, rate=rate, steps=job.steps, seed=job.seed + 100)
        rate = cosine(job.rate, job.steps)
        return trained(start, log, objective, rate=rate, steps=job.steps, seed=job.seed)


def _unequal(group: Group) -> bool:
    return group.rewards is not None and bool(np.ptp(group.rewards))


@functools.cache
def _world(task: str, folder: Path) -> World:
    return load_world(task, folder)


@functools.lru_cache(maxsize=8)
def _log(task: str, folder: Path, mix: str, seed: int) -> list[Group]:
    return make_log(_world(task, folder), json.loads(mix), seed)


def in_processes(work: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterable[Any]:
    """`work` on each item, by processes of their own, as they finish."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(work, items)
        pool.close()
        pool.join()


def run_all(jobs: Iterable[Job], runner: Runner, path: Path, workers: int) -> list[Row]:
    """The rows of all jobs, in their order; those that `path` lacks are run and added to it."""
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
    """The runs of earlier attempts, by key; a last line that was cut off is left out."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[Job(**row["job"]).key] = row
    return rows
