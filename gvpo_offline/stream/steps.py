"""Steps as items of a map-style dataset: item s is one rank's share of optimizer step s.

The step number is the whole state of the data: to resume at step s, a loader starts at item s and
reads nothing before it.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch.utils.data import Dataset, get_worker_info

from gvpo_offline.errors import GVPOError
from gvpo_offline.group import Group
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.stream.mix import MixedOrder
from gvpo_offline.stream.plan import CostModel, plan_step, shape_of
from gvpo_offline.stream.view import DatasetView

# Threads that read row groups: from a disk, and over a network, where most time is latency.
_READERS = 2
_FETCHERS = 8


class MicroBatch(NamedTuple):
    """Whole groups that are computed together, or one group that is computed in pieces.

    Attributes:
        groups: its groups; empty if other ranks have more micro-batches than this one.
        n_forwards: forward passes that every rank makes for this micro-batch number.
    """

    groups: tuple[Group, ...]
    n_forwards: int = 1


@dataclass(frozen=True)
class StepShare:
    """The micro-batches of one rank in one optimizer step.

    Attributes:
        step: the step's number.
        micro_batches: the same number on every rank; some may be empty.
        n_groups: groups of the step over all ranks; the loss is the mean over these.
        read_seconds: time spent reading.
    """

    step: int
    micro_batches: tuple[MicroBatch, ...]
    n_groups: int
    read_seconds: float

    @property
    def groups(self) -> list[Group]:
        """All groups of the share."""
        return [group for micro_batch in self.micro_batches for group in micro_batch.groups]

    @property
    def n_tokens(self) -> int:
        """Tokens of the share, each prompt counted once."""
        return sum(group.n_tokens for group in self.groups)


class StepDataset(Dataset[StepShare]):
    """One rank's shares of steps 0 to n - 1 of a run.

    Args:
        views: one per dataset.
        order: the order of training.
        groups_per_step: groups of a step, over all ranks.
        n_draws: groups of the whole run; the last step may be smaller.
        cost: size limit of micro-batches and cost of groups.
        rank, world_size: this rank, and number of ranks.
    """

    def __init__(
        self,
        views: Sequence[DatasetView],
        order: MixedOrder,
        *,
        groups_per_step: int,
        n_draws: int,
        cost: CostModel,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.views = tuple(views)
        self.order = order
        self.groups_per_step = groups_per_step
        self.n_draws = n_draws
        self.cost = cost
        self.rank = rank
        self.world_size = world_size
        self._row_groups = self._nothing_read()

    def __len__(self) -> int:
        return math.ceil(self.n_draws / self.groups_per_step)

    def __getitem__(self, step: int) -> StepShare:
        if not 0 <= step < len(self):
            raise IndexError(step)
        started = time.perf_counter()
        groups = self.global_batch(step)
        plan = plan_step(
            [shape_of(group) for group in groups],
            self.cost,
            world_size=self.world_size,
            rank=self.rank,
        )
        return StepShare(
            step=step,
            micro_batches=tuple(
                MicroBatch(tuple(groups[i] for i in own.members), own.n_forwards) for own in plan
            ),
            n_groups=len(groups),
            read_seconds=time.perf_counter() - started,
        )

    def __getitems__(self, steps: list[int]) -> list[StepShare | GVPOError]:
        """Steps for a loader. Returns a `GVPOError`: raising it would end a worker process."""
        try:
            return [self[step] for step in steps]
        except GVPOError as error:
            return [error]

    def global_batch(self, step: int) -> list[Group]:
        """The groups of a step, of all ranks."""
        start = step * self.groups_per_step
        stop = min(start + self.groups_per_step, self.n_draws)
        views, row_groups, rows = (numbers.tolist() for numbers in self.order.take(start, stop))
        places = list(zip(views, row_groups, strict=True))
        read = self._read(list(dict.fromkeys(places)))
        return [read[place][row] for place, row in zip(places, rows, strict=True)]

    def _read(self, places: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[Group]]:
        """The groups by (view, row group), from the cache or read, several row groups at a time."""
        read: dict[tuple[int, int], list[Group]] = {}
        for view, row_group in places:
            groups = self._row_groups[view].pop(row_group, None)
            if groups is not None:
                read[view, row_group] = groups
        missing = [place for place in places if place not in read]
        if len(missing) > 1:  # decoding releases the GIL, as does waiting for a network
            fetched = any(self.views[v].dataset.storage.fetches_ahead for v, _ in missing)
            with ThreadPoolExecutor(_FETCHERS if fetched else _READERS) as pool:
                read.update(zip(missing, pool.map(self._read_one, missing), strict=True))
        else:
            read.update((place, self._read_one(place)) for place in missing)
        for view, row_group in places:
            kept = self._row_groups[view]
            kept[row_group] = read[view, row_group]
            # Two windows per dataset: a step may end one window and begin the next.
            while len(kept) > 2 * self.order.orders[view].window:
                kept.popitem(last=False)
        return read

    def _read_one(self, place: tuple[int, int]) -> list[Group]:
        view, row_group = place
        return self.views[view].groups(row_group)

    def _nothing_read(self) -> list[OrderedDict[int, list[Group]]]:
        return [OrderedDict() for _ in self.views]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_row_groups": self._nothing_read()}


def training_steps(
    dataset: GroupDataset,
    cost: CostModel,
    *,
    groups_per_step: int = 32,
    num_epochs: float = 1.0,
    seed: int = 42,
    shuffle_window: int = 4,
) -> StepDataset:
    """The optimizer steps of a run on all groups of one dataset, for a hand-written training loop.

    `GVPOTrainer` takes the same groups at each step for the same dataset, seed and window.

    Args:
        dataset: as `open_dataset` returns it, with rewards and reference log-probs.
        cost: layout and token budget of a micro-batch: the `cost` of `prepare_engine`'s result.
        groups_per_step: groups of one optimizer step; the last step takes the rest.
        num_epochs: how often each group is seen; may be a fraction.
        seed: decides the order.
        shuffle_window: row groups whose groups are shuffled together.

    Returns:
        A sequence; item s is optimizer step s, read when it is asked for.

    Raises:
        DataError: the dataset has no group.
    """
    view = DatasetView(dataset)
    order = MixedOrder([view.order(seed=seed, window=shuffle_window)])
    return StepDataset(
        [view],
        order,
        groups_per_step=groups_per_step,
        n_draws=math.ceil(round(num_epochs * view.n_groups, 6)),
        cost=cost,
    )


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
