"""The runs of a study: each is one line of a file, and finished runs are not repeated."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learn import Outcome, cosine, evaluate, train, train_in_rounds
from tasks import TASKS
from world import MIXED, N_HELD_OUT, World, load_world, make_log

from gvpo_offline.errors import DataError
from gvpo_offline.group import Group
from gvpo_offline.train.data_rules import alpha_of
from gvpo_offline.train.imitation import unlikely_samplers
from gvpo_offline.train.objective import Objective

BETA = 0.1
STEPS = 100
Row = dict[str, Any]
FIGURES = tuple(own.name for own in fields(Outcome) if own.name != "by_prompt")


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
        imitation, imitation_of, imitation_weights, imitation_without, link, reference_sampler: as
            the settings of training; imitation may be "auto".
        steps: optimizer steps.
        rounds: number of rounds of equal length, each with its own reference.
        warm_rate: above 0, training starts from the policy after a run of rft with this rate.
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
    imitation: float | str = 0.0
    imitation_of: str = "best"
    imitation_weights: str = "equal"
    imitation_without: list[str] = field(default_factory=list)
    link: str = "log"
    reference_sampler: str = ""
    steps: int = STEPS
    rounds: int = 1
    warm_rate: float = 0.0
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
        return _world(task, self.folder / TASKS[task].models)

    def log(self, task: str, mix: dict[str, int], seed: int) -> list[Group]:
        """The groups of a log."""
        return _log(task, self.folder / TASKS[task].models, json.dumps(mix), seed)

    def __call__(self, job: Job) -> Row:
        """Train and evaluate; returns the row for `runs.jsonl`.

        The figures are NaN if training diverged.
        """
        torch.set_num_threads(1)
        started = time.process_time()
        world, log = self.world(job.task), self.log(job.task, job.mix, job.seed)
        policy, alpha = world.policy, 0.0
        if job.loss != "none":
            objective = objective_of(job, log[: len(log) - N_HELD_OUT])
            alpha = objective.imitation
            try:
                policy = self._trained(job, objective, world, log)
            except DataError:  # log-probs that are not finite: the rate is too large
                return _row(job, dict.fromkeys(FIGURES, math.nan), alpha, started)
        prompts = world.validation if job.validate else world.test
        outcome = asdict(evaluate(world, policy, log, prompts, beta=job.beta, seed=job.seed))
        if not job.validate:
            del outcome["by_prompt"]  # only rates are compared by prompt
        return _row(job, outcome, alpha, started)

    def _trained(self, job: Job, objective: Objective, world: World, log: list[Group]) -> Any:
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
        if job.warm_rate:
            warm = Objective(job.beta, "rft")
            rate = cosine(job.warm_rate, job.steps)
            start = train(start, log, warm, rate=rate, steps=job.steps, seed=job.seed + 100)
        rate = cosine(job.rate, job.steps)
        return train(start, log, objective, rate=rate, steps=job.steps, seed=job.seed)


def _row(job: Job, outcome: Row, alpha: float, started: float) -> Row:
    seconds = round(time.process_time() - started, 2)
    return {"job": asdict(job), **outcome, "alpha": alpha, "cpu_seconds": seconds}


def objective_of(job: Job, groups: Sequence[Group]) -> Objective:
    """The objective of a run on training groups."""
    alpha, without = job.imitation, job.imitation_without
    if isinstance(alpha, str):
        alpha, left_out = auto_imitation_of_groups(groups)
        without = without or left_out
    return Objective(
        job.beta * job.rounds,
        job.loss,
        job.anchor,
        job.weights,
        imitation=alpha,
        imitation_of=job.imitation_of,
        imitation_weights=job.imitation_weights,
        imitation_without=without,
        link=job.link,
        reference_sampler=job.reference_sampler,
    )


def auto_imitation_of_groups(groups: Sequence[Group]) -> tuple[float, list[str]]:
    """What the setting `imitation: auto` stands for, of groups in memory: the number, and the
    samplers that are not imitated."""
    held = [(group, group.rewards, group.ref_seq_logprobs) for group in groups]
    lowest = min(float(rewards.min()) for _, rewards, _ in held if rewards is not None)
    wrong, best = 0, Counter[str]()
    nats: dict[str, float] = defaultdict(float)
    for group, rewards, logprobs in held:
        assert rewards is not None
        assert logprobs is not None
        wrong += float(rewards.max()) == lowest
        if not np.ptp(rewards):
            continue
        for i in np.flatnonzero(rewards == rewards.max()):
            best[group.samplers[i]] += 1
            nats[group.samplers[i]] -= float(logprobs[i]) / len(group.response_token_ids[i])
    return alpha_of(wrong, len(groups)), unlikely_samplers(best, nats)


def _unequal(group: Group) -> bool:
    return group.rewards is not None and bool(np.ptp(group.rewards))


@functools.cache
def _world(task: str, folder: Path) -> World:
    return load_world(task, folder)


@functools.lru_cache(maxsize=8)
def _log(task: str, folder: Path, mix: str, seed: int) -> list[Group]:
    """The groups of a log, kept in a file: many runs in several processes use the same one."""
    name = hashlib.sha256(f"{task} {mix} {seed}".encode()).hexdigest()[:16]
    path = folder / f"log-{name}.pickle"
    if not path.exists():
        made = make_log(_world(task, folder), json.loads(mix), seed)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_bytes(pickle.dumps(made))
        new.replace(path)
    groups: list[Group] = pickle.loads(path.read_bytes())
    return groups


def in_processes(work: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterable[Any]:
    """Results of `work` on each item in worker processes, in the order of completion."""
    wanted = list(items)
    if not wanted:
        return
    with multiprocessing.get_context("spawn").Pool(min(workers, len(wanted))) as pool:
        yield from pool.imap_unordered(work, wanted)
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
    """The rows of finished runs by key.

    An incomplete last line is ignored, and so is a line of another version of the study: its job
    has other fields than `Job`, and a field that it lacks may have had another value.
    """
    rows = {}
    names = {own.name for own in fields(Job)}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if set(row["job"]) == names:
            rows[Job(**row["job"]).key] = row
    return rows
