"""Reading ahead: while one step is computed, a thread reads the next ones."""

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
    """The steps of a `StepDataset`, with those that follow the one last asked for being read.

    The results are the same, whatever is asked for in whatever order; a reader that goes from step
    to step finds them ready. One thread reads, through open files of its own, so that whoever else
    reads the same datasets (an evaluation, say) is not disturbed. Pickled or forked, it begins
    again with nothing read.

    Args:
        steps: what to read.
        ahead: steps to hold ready at most; 0: none.
    """

    def __init__(self, steps: StepDataset, ahead: int) -> None:
        self.steps = steps
        self.ahead = ahead
        self._thread: _Thread | None = None

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> StepShare:
        # A loader's worker processes are ahead as it is, and none of them sees every step.
        if not self.ahead or get_worker_info() is not None or not 0 <= step < len(self):
            return self.steps[step]
        if self._thread is None or self._thread.process != os.getpid():
            self._thread = _Thread(_reader_of_its_own(self.steps).__getitem__)
        return self._thread.get(step, range(step, min(step + 1 + self.ahead, len(self))))

    def __getitems__(self, steps: list[int]) -> list[StepShare | GVPOError]:
        """As `StepDataset.__getitems__`; an error comes with the step that it belongs to."""
        try:
            return [self[step] for step in steps]
        except GVPOError as error:
            return [error]

    def close(self) -> None:
        """Stop reading; asked for another step, it begins again."""
        if self._thread is not None and self._thread.process == os.getpid():
            self._thread.close()
        self._thread = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_thread": None}


class _Thread:
    """One thread that reads steps in the order in which they were last asked for."""

    def __init__(self, read: Callable[[int], StepShare]) -> None:
        self.process = os.getpid()
        self._read = read
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._reads: dict[int, Future[StepShare]] = {}

    def get(self, step: int, wanted: range) -> StepShare:
        """One step, the rest of `wanted` being read after it and all else given up."""
        for other in self._reads.keys() - set(wanted):
            self._reads.pop(other).cancel()
        for number in wanted:
            if number not in self._reads:
                self._reads[number] = self._pool.submit(self._read, number)
        return self._reads.pop(step).result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _reader_of_its_own(steps: StepDataset) -> StepDataset:
    """The same steps through other open files: copying a dataset leaves those behind."""
    own = copy.copy(steps)
    own.views = tuple(replace(view, dataset=copy.copy(view.dataset)) for view in steps.views)
    return own
