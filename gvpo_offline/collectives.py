"""Work that the ranks of a run do together before its first step, and when it saves.

Each does a part and all know the results; and what one of them raises, all of them raise. Without
that, an error on one rank would leave the others waiting for it.

Every function here is one exchange, or several. A rank that fails goes to its next exchange with
its error in hand, wherever the others are by then; so these may be nested in each other, but not
with other collectives in between.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from gvpo_offline.errors import GVPOError, WorkerError

Result = TypeVar("Result")
_TOLD = "_told_to_all_ranks"


def own_part() -> slice:
    """Of a sequence that every rank sees: what this rank looks at."""
    if not dist.is_initialized():
        return slice(None)
    return slice(dist.get_rank(), None, dist.get_world_size())


def own_part_of_machine() -> slice:
    """Of what lies on each machine: what this rank looks at, so that the machine's ranks see all.

    By the variables that launchers set; without them a rank looks at everything.
    """
    if not dist.is_initialized():
        return slice(None)
    rank, n_ranks = (int(os.environ.get(f"LOCAL_{name}", -1)) for name in ("RANK", "WORLD_SIZE"))
    return slice(rank, None, n_ranks) if 0 <= rank < n_ranks else slice(None)


def all_or_none(work: Callable[[], Result]) -> Result:
    """This rank's result of `work`, once every rank has one; every rank has to call.

    Raises:
        GVPOError: of the first rank that raised one.
        WorkerError: a rank raised something else, which it shows itself.
    """
    result, error = _attempt(work)
    _exchange(None, error)
    return result  # type: ignore[return-value]


def on_each(work: Callable[[], Result]) -> list[Result]:
    """What `work` gives on each rank, in their order; every rank has to call.

    Raises:
        GVPOError, WorkerError: as `all_or_none`.
    """
    return _exchange(*_attempt(work))


def on_first(work: Callable[[], Result]) -> Result:
    """What `work` gives on the first rank, which alone does it; every rank has to call.

    Raises:
        GVPOError, WorkerError: as `all_or_none`.
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
        if hasattr(error, _TOLD):  # in an exchange inside: no rank is waiting for this one
            raise
        return None, error


def _exchange(result: Any, failure: Exception | None) -> list[Any]:
    """The results of all ranks, or the error of one."""
    if not dist.is_initialized():
        return [result]
    told: Exception | None = failure
    if failure is not None and not isinstance(failure, GVPOError):
        told = WorkerError(
            "every rank does its part",
            received=f"{type(failure).__name__} on rank {dist.get_rank()}: {failure}",
            remedy="see that rank's traceback",
        )
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (result, told))
    failures = [error for _, error in found if error is not None]
    if failures:
        raised = failures[0] if failure is None or failure is told else failure
        setattr(raised, _TOLD, True)
        raise raised
    return [result for result, _ in found]
