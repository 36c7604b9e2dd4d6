"""Which loss to take: every loss on the same logs, each with a learning rate of its own.

    python pipelines/study/study.py --output_dir runs/study

 1. For each task of `tasks.py`: models are made and pretrained, and 600 prompts are answered by an
    older checkpoint, another model, the policy while hot, and a scripted person (`world.py`).
 2. Every loss trains the policy on that log with three learning rates; the one with the best
    reward - beta KL on validation prompts is the loss's own, and is run with five seeds.
 3. A few losses again, with other betas, older samplers, other group sizes, more of the person.
 4. Everything is measured on test prompts that no log holds (`learn.py`).

A run is one line of `runs.jsonl`, and is not done again when it is there: what was cut off goes on
where it stopped. The same seeds on a CPU give the same table. Prints the table as text, and one
JSON object on its last line; `report.py` draws the pictures from the lines alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from learn import judged, trained
from report import finish
from tasks import TASKS
from world import MIXED, World, make_log, make_world

from gvpo_offline.losses import LOSS_TYPES
from gvpo_offline.train.objective import Objective

BETA = {"change": 0.1, "carry": 0.1}
RATES = (3e-4, 1e-3, 3e-3)
SEEDS = 5
SWEPT = ("gvpo", "listwise", "dpo", "rft")
MODELS_ONLY = {"older": 3, "other": 2, "hot": 2}


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        task, loss, rate, seed: as named; the seed decides log, order and answers.
        beta: the loss's, and that of the figure it is judged by.
        mix: responses to a prompt, by sampler.
        sweep: which comparison it belongs to.
        validate: judged on validation prompts, not on test prompts.
    """

    task: str
    loss: str
    rate: float
    seed: int
    beta: float
    mix: dict[str, int] = field(default_factory=lambda: dict(MIXED))
    sweep: str = "losses"
    validate: bool = False

    @property
    def key(self) -> str:
        """What tells it from all others."""
        return json.dumps(asdict(self), sort_keys=True)


@functools.cache
def _world(task: str) -> World:
    return make_world(task)


@functools.lru_cache(maxsize=4)
def _log(task: str, mix: str, seed: int) -> Any:
    return make_log(_world(task), json.loads(mix), seed)


def run(job: Job) -> dict[str, Any]:
    """Train and judge."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    world, log = _world(job.task), _log(job.task, json.dumps(job.mix), job.seed)
    policy = trained(
        world, log, Objective(job.beta, job.loss), learning_rate=job.rate, seed=job.seed
    )
    prompts = world.validation if job.validate else world.test
    outcome = judged(world, policy, log, prompts, beta=job.beta, seed=job.seed)
    seconds = time.perf_counter() - started
    return {"job": asdict(job), **asdict(outcome), "seconds": round(seconds, 2)}


def tuning(tasks: tuple[str, ...]) -> Iterator[Job]:
    """Every loss with every rate, on validation prompts."""
    for task in tasks:
        for loss in LOSS_TYPES:
            mix = MODELS_ONLY if loss == "topr" else MIXED
            for rate in RATES:
                yield Job(task, loss, rate, 0, BETA[task], dict(mix), validate=True)


def best_rates(rows: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """By task and loss."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        job = row["job"]
        place = (job["task"], job["loss"])
        if job["validate"] and row["objective"] > best.get(place, {"objective": -1e9})["objective"]:
            best[place] = row
    return {place: row["job"]["rate"] for place, row in best.items()}


def comparisons(rates: dict[tuple[str, str], float]) -> Iterator[Job]:
    """Each loss with its own rate and five seeds; then what moves with what."""
    for (task, loss), rate in rates.items():
        beta = BETA[task]
        mixes = {"losses": MIXED} if loss != "topr" else {}
        if loss in ("topr", "gvpo", "listwise"):
            mixes["models only"] = MODELS_ONLY
        for sweep, mix in mixes.items():
            for seed in range(1, SEEDS + 1):
                yield Job(task, loss, rate, seed, beta, dict(mix), sweep)
        if loss in SWEPT:
            yield from sweeps(task, loss, rate, beta)


def sweeps(task: str, loss: str, rate: float, beta: float) -> Iterator[Job]:
    """Betas, staleness of the sampler, group sizes, the person's share; two seeds each."""
    mixes = {
        "sampler": [{name: 7} for name in ("policy", "older", "oldest", "other", "person")],
        "group size": [{"older": k, "hot": k} for k in (1, 2, 4)],
        "person": [{"older": 8 - n, "person": n} for n in (0, 2, 4, 6) if n < 8],
    }
    for seed in (1, 2):
        for other in (beta / 4, beta / 2, 2 * beta, 4 * beta):
            yield Job(task, loss, rate, seed, other, dict(MIXED), "beta")
        for sweep, values in mixes.items():
            for mix in values:
                yield Job(task, loss, rate, seed, beta, mix, sweep)


def done(path: Path) -> dict[str, dict[str, Any]]:
    """The runs of earlier attempts, by key; a last line that was cut off is left out."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[Job(**row["job"]).key] = row
    return rows


def run_all(jobs: list[Job], path: Path, workers: int) -> list[dict[str, Any]]:
    """All jobs, those of `path` left out; one line each as they finish."""
    found = done(path)
    pending = [job for job in jobs if job.key not in found]
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers) as pool, path.open("a") as file:
        for number, row in enumerate(pool.imap_unordered(run, pending), 1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            found[Job(**row["job"]).key] = row
            job = row["job"]
            print(
                f"[{number}/{len(pending)}] {job['task']} {job['sweep']} {job['loss']} "
                f"{job['rate']:g}: reward {row['reward']:.3f}, KL {row['kl']:.2f}, "
                f"{row['objective']:.3f}; {row['seconds']} s",
                flush=True,
            )
    return [found[job.key] for job in jobs]


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description="Every loss on the same logs.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/study"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    given = parser.parse_args()
    given.output_dir.mkdir(parents=True, exist_ok=True)
    path = given.output_dir / "runs.jsonl"
    started = time.perf_counter()
    tuned = run_all(list(tuning(tuple(given.tasks))), path, given.workers)
    rates = best_rates(tuned)
    rows = run_all(list(comparisons(rates)), path, given.workers)
    finish(rows, rates, given.output_dir, time.perf_counter() - started)


if __name__ == "__main__":
    main()
