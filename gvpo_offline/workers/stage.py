"""A stage: work divided into tasks that can run on any machine, in any order, and more than once.

A task's files depend on the task alone and not on the worker, so processes of one machine, a
cluster and a job array give the same dataset, byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gvpo_offline.store.commit import TaskRecord


@dataclass(frozen=True)
class Task:
    """A task's name in the commit log, and its size in the stage's unit."""

    name: str
    size: int


class Stage(Protocol):
    """What workers run. Picklable; expensive objects such as a model are made in `start`.

    Attributes:
        root: the dataset's folder, which holds the commit records.
        name: the folder of the commit records; it contains a hash of all inputs of the files.
        unit: the unit of sizes: groups, responses.
    """

    root: Path
    name: str
    unit: str

    def tasks(self) -> Sequence[Task]:
        """All tasks; the same on each call."""

    def start(self) -> None:
        """Prepare the worker process; called once in each before its first task."""

    def work(self, task: Task) -> TaskRecord:
        """Run one task: write its files and return the record, which `run_stage` commits.

        What it finishes on the way it counts with `progress.advance`, up to the task's size.

        Raises:
            GVPOError: an error in the data or the settings; ends the run. Committed tasks are kept.
        """
