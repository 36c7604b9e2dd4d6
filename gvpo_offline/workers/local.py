"""Processes of one machine."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any

from gvpo_offline.errors import WorkerError
from gvpo_offline.store.commit import TaskLog, TaskRecord
from gvpo_offline.workers.process import MAIN_GUARD, Answer, Worker, WorkerDeathError
from gvpo_offline.workers.settings import WorkerSettings
from gvpo_offline.workers.stage import Stage, Task

_DEVICES = "CUDA_VISIBLE_DEVICES"


def run_local(
    stage: Stage, tasks: Sequence[Task], settings: WorkerSettings
) -> Iterator[tuple[Task, TaskRecord]]:
    """Do tasks in this process, or in `workers` others, and yield each as it is done.

    Raises:
        WorkerError: a worker died; names its task.
        Exception: whatever a task raised.
    """
    n_workers = min(settings.workers, len(tasks))
    if n_workers == 1 and not settings.gpus_per_worker:
        stage.start()
        for task in tasks:
            yield task, do(stage, task)
        return
    workers: dict[Any, Worker] = {}
    try:
        for number in range(n_workers):
            devices = _devices(number, int(settings.gpus_per_worker))
            worker = Worker(functools.partial(_prepare, stage, devices))
            workers[worker.connection] = worker
        yield from _share_out(stage, workers, tasks)
    finally:
        for worker in workers.values():
            worker.kill()


def do(stage: Stage, task: Task) -> TaskRecord:
    """A task's record: what another run has committed by now, or else the work done here."""
    return TaskLog(stage.root, stage.name).committed(task.name) or stage.work(task)


def _share_out(
    stage: Stage, workers: dict[Any, Worker], tasks: Sequence[Task]
) -> Iterator[tuple[Task, TaskRecord]]:
    """Give every worker that is free the next task."""
    waiting = list(reversed(tasks))
    # The first answer of a worker says that it is ready.
    doing: dict[Any, Task | None] = dict.fromkeys(workers)
    while doing:
        for connection in wait(list(doing)):
            task = doing.pop(connection)
            try:
                answer = workers[connection].receive()
            except WorkerDeathError as death:
                raise died(stage, task, str(death)) from None
            if waiting:
                doing[connection] = waiting.pop()
                workers[connection].send(doing[connection])
            if task is not None:
                yield task, answer


def died(stage: Stage, task: Task | None, how: str) -> WorkerError:
    """The error for a worker that died at a task, or (None) before its first."""
    rule = f"a worker of {stage.name} lives until its tasks are done"
    if task is None:
        return WorkerError(rule, received=f"one that died as it began: {how}", remedy=MAIN_GUARD)
    return WorkerError(
        rule,
        received=f"one that died at task {task.name}: {how}",
        remedy="look for what killed it (memory, a crash of native code) and run the same command "
        "again: committed tasks are kept",
    )


def _prepare(stage: Stage, devices: str | None) -> Answer:
    if devices is not None:
        os.environ[_DEVICES] = devices
    stage.start()
    return functools.partial(do, stage)


def _devices(number: int, each: int) -> str | None:
    """What CUDA_VISIBLE_DEVICES is for worker `number`; None: as it is."""
    if not each:
        return None
    given = [name for name in os.environ.get(_DEVICES, "").split(",") if name]
    indices = range(number * each, (number + 1) * each)
    return ",".join(given[i] if i < len(given) else str(i) for i in indices)
