"""Running a stage: what is done already is skipped, what is done is committed at once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Sequence

from tqdm import tqdm

from gvpo_offline.store.commit import TaskLog, TaskRecord
from gvpo_offline.workers.settings import WorkerSettings
from gvpo_offline.workers.stage import Stage, Task

_log = logging.getLogger(__name__)


def run_stage(stage: Stage, settings: WorkerSettings) -> list[TaskRecord] | None:
    """Do the tasks of a stage that are not committed yet.

    Any number of runs may work on one stage at a time, on any machines that share its folder: a
    task that two of them do is committed once.

    Args:
        stage: what to do.
        settings: where, and which share of it (`shard`).

    Returns:
        The records of all tasks, in the stage's order: there is something to publish. None where
        tasks of other shards are still to be done; whoever does the last of them publishes.

    Raises:
        GVPOError: a task met bad data, a full disk, or the death of its worker. What is committed
            stays, and the same command goes on from there.
    """
    tasks = stage.tasks()
    log = TaskLog(stage.root, stage.name)
    index, count = settings.part
    mine = tasks[index::count]
    records = {task.name: log.committed(task.name) for task in mine}
    left = [task for task in mine if records[task.name] is None]
    # Closed here, so that workers are killed at once whatever ends the run.
    with (
        contextlib.closing(_engine(stage, left, settings)) as done,
        tqdm(
            desc=stage.name,
            total=sum(task.size for task in mine),
            initial=sum(task.size for task in mine if records[task.name] is not None),
            unit=f" {stage.unit}",
            disable=not settings.show_progress,
        ) as bar,
    ):
        for task, record in done:
            records[task.name] = log.commit(record)
            bar.update(task.size)
    return _all_records(log, tasks, records)


def _engine(
    stage: Stage, tasks: Sequence[Task], settings: WorkerSettings
) -> Generator[tuple[Task, TaskRecord], None, None]:
    if not tasks:
        return
    if settings.engine == "ray":
        from gvpo_offline.workers.on_ray import run_ray

        yield from run_ray(stage, tasks, settings)
    else:
        from gvpo_offline.workers.local import run_local

        yield from run_local(stage, tasks, settings)


def _all_records(
    log: TaskLog, tasks: Sequence[Task], known: dict[str, TaskRecord | None]
) -> list[TaskRecord] | None:
    missing = [task for task in tasks if task.name not in known and not log.exists(task.name)]
    if missing:
        _log.info(
            "%s: this shard is done; %d of %d tasks are left to others, and whoever does the last "
            "one publishes",
            *(log.stage, len(missing), len(tasks)),
        )
        return None
    records = [known.get(task.name) or log.committed(task.name) for task in tasks]
    return [record for record in records if record is not None]
