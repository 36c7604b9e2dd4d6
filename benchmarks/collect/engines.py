"""The overhead of a worker engine: the idle time of its workers between two tasks.

Each task records when it began and ended. The pauses of a worker between tasks contain everything
that is not work: dispatch, result, the commit with its fsync, the progress bar. The start of the
workers is measured separately, since it does not depend on the amount of work.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gvpo_offline.store.commit import TaskRecord
from gvpo_offline.workers.run import run_stage
from gvpo_offline.workers.settings import WorkerSettings
from gvpo_offline.workers.stage import Task

N_TASKS, TASK_S = 60, 0.2


class Waiting:
    """Tasks that sleep `TASK_S` seconds: their duration does not depend on the load."""

    name = "waiting-0123"
    unit = "tasks"

    def __init__(self, root: Path) -> None:
        self.root = root

    def tasks(self) -> Sequence[Task]:
        """`N_TASKS` tasks of equal size."""
        return [Task(f"{number:05d}", 1) for number in range(N_TASKS)]

    def start(self) -> None:
        """Nothing to load."""

    def work(self, task: Task) -> TaskRecord:
        """Sleep; records process id, begin and end in nanoseconds."""
        begin = time.time_ns()
        time.sleep(TASK_S)
        counts = {"process": os.getpid(), "begin": begin, "end": time.time_ns()}
        return TaskRecord(stage=self.name, task=task.name, counts=counts)


def overhead(records: Sequence[TaskRecord]) -> float:
    """The pauses of all workers divided by their work."""
    by_worker: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for record in records:
        counts = record.counts
        by_worker[counts["process"]].append((counts["begin"], counts["end"]))
    work = sum(end - begin for spans in by_worker.values() for begin, end in spans)
    pauses = 0
    for spans in by_worker.values():
        spans.sort()
        pauses += sum(late[0] - early[1] for early, late in itertools.pairwise(spans))
    return pauses / work


def measure(engine: str, workers: int) -> dict[str, float]:
    """The overhead of an engine, and the seconds until its first task began."""
    with tempfile.TemporaryDirectory(prefix="gvpo-offline-engines-") as folder:
        started = time.time_ns()
        settings = WorkerSettings(engine=engine, workers=workers, show_progress=False)  # type: ignore[arg-type]
        records = run_stage(Waiting(Path(folder)), settings)
    assert records is not None
    first = min(record.counts["begin"] for record in records)
    return {"overhead": round(overhead(records), 4), "start_s": round((first - started) / 1e9, 2)}


def run() -> dict[str, Any]:
    """Both engines with two workers, and the local engine with one."""
    found = {
        "local": measure("local", 2),
        "ray": measure("ray", 2),
        "local_one_worker": measure("local", 1),
    }
    return {
        "engine_overhead": {name: each["overhead"] for name, each in found.items()},
        "engine_start_s": {name: each["start_s"] for name, each in found.items()},
        "engine_task_s": TASK_S,
    }


if __name__ == "__main__":
    print(json.dumps(run()))
