"""Compare all losses on the same logs, each with a learning rate of its own.

    python research/study/study.py --output_dir runs/study
    python research/study/study.py --output_dir runs/study-short --short

 1. For each task of `tasks.py`, models are pretrained, and 900 prompts are answered by an older
    checkpoint, another model, the policy at temperature 1.4, and a scripted person (`world.py`).
 2. `plan.py` lists the comparisons: all losses on that log, some on the policy's own answers, and a
    few with other betas, samplers, group sizes, and shares of the person's responses.
 3. Every comparison gets a learning rate of its own, by reward - beta KL on validation prompts with
    seed 0 (`rates.py`).
 4. With that rate it is run on further logs: seeds 2 to 6 for the comparisons of main interest, 2
    and 3 for the others. Seeds 0 and 1 were used to find the recommendation.
 5. The search of `gvpo-offline tune --judge sample` runs on the logs of seeds 2 and 3, beside a
    grid (`search.py`).

`--short` has `carry` and `change`, the losses of main interest, and seeds 1 and 2.

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
from functools import partial
from pathlib import Path
from typing import Any

import plan
from jobs import Job, Row, Runner, in_processes, run_all
from rates import choose_rates
from report import finish
from search import Case, Search, grid, proposed
from tasks import TASKS
from world import frame_of, load_world, make_models

SHORT_TASKS = ("carry", "change")


def searched(found: Sequence[dict[str, Any]]) -> Iterator[plan.Labelled]:
    """Runs with the proposals of the searches, and a grid of betas, imitations and rates."""
    for own in found:
        task, seed = own["task"], own["seed"]
        yield "tune", f"proposed, {seed}", proposed(own)
        for job in grid(task, seed):
            setting = f"beta {job.beta:g}, imitation {job.imitation:g}, rate {job.rate:g}, {seed}"
            yield "grid", setting, job


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description="Every loss on the same logs.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/study"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS))
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--short", action="store_true", help="fewer losses, tasks and seeds")
    given = parser.parse_args()
    tasks: list[str] = given.tasks or list(SHORT_TASKS if given.short else TASKS)
    folder: Path = given.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = "1"
    runner = Runner(folder / "worlds")
    models = sorted({TASKS[task].models for task in tasks}, reverse=True)  # the longest first
    for _ in in_processes(partial(_make, folder=runner.folder), models, given.workers):
        pass
    run = partial(run_all, runner=runner, path=folder / "runs.jsonl", workers=given.workers)
    entries = (plan.short_plan if given.short else plan.full_plan)(tasks)
    rates = choose_rates({entry.name: entry.point for entry in entries}, run)
    (folder / "rates.json").write_text(json.dumps(rates, indent=1) + "\n")
    cases: list[Case] = [] if given.short else [(task, n) for task in tasks for n in plan.FEW]
    found = in_processes(Search(runner, folder), cases, given.workers)
    searches = sorted(found, key=lambda own: (own["task"], own["seed"]))
    wanted = [*plan.comparisons(entries, rates), *searched(searches)]
    rows = {Job(**row["job"]).key: row for row in run([job for _, _, job in wanted])}
    labelled: list[tuple[str, str, Row]] = [
        (table, label, rows[job.key]) for table, label, job in wanted
    ]
    frames = {task: _frame(task, runner.folder) for task in tasks}
    finish(labelled, frames, searches, folder, seconds=time.perf_counter() - started)


def _make(models: str, folder: Path) -> None:
    make_models(models, folder / models)


def _frame(task: str, folder: Path) -> Any:
    path = folder / f"frame-{task}.json"
    if not path.exists():
        world = load_world(task, folder / TASKS[task].models)
        path.write_text(json.dumps(frame_of(world, plan.BETAS)))
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
