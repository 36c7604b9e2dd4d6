"""Passes over a dataset, one row group after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from gvpo_offline.errors import GVPOError
from gvpo_offline.store.dataset import GroupDataset

_AHEAD = 8


@dataclass(frozen=True)
class Pass:
    """The numbers of a dataset's row groups in order, for a pass that reads some columns of each.

    Over a network the next ones are brought into the cache meanwhile, so that a pass takes the time
    of its bytes and not of as many round trips. What is wrong with one is said when it is read.

    Attributes:
        dataset: which.
        columns: what the pass reads.
    """

    dataset: GroupDataset
    columns: Sequence[str]

    def __len__(self) -> int:
        return self.dataset.n_row_groups

    def __iter__(self) -> Iterator[int]:
        if not self.dataset.storage.fetches_ahead:
            yield from range(len(self))
            return
        with ThreadPoolExecutor(_AHEAD, thread_name_prefix="gvpo-pass") as pool:
            coming: deque[Future[None]] = deque()
            try:
                for number in range(len(self)):
                    while len(coming) < min(_AHEAD, len(self) - number):
                        coming.append(pool.submit(self._fetch, number + len(coming)))
                    coming.popleft().result()
                    yield number
            finally:
                pool.shutdown(cancel_futures=True)

    def _fetch(self, row_group: int) -> None:
        with suppress(GVPOError):
            self.dataset.table(row_group, self.columns)
