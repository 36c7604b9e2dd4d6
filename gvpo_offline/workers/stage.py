"""A stage: work cut into tasks that can be done anywhere, in any order, more than once.

A task's files depend on the task alone, not on who did it, so that processes of one machine, a
cluster or the tasks of a job array give the same dataset, byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gvpo_offline.store.commit import TaskRecord


@dataclass(frozen=True)
class Task:
    """One piece of a stage's work: its name in the commit log, and its size in the stage's unit."""

    name: str
    size: int


class Stage(Protocol):
    """What an engine runs. Picklable; whatever is expensive (a model) is made in `start`.

    Attributes:
        root: the dataset's folder, which holds the commit records.
        name: the folder of the commit records; it holds a hash of all that the files depend on.
        unit: what sizes are counted in: groups, responses.
    """

    root: Path
    name: str
    unit: str

    def tasks(self) -> Sequence[Task]:
        """All tasks, the same ones each time it is asked."""

    def start(self) -> None:
        """Get ready in the process that is about to work; called once in each."""

    def work(self, task: Task) -> TaskRecord:
        """Do one task: write its files and return the record, which the engine commits.

        Raises:
            GVPOError: a mistake of the user's; ends the run. Committed tasks stay.
        """
