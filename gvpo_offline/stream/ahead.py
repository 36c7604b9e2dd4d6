"""Prefetching: while one step is computed, a thread reads the next ones."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset, get_worker_info

from gvpo_offline.errors import GVPOError
from gvpo_offline.stream.steps import StepDataset, StepShare


class PrefetchDataset(Dataset[StepShare]):
    """A `StepDataset` that prefetches the steps after the one that was requested last.

    Items are equal to those of `steps`, in any order of requests. One thread reads, through open
    files of its own, so that other readers of the same datasets (for example an evaluation) are
    unaffected. After pickling or a fork nothing is prefetched yet.

    Args:
        steps: the steps to read.
        ahead: greatest number of prefetched steps; 0: none.
    """

    def __init__(self, steps: StepDataset, ahead: int) -> None:
        self.steps = steps
        self.ahead = ahead
        self._thread: _PrefetchThread | None = None

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> StepShare:
        # A loader's worker processes prefetch themselves, and none of them reads every step.
        if not self.ahead or get_worker_info() is not None or not 0 <= step < len(self):
            return self.steps[step]
        if self._thread is None or self._thread.process != os.getpid():
            self._thread = _PrefetchThread(_with_own_files(self.steps).__getitem__)
        return self._thread.get(step, range(step, min(step + 1 + self.ahead, len(self))))

    def __getitems__(self, steps: list[int]) -> list[StepShare | GVPOError]:
        """As `StepDataset.__getitems__`."""
        try:
            return [self[step] for step in steps]
        except GVPOError as error:
            return [error]

    def close(self) -> None:
        """Stop the thread; the next request starts another."""
        if self._thread is not None and self._thread.process == os.getpid():
            self._thread.close()
        self._thread = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_thread": None}


class _PrefetchThread:
    """One thread that reads steps in the order of the last request."""

    def __init__(self, read: Callable[[int], StepShare]) -> None:
        self.process = os.getpid()
        self._read = read
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gvpo-prefetch")
        self._reads: dict[int, Future[StepShare]] = {}

    def get(self, step: int, wanted: range) -> StepShare:
        """One step; the rest of `wanted` is read after it, and all other reads are cancelled."""
        for other in self._reads.keys() - set(wanted):
            self._reads.pop(other).cancel()
        for number in wanted:
            if number not in self._reads:
                self._reads[number] = self._pool.submit(self._read, number)
        return self._reads.pop(step).result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _with_own_files(steps: StepDataset) -> StepDataset:
    """A copy with open files of its own: copies of a dataset do not share open files."""
    own = copy.copy(steps)
    own.views = tuple(replace(view, dataset=copy.copy(view.dataset)) for view in steps.views)
    return own
