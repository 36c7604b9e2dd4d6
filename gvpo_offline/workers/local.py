"""The backend `local`: this process, or worker processes on this machine."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any

from gvpo_offline.errors import WorkerError
from gvpo_offline.store.commit import TaskLog, TaskRecord
from gvpo_offline.workers.bar import OnProgress
from gvpo_offline.workers.process import MAIN_GUARD, Handler, WorkerDeathError, WorkerProcess
from gvpo_offline.workers.progress import reporting
from gvpo_offline.workers.settings import WorkerSettings
from gvpo_offline.workers.stage import Stage, Task

_DEVICES = "CUDA_VISIBLE_DEVICES"
_POLL_S = 0.5  # between two looks at the counts of the workers


def run_local(
    stage: Stage, tasks: Sequence[Task], settings: WorkerSettings, on_progress: OnProgress = None
) -> Iterator[tuple[Task, TaskRecord]]:
    """Run tasks in this process, or in `workers` others, and yield each when it is done.

    Args:
        stage, tasks, settings: what to run, and where.
        on_progress: called with what the running tasks have counted.

    Raises:
        WorkerError: a worker process died; names its task.
        Exception: as the task raised it.
    """
    n_workers = min(settings.workers, len(tasks))
    if n_workers == 1 and not settings.gpus_per_worker:
        stage.start()
        for task in tasks:
            with reporting(on_progress):
                record = run_task(stage, task)
            yield task, record
        return
    workers: dict[Any, WorkerProcess] = {}
    try:
        for number in range(n_workers):
            devices = _visible_devices(number, int(settings.gpus_per_worker))
            worker = WorkerProcess(functools.partial(_prepare, stage, devices))
            workers[worker.connection] = worker
        yield from _dispatch(stage, workers, tasks, on_progress)
    finally:
        for worker in workers.values():
            worker.kill()


def run_task(stage: Stage, task: Task) -> TaskRecord:
    """A task's record, which another run may have committed meanwhile."""
    return TaskLog(stage.root, stage.name).committed(task.name) or stage.work(task)


def _dispatch(
    stage: Stage,
    workers: dict[Any, WorkerProcess],
    tasks: Sequence[Task],
    on_progress: OnProgress,
) -> Iterator[tuple[Task, TaskRecord]]:
    """Send the next task to each idle worker."""
    pending = list(reversed(tasks))
    # A worker's first reply says that it is ready, and belongs to no task.
    running: dict[Any, Task | None] = dict.fromkeys(workers)
    before = dict.fromkeys(workers, 0.0)  # what each worker had counted before its present task
    while running:
        ready = wait(list(running), None if on_progress is None else _POLL_S)
        if on_progress is not None:
            on_progress(sum(workers[own].counted - before[own] for own in running))
        for connection in ready:
            task = running.pop(connection)
            try:
                reply = workers[connection].receive()
            except WorkerDeathError as death:
                raise worker_died(stage, task, str(death)) from None
            before[connection] = workers[connection].counted
            if pending:
                running[connection] = pending.pop()
                workers[connection].send(running[connection])
            if task is not None:
                yield task, reply


def worker_died(stage: Stage, task: Task | None, how: str) -> WorkerError:
    """The error for a worker process that died during a task, or (None) before its first."""
    rule = f"a worker process of {stage.name} runs until its tasks are done"
    if task is None:
        return WorkerError(rule, received=f"one that died at its start: {how}", remedy=MAIN_GUARD)
    return WorkerError(
        rule,
        received=f"one that died at task {task.name}: {how}",
        remedy="find out what killed it (memory, a crash of native code) and run the same command "
        "again; committed tasks are kept",
    )


def _prepare(stage: Stage, devices: str | None) -> Handler:
    if devices is not None:
        os.environ[_DEVICES] = devices
    stage.start()
    return functools.partial(run_task, stage)


def _visible_devices(number: int, each: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of worker `number`, with `each` GPUs; None to inherit it."""
    if not each:
        return None
    given = [name for name in os.environ.get(_DEVICES, "").split(",") if name]
    indices = range(number * each, (number + 1) * each)
    return ",".join(given[i] if i < len(given) else str(i) for i in indices)
