"""The settings of workers, common to all stages. None of them changes what a stage writes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Protocol

from gvpo_offline.errors import ConfigError
from gvpo_offline.ranges import check_ranges


@dataclass
class WorkerSettings:
    """Where the tasks of a stage run."""

    engine: Literal["local", "ray"] = "local"
    """Backend: local, processes on this machine; ray, actors on a Ray cluster whose machines share
    the dataset's folder (extra gvpo-offline[ray])."""
    workers: int = 1
    """Number of worker processes or actors. One local worker is this process itself."""
    gpus_per_worker: float = 0
    """GPUs reserved for each worker; Ray also takes a fraction. 0: local workers all see the GPUs
    that this process sees."""
    shard: str | None = None
    """Run every n-th task only, as job i of n, counted from 0: `i/n`. The job that finds all tasks
    done publishes the result."""
    ray_address: str | None = None
    """Address of a running Ray cluster, or auto. Default: RAY_ADDRESS, which Ray sets in its jobs;
    without it the run starts Ray on this machine."""
    show_progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError("workers is at least 1", received=self.workers)
        if self.gpus_per_worker < 0:
            raise ConfigError("gpus_per_worker is not negative", received=self.gpus_per_worker)
        if self.engine == "local" and self.gpus_per_worker % 1:
            raise ConfigError(
                "with engine: local each worker has a whole number of GPUs",
                received=f"gpus_per_worker: {self.gpus_per_worker:g}",
                remedy="use engine: ray, or leave gpus_per_worker at 0 to share them",
            )
        if self.engine == "local" and self.ray_address:
            raise ConfigError(
                "ray_address goes with engine: ray",
                received=f"engine: local with {self.ray_address}",
                remedy="set engine: ray",
            )
        self.shard_index_and_count  # noqa: B018 - raises on an invalid shard
        check_ranges(self)

    @property
    def shard_index_and_count(self) -> tuple[int, int]:
        """i and n of `shard`; 0 and 1 without one."""
        if self.shard is None:
            return 0, 1
        found = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        index, count = (int(found[1]), int(found[2])) if found else (0, 0)
        if index >= count:
            raise ConfigError(
                "shard is i/n with i from 0 to n - 1", received=self.shard, remedy="set 0/4, 1/4 …"
            )
        return index, count


class HasWorkers(Protocol):
    """The settings of a stage that has those of its workers among its own."""

    engine: Literal["local", "ray"]
    workers: int
    shard: str | None
    ray_address: str | None
    show_progress: bool


OWN_WORKERS = ("engine", "workers", "shard", "ray_address")
"""The fields of `HasWorkers` that never change what a stage writes, nor its record of it."""


def own_workers(config: HasWorkers) -> WorkerSettings:
    """The settings of workers that a stage has among its own.

    Raises:
        ConfigError: they contradict each other.
    """
    return WorkerSettings(
        engine=config.engine,
        workers=config.workers,
        shard=config.shard,
        ray_address=config.ray_address,
        show_progress=config.show_progress,
    )
