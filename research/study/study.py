"""Compare all losses on the same logs, each with a tuned learning rate.

    python research/study/study.py --output_dir runs/study

 1. For each task of `tasks.py`, models are pretrained, and 900 prompts are answered by an older
    checkpoint, another model, the policy at temperature 1.4, and a scripted person (`world.py`).
 2. Every loss trains the policy on that log with three learning rates; if the best is the smallest
    or largest, the next one is tried as well. The rate with the best reward - beta KL on validation
    prompts is selected.
 3. With this rate every loss is run with five seeds, each with a log of its own.
 4. GVPO and a few other losses are run again with other betas, samplers, group sizes, shares of the
    person's responses, numbers of steps, and in rounds.
 5. `search.py` proposes beta and rate from the log alone; they are compared with a grid.

Policies are evaluated on test prompts that are in no log (`learn.py`). A run is one line of
`runs.jsonl` (`jobs.py`) and is not repeated: an interrupted study resumes. The same seeds on the
same type of CPU give the same tables. Prints the tables, and one JSON object on the last line;
writes `tables.md`, `study.json`, and pictures (`report.py`, `draw.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jobs import BETA, STEPS, Job, Row, Runner, in_processes, run_all
from report import finish
from search import Search
from tasks import TASKS
from world import MIXED, frame_of, load_world, make_models

from gvpo_offline.losses import LOSS_TYPES

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
FIRST = RATES[2:5]
SEEDS = range(1, 6)
FEW = range(1, 3)
BETAS = (BETA / 4, BETA / 2, BETA, 2 * BETA, 4 * BETA)
MODELS_ONLY = {"older": 3, "other": 2, "hot": 2}
Best = dict[tuple[str, str], Job]
# A comparison: its name, the setting, the run.
Comparison = tuple[str, str, Job]


def tune_rates(tasks: Sequence[str], run: Any) -> Best:
    """The job with the best learning rate of each loss, by task and loss."""
    best: Best = {}
    tried = {(task, loss): list(FIRST) for task in tasks for loss in LOSS_TYPES}
    while tried.keys() - best.keys():
        rows = run(
            [
                Job(task, loss, rate, 0, mix=_mix(loss), validate=True)
                for (task, loss), rates in tried.items()
                for rate in rates
            ]
        )
        for (task, loss), rates in tried.items():
            own = [r for r in rows if (r["job"]["task"], r["job"]["loss"]) == (task, loss)]
            job = Job(**max(own, key=lambda row: row["objective"])["job"])
            at = RATES.index(job.rate)
            beyond = {min(rates): at - 1, max(rates): at + 1}.get(job.rate, -1)
            if 0 <= beyond < len(RATES):
                rates.append(RATES[beyond])
            else:
                best[task, loss] = replace(job, validate=False)
    return best


def _mix(loss: str) -> dict[str, int]:
    """The samplers of a log; topr needs sampler log-probs, so its logs have no person."""
    return dict(MODELS_ONLY if loss == "topr" else MIXED)


def comparisons(tasks: Sequence[str], best: Best) -> Iterator[Comparison]:
    """All comparisons, the most important first."""
    for task in tasks:
        yield from losses(task, best)
    for task in tasks:
        yield from moved(task, best)


def losses(task: str, best: Best) -> Iterator[Comparison]:
    """Comparison of all losses on the same logs."""
    for seed in SEEDS:
        yield "losses", "untouched", Job(task, "none", 0.0, seed)
        for loss in LOSS_TYPES:
            if loss != "topr":
                yield "losses", loss, replace(best[task, loss], seed=seed)
        gvpo = replace(best[task, "gvpo"], seed=seed)
        yield "losses", "gvpo, anchor 0.1", replace(gvpo, anchor=0.1)
        yield "losses", "gvpo, inverse length", replace(gvpo, weights="inverse_length")
        for loss in ("topr", "gvpo", "rft"):
            job = replace(best[task, loss], seed=seed, mix=dict(MODELS_ONLY))
            yield "models only", loss, job


def moved(task: str, best: Best) -> Iterator[Comparison]:
    """GVPO and other losses with one setting changed at a time."""
    gvpo, rft = best[task, "gvpo"], best[task, "rft"]
    mixes = {
        "sampler": {name: {name: 7} for name in ("policy", "hot", "older", "oldest", "other")},
        "group size": {f"{2 * k}": {"older": k, "hot": k} for k in (1, 2, 4)},
        "person": {f"{n} of 8": {"older": 8 - n, "person": n} for n in (0, 2, 4, 6)},
    }
    for seed in FEW:
        for beta in BETAS:
            for job in (gvpo, best[task, "listwise"], best[task, "awr"]):
                yield "beta", f"{job.loss}, {beta:g}", replace(job, seed=seed, beta=beta)
        for sweep, own in mixes.items():
            for label, mix in own.items():
                given = {name: n for name, n in mix.items() if n}
                for job in (gvpo, rft):
                    yield sweep, f"{job.loss}, {label}", replace(job, seed=seed, mix=given)
        for steps in (STEPS // 2, STEPS, 4 * STEPS):
            yield "steps", f"gvpo, {steps}", replace(gvpo, seed=seed, steps=steps)
        for rounds in (1, 2, 4):
            far = replace(gvpo, seed=seed, beta=BETA / 4, rounds=rounds)
            yield "rounds at a quarter of beta", f"gvpo, {rounds}", far
        yield "ways", "gvpo after rft", replace(gvpo, seed=seed, start="rft")
        yield "ways", "gvpo, unequal groups alone", replace(gvpo, seed=seed, equal_groups=False)
    for seed in SEEDS:
        for rounds in (1, 2, 4):
            yield "rounds", f"gvpo, {rounds}", replace(gvpo, seed=seed, rounds=rounds)


def proposed(searches: Sequence[dict[str, Any]]) -> Iterator[Comparison]:
    """Runs with the proposals of the searches, and a grid of betas and rates."""
    for found in searches:
        for name in ("rate", "both"):
            own = found[name]
            yield (
                f"tune {name}",
                "proposed",
                Job(found["task"], "gvpo", own["rate"], 1, own["beta"]),
            )
        for beta in BETAS:
            for rate in (3e-5, *FIRST):
                yield "grid", f"{beta:g}, {rate:g}", Job(found["task"], "gvpo", rate, 1, beta)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description="Every loss on the same logs.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/study"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    given = parser.parse_args()
    folder: Path = given.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = "1"
    runner = Runner(folder / "worlds")
    for _ in in_processes(partial(_make, folder=runner.folder), given.tasks, given.workers):
        pass
    run = partial(run_all, runner=runner, path=folder / "runs.jsonl", workers=given.workers)
    best = tune_rates(given.tasks, run)
    search = Search(runner, folder)
    searches = sorted(in_processes(search, given.tasks, given.workers), key=lambda s: s["task"])
    wanted = [*comparisons(given.tasks, best), *proposed(searches)]
    rows = {Job(**row["job"]).key: row for row in run([job for _, _, job in wanted])}
    labelled: list[tuple[str, str, Row]] = [
        (sweep, label, rows[job.key]) for sweep, label, job in wanted
    ]
    frames = {task: _frame(task, runner.folder) for task in given.tasks}
    finish(labelled, frames, searches, folder, seconds=time.perf_counter() - started)


def _make(task: str, folder: Path) -> None:
    make_models(task, folder / task)


def _frame(task: str, folder: Path) -> Any:
    path = folder / task / "frame.json"
    if not path.exists():
        path.write_text(json.dumps(frame_of(load_world(task, folder / task), BETAS)))
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
