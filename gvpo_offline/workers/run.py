"""Runs a stage's tasks: committed tasks are skipped, and each task is committed when it is done."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Iterator, Sequence

from gvpo_offline.progress_bar import ProgressBar
from gvpo_offline.store.commit import TaskLog, TaskRecord
from gvpo_offline.workers.bar import OnProgress, TaskBar
from gvpo_offline.workers.settings import WorkerSettings
from gvpo_offline.workers.stage import Stage, Task

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def started(settings: WorkerSettings) -> Iterator[None]:
    """Keep the engine of several stages that run one after another: Ray is started once for all.

    Raises:
        ConfigError: as `run_stage`.
    """
    if settings.engine != "ray":
        yield
        return
    from gvpo_offline.workers.on_ray import session

    with session(settings):
        yield


def run_stage(stage: Stage, settings: WorkerSettings) -> list[TaskRecord] | None:
    """Run the tasks of a stage that are not committed yet.

    Any number of runs may work on one stage concurrently, on machines that share its folder; a task
    that two of them run is committed once.

    Args:
        stage: the stage.
        settings: the backend, and the shard of the tasks to run.

    Returns:
        The records of all tasks, in the stage's order, so that the caller can publish the result.
        None while tasks of other shards are missing; the run that finds all of them publishes.

    Raises:
        GVPOError: a task met invalid data or a full disk, or its worker died. Committed tasks are
            kept, and the same command continues from there.
    """
    tasks = stage.tasks()
    log = TaskLog(stage.root, stage.name)
    index, count = settings.shard_index_and_count
    own = tasks[index::count]
    records = {task.name: log.committed(task.name) for task in own}
    pending = [task for task in own if records[task.name] is None]
    finished = sum(task.size for task in own if records[task.name] is not None)
    with ProgressBar(
        desc=stage.name,
        total=sum(task.size for task in own),
        initial=finished,
        unit=f" {stage.unit}",
        disable=not settings.show_progress,
    ) as shown:
        bar = TaskBar(shown, finished)
        # Closed here, so that workers are killed at once when an exception ends the run.
        with contextlib.closing(_run_tasks(stage, pending, settings, bar.on_progress)) as done:
            for task, record in done:
                records[task.name] = log.commit(record)
                bar.commit(task.size)
    return _all_records(log, tasks, records)


def _run_tasks(
    stage: Stage, tasks: Sequence[Task], settings: WorkerSettings, on_progress: OnProgress
) -> Generator[tuple[Task, TaskRecord], None, None]:
    if not tasks:
        return
    if settings.engine == "ray":
        from gvpo_offline.workers.on_ray import run_ray

        yield from run_ray(stage, tasks, settings, on_progress)
    else:
        from gvpo_offline.workers.local import run_local

        yield from run_local(stage, tasks, settings, on_progress)


def _all_records(
    log: TaskLog, tasks: Sequence[Task], known: dict[str, TaskRecord | None]
) -> list[TaskRecord] | None:
    missing = [task for task in tasks if task.name not in known and not log.exists(task.name)]
    if missing:
        _log.info(
            "%s: this shard is done; %d of %d tasks belong to other shards that are not done, and "
            "the shard that finishes last publishes the result",
            *(log.stage, len(missing), len(tasks)),
        )
        return None
    records = [known.get(task.name) or log.committed(task.name) for task in tasks]
    return [record for record in records if record is not None]
