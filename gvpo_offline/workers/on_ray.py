"""The backend `ray`: actors on a Ray cluster, or on a Ray that the run starts on this machine."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gvpo_offline.errors import ConfigError, GVPOError
from gvpo_offline.store.commit import TaskRecord
from gvpo_offline.workers.bar import OnProgress
from gvpo_offline.workers.local import run_task, worker_died
from gvpo_offline.workers.progress import reporting
from gvpo_offline.workers.settings import WorkerSettings
from gvpo_offline.workers.stage import Stage, Task

# Clusters lose machines: Ray restarts a lost actor and runs its task again.
_RESTARTS = 2
_POLL_S = 1.0  # between two reports of an actor's count, and between two looks at all counts


class _Counts:
    """What the tasks that actors work on have counted, by task; an actor of its own."""

    def __init__(self) -> None:
        self._units: dict[str, float] = {}

    def report(self, task: str, units: float) -> None:
        self._units[task] = units

    def units(self) -> dict[str, float]:
        return self._units


class _Actor:
    """A stage in a worker process of the cluster; `counts` is told how far its task is."""

    def __init__(self, stage: Stage, counts: Any = None) -> None:
        self._counts = counts
        self._stage = stage
        self._started = False

    def work(self, task: Task) -> TaskRecord | GVPOError:
        """The task's record, or a GVPOError as a value, since Ray would wrap an exception."""
        try:
            if not self._started:
                self._stage.start()
                self._started = True
            with reporting(self._report_of(task)):
                return run_task(self._stage, task)
        except GVPOError as error:
            return error

    def _report_of(self, task: Task) -> Callable[[float], None] | None:
        if self._counts is None:
            return None
        last = -_POLL_S

        def report(units: float) -> None:
            nonlocal last
            if (now := time.monotonic()) - last >= _POLL_S:
                last = now
                self._counts.report.remote(task.name, units)

        return report


def run_ray(
    stage: Stage, tasks: Sequence[Task], settings: WorkerSettings, on_progress: OnProgress = None
) -> Iterator[tuple[Task, TaskRecord]]:
    """Run tasks in `workers` actors, and yield each when it is done.

    Args:
        stage, tasks, settings: what to run, and where.
        on_progress: called with what the running tasks have counted.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
        WorkerError: an actor died more often than it is restarted; names its task.
        Exception: as the task raised it.
    """
    ray = _ray()
    with session(settings):
        kind = ray.remote(_Actor).options(
            num_cpus=1,
            num_gpus=settings.gpus_per_worker,
            max_restarts=_RESTARTS,
            max_task_retries=_RESTARTS,
        )
        counts = None if on_progress is None else ray.remote(_Counts).options(num_cpus=0).remote()
        actors = [kind.remote(stage, counts) for _ in range(min(settings.workers, len(tasks)))]
        try:
            yield from _dispatch(ray, stage, actors, tasks, _Progress(ray, counts, on_progress))
        finally:
            for actor in [*actors, *([] if counts is None else [counts])]:
                ray.kill(actor)


@contextlib.contextmanager
def session(settings: WorkerSettings) -> Iterator[None]:
    """A connection to Ray, which is closed at the end unless there was one before.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        connect(ray, settings)
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


class _Progress:
    """Passes on what the running tasks have counted."""

    def __init__(self, ray: Any, counts: Any, on_progress: OnProgress) -> None:
        self._ray, self._counts, self._on_progress = ray, counts, on_progress

    @property
    def timeout_s(self) -> float | None:
        """How long to wait for a task before the next look; None: for ever."""
        return None if self._on_progress is None else _POLL_S

    def look(self, running: Sequence[Task]) -> None:
        """Pass on the counts of some tasks. A cluster that is too busy to answer is not asked."""
        if self._on_progress is None:
            return
        with contextlib.suppress(self._ray.exceptions.RayError):
            units = self._ray.get(self._counts.units.remote(), timeout=_POLL_S)
            self._on_progress(sum(units.get(task.name, 0.0) for task in running))


def _dispatch(
    ray: Any, stage: Stage, actors: Sequence[Any], tasks: Sequence[Task], progress: _Progress
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
        ready = ray.wait(list(running), timeout=progress.timeout_s)[0]
        if not ready:
            progress.look([task for _, task in running.values()])
        for reference in ready:
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
