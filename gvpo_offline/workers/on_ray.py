"""Actors on a Ray cluster, or on a Ray of this machine that is started for the run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from gvpo_offline.errors import ConfigError, GVPOError
from gvpo_offline.store.commit import TaskRecord
from gvpo_offline.workers.local import died, do
from gvpo_offline.workers.settings import WorkerSettings
from gvpo_offline.workers.stage import Stage, Task

# Machines of a cluster go away; an actor that was lost is made anew and its task done again.
_RESTARTS = 2


class _Actor:
    """A stage that is ready to work, in a process of the cluster's."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._started = False

    def work(self, task: Task) -> TaskRecord | GVPOError:
        """The task's record. Errors of the user's come as values: as exceptions, Ray would wrap
        them.
        """
        try:
            if not self._started:
                self._stage.start()
                self._started = True
            return do(self._stage, task)
        except GVPOError as error:
            return error


def run_ray(
    stage: Stage, tasks: Sequence[Task], settings: WorkerSettings
) -> Iterator[tuple[Task, TaskRecord]]:
    """Do tasks in `workers` actors, and yield each as it is done.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
        WorkerError: an actor died again and again; names its task.
        Exception: whatever a task raised.
    """
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        connect(ray, settings)
    try:
        kind = ray.remote(_Actor).options(
            num_cpus=1,
            num_gpus=settings.gpus_per_worker,
            max_restarts=_RESTARTS,
            max_task_retries=_RESTARTS,
        )
        actors = [kind.remote(stage) for _ in range(min(settings.workers, len(tasks)))]
        try:
            yield from _share_out(ray, stage, actors, tasks)
        finally:
            for actor in actors:
                ray.kill(actor)
    finally:
        if ours:
            ray.shutdown()


def _share_out(
    ray: Any, stage: Stage, actors: Sequence[Any], tasks: Sequence[Task]
) -> Iterator[tuple[Task, TaskRecord]]:
    waiting = list(reversed(tasks))
    doing: dict[Any, tuple[Any, Task]] = {}

    def give(actor: Any) -> None:
        if waiting:
            task = waiting.pop()
            doing[actor.work.remote(task)] = (actor, task)

    for actor in actors:
        give(actor)
    while doing:
        for reference in ray.wait(list(doing))[0]:
            actor, task = doing.pop(reference)
            try:
                answer = ray.get(reference)
            except ray.exceptions.RayActorError as error:
                raise died(stage, task, str(error).splitlines()[0]) from error
            if isinstance(answer, GVPOError):
                raise answer
            give(actor)
            yield task, answer


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "engine: ray needs the package ray",
            received="none installed",
            remedy="pip install 'gvpo-offline[ray]', or use engine: local",
        ) from error
    return ray


def connect(ray: Any, settings: WorkerSettings) -> None:
    """Connect to the cluster that the settings, or RAY_ADDRESS, name; or start Ray here.

    Raises:
        ConfigError: there is no cluster at the address.
    """
    address = settings.ray_address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": "warning"}
    if not address:
        # "local": not some cluster that happens to be known on this machine.
        cpus, gpus = settings.workers, settings.workers * settings.gpus_per_worker
        # The actors import what this process can.
        paths = {"env_vars": {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}}
        ray.init(
            "local",
            num_cpus=cpus,
            num_gpus=gpus,
            include_dashboard=False,
            runtime_env=paths,
            **quiet,
        )
        return
    try:
        ray.init(address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            "ray_address (or RAY_ADDRESS) is that of a running Ray cluster",
            received=f"{address} ({str(error).splitlines()[0]})",
            remedy="correct it, or leave it out to start Ray on this machine",
        ) from error
