"""The backend `ray`: actors on a Ray cluster, or on a Ray that the run starts on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from gvpo_offline.errors import ConfigError, GVPOError
from gvpo_offline.store.commit import TaskRecord
from gvpo_offline.workers.local import run_task, worker_died
from gvpo_offline.workers.settings import WorkerSettings
from gvpo_offline.workers.stage import Stage, Task

# Clusters lose machines: Ray restarts a lost actor and runs its task again.
_RESTARTS = 2


class _Actor:
    """A stage in a worker process of the cluster."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._started = False

    def work(self, task: Task) -> TaskRecord | GVPOError:
        """The task's record, or a GVPOError as a value, since Ray would wrap an exception."""
        try:
            if not self._started:
                self._stage.start()
                self._started = True
            return run_task(self._stage, task)
        except GVPOError as error:
            return error


def run_ray(
    stage: Stage, tasks: Sequence[Task], settings: WorkerSettings
) -> Iterator[tuple[Task, TaskRecord]]:
    """Run tasks in `workers` actors, and yield each when it is done.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
        WorkerError: an actor died more often than it is restarted; names its task.
        Exception: as the task raised it.
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
            yield from _dispatch(ray, stage, actors, tasks)
        finally:
            for actor in actors:
                ray.kill(actor)
    finally:
        if ours:
            ray.shutdown()


def _dispatch(
    ray: Any, stage: Stage, actors: Sequence[Any], tasks: Sequence[Task]
) -> Iterator[tuple[Task, TaskRecord]]:
    """Send the next task to each idle actor."""
    pending = list(reversed(tasks))
    running: dict[Any, tuple[Any, Task]] = {}

    def send_next(actor: Any) -> None:
        if pending:
            task = pending.pop()
            running[actor.work.remote(task)] = (actor, task)

    for actor in actors:
        send_next(actor)
    while running:
        for reference in ray.wait(list(running))[0]:
            actor, task = running.pop(reference)
            try:
                reply = ray.get(reference)
            except ray.exceptions.RayActorError as error:
                raise worker_died(stage, task, str(error).splitlines()[0]) from error
            if isinstance(reply, GVPOError):
                raise reply
            send_next(actor)
            yield task, reply


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
    """Connect to the cluster at `ray_address` or RAY_ADDRESS; without one start Ray here.

    Raises:
        ConfigError: there is no cluster at the address.
    """
    address = settings.ray_address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": "warning"}
    if not address:
        # "local": no other cluster that Ray finds on this machine.
        cpus, gpus = settings.workers, settings.workers * settings.gpus_per_worker
        # The actors import from the same places as this process.
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
            remedy="correct the address, or leave it out to start Ray on this machine",
        ) from error
