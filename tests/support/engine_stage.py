"""A stage that writes small files and fails on request; importable by workers."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from support.builders import make_groups

from gvpo_offline.errors import DataError
from gvpo_offline.store.commit import TaskRecord
from gvpo_offline.store.writer import write_groups
from gvpo_offline.workers.run import run_stage
from gvpo_offline.workers.settings import WorkerSettings
from gvpo_offline.workers.stage import Task

GROUPS_PER_TASK = 4


@dataclass
class Writing:
    """Each task writes four groups.

    Attributes:
        n_tasks: number of tasks.
        trouble: the fault: in task 2 "data" (a DataError), "crash" (another exception), "kill" (the
            process is killed) or "wait" (it writes its process id and sleeps); or "start" (the
            stage raises when it starts).
    """

    root: Path
    n_tasks: int = 5
    trouble: str = ""
    name: str = "writing-0123"
    unit: str = "groups"

    def tasks(self) -> Sequence[Task]:
        return [Task(f"{number:05d}", GROUPS_PER_TASK) for number in range(self.n_tasks)]

    def start(self) -> None:
        if self.trouble == "start":
            raise DataError("a stage starts", received="one that does not")

    def work(self, task: Task) -> TaskRecord:
        number = int(task.name)
        with (self.root / "attempts").open("a") as file:
            file.write(f"{task.name} {os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
        if number == 2:
            self._trouble()
        first = number * GROUPS_PER_TASK
        groups = make_groups(first + GROUPS_PER_TASK)[first:]
        return write_groups(self.root, self.name, task.name, groups, reward="reward")

    def _trouble(self) -> None:
        if self.trouble == "data":
            raise DataError("a group is good", received="a bad one", file="f", row=7, group="g")
        if self.trouble == "crash":
            raise KeyError("a fault")
        if self.trouble == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "wait":
            (self.root / "waiting").write_text(str(os.getpid()))
            time.sleep(600)


if __name__ == "__main__":  # root, trouble, workers
    # A test run in the background of a shell inherits that SIGINT is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_stage(
        Writing(Path(sys.argv[1]), trouble=sys.argv[2]),
        WorkerSettings(workers=int(sys.argv[3]), show_progress=False),
    )
