"""Sequential passes over a dataset's row groups, with prefetching."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from gvpo_offline.errors import GVPOError
from gvpo_offline.store.dataset import GroupDataset

_AHEAD = 8


@dataclass(frozen=True)
class PrefetchedRowGroups:
    """Iterates over the row group numbers of a dataset, and prefetches columns of the next ones.

    With a remote dataset, threads read the next row groups into the cache, so that the pass is
    bound by bandwidth and not by latency. Errors while prefetching are ignored: the caller's own
    read raises them.

    Attributes:
        dataset: whose row groups.
        columns: those that the caller reads.
        part: slice of the row groups.
    """

    dataset: GroupDataset
    columns: Sequence[str]
    part: slice = field(default_factory=lambda: slice(None))

    @property
    def _numbers(self) -> range:
        return range(self.dataset.n_row_groups)[self.part]

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[int]:
        numbers = self._numbers
        if not self.dataset.storage.fetches_ahead:
            yield from numbers
            return
        with ThreadPoolExecutor(_AHEAD, thread_name_prefix="gvpo-pass") as pool:
            coming: deque[Future[None]] = deque()
            try:
                for at, number in enumerate(numbers):
                    while len(coming) < min(_AHEAD, len(numbers) - at):
                        coming.append(pool.submit(self._fetch, numbers[at + len(coming)]))
                    coming.popleft().result()
                    yield number
            finally:
                pool.shutdown(cancel_futures=True)

    def _fetch(self, row_group: int) -> None:
        with suppress(GVPOError):
            self.dataset.table(row_group, self.columns)
