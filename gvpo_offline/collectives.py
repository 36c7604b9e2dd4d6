"""Collectives of a run's ranks that exchange Python objects and errors.

Each rank does its part and all ranks get the results. An error that one rank raises is raised on
every rank: otherwise the other ranks would wait for it until their timeout.

A rank that fails takes its error to its next exchange, wherever the other ranks are by then.
Therefore these functions may be nested in each other, but no other collective may lie in between.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from gvpo_offline.errors import GVPOError, WorkerError

Result = TypeVar("Result")
_SHARED = "_shared_with_all_ranks"


def rank_slice() -> slice:
    """This rank's slice of a sequence that all ranks hold."""
    if not dist.is_initialized():
        return slice(None)
    return slice(dist.get_rank(), None, dist.get_world_size())


def local_rank_slice() -> slice:
    """This rank's slice of what each machine holds: the ranks of one machine cover all of it.

    Uses LOCAL_RANK and LOCAL_WORLD_SIZE, which launchers set; without them the slice is everything.
    """
    if not dist.is_initialized():
        return slice(None)
    rank, n_ranks = (int(os.environ.get(f"LOCAL_{name}", -1)) for name in ("RANK", "WORLD_SIZE"))
    return slice(rank, None, n_ranks) if 0 <= rank < n_ranks else slice(None)


def raise_together(work: Callable[[], Result]) -> Result:
    """Run `work` on this rank, and raise on all ranks if it raised on any.

    Every rank must call this.

    Returns:
        This rank's result.

    Raises:
        GVPOError: the error of the lowest rank that raised one.
        WorkerError: a rank raised another exception; that rank raises its own.
    """
    result, error = _attempt(work)
    _exchange(None, error)
    return result  # type: ignore[return-value]


def gather_results(work: Callable[[], Result]) -> list[Result]:
    """Run `work` on each rank and gather the results, in the order of ranks.

    Every rank must call this.

    Raises:
        GVPOError, WorkerError: as `raise_together`.
    """
    return _exchange(*_attempt(work))


def broadcast_from_rank0(work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0 alone and broadcast its result; every rank must call this.

    Raises:
        GVPOError, WorkerError: as `raise_together`.
    """
    if not dist.is_initialized():
        return work()
    result, error = _attempt(work) if dist.get_rank() == 0 else (None, None)
    _exchange(None, error)
    box = [result]  # not gathered: that would take its size from every rank, on every rank
    dist.broadcast_object_list(box)
    return box[0]  # type: ignore[return-value]


def _attempt(work: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    if not dist.is_initialized():
        return work(), None
    try:
        return work(), None
    except Exception as error:
        if hasattr(error, _SHARED):  # raised by a nested exchange: no rank waits for this error
            raise
        return None, error


def _exchange(result: Any, failure: Exception | None) -> list[Any]:
    """The results of all ranks, or the error of one."""
    if not dist.is_initialized():
        return [result]
    shared: Exception | None = failure
    if failure is not None and not isinstance(failure, GVPOError):
        shared = WorkerError(
            "every rank does its part",
            received=f"{type(failure).__name__} on rank {dist.get_rank()}: {failure}",
            remedy="see that rank's traceback",
        )
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (result, shared))
    failures = [error for _, error in found if error is not None]
    if failures:
        raised = failures[0] if failure is None or failure is shared else failure
        setattr(raised, _SHARED, True)
        raise raised
    return [result for result, _ in found]
