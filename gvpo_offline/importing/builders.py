"""Who builds the groups of an import: this process, or worker processes.

    bucket files -> batches of whole groups -> (a worker) -> groups and counts -> the writer

Reading rows, and writing shards, remain in this process. It hands each idle worker the next batch
and takes the results in the order of the batches, so that the dataset is the same with any number
of workers. At most `_AHEAD` more batches than workers are in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from gvpo_offline.chat.encoder import Encoder
from gvpo_offline.errors import WorkerError
from gvpo_offline.group import Group
from gvpo_offline.importing.assemble import Assembler
from gvpo_offline.importing.draft import InputNames
from gvpo_offline.importing.encode import load_encoder
from gvpo_offline.importing.regroup import FragmentSpill, SpilledGroups
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.tally import Tally, model_max_length
from gvpo_offline.workers.process import MAIN_GUARD, Handler, WorkerDeathError, WorkerProcess

_RESPONSES_AT_ONCE = 1024
# A worker for less text than this would take longer to start than to do its work.
_WORKER_BYTES = 4 << 20
_AHEAD = 2
_THREADS = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True)
class Building:
    """What the first pass found that the building of groups depends on.

    Attributes:
        inputs: names of the inputs.
        components: names of all reward components in the log.
        text_bytes: approximate length of all inputs.
        by_sampler: whether responses are counted by sampler.
        reduced: ids of the groups of broken rows that the first pass dropped.
    """

    inputs: Sequence[InputNames]
    components: Sequence[str]
    text_bytes: int
    by_sampler: bool
    reduced: Collection[str]


@dataclass(frozen=True)
class Built:
    """The groups of one batch, and what was counted and dropped on the way.

    Attributes:
        groups: the groups, in order.
        tally: the counts of this batch.
        broken: lines of the report.
        n_rows: number of rows of the log in the batch.
    """

    groups: Sequence[Group]
    tally: Tally
    broken: Sequence[dict[str, Any]]
    n_rows: int


Batches = Iterator[tuple[int, Built | None]]
"""Shard and batch, in order; None instead of a batch ends the shard."""


class Builders(Protocol):
    """Builds groups, in this process or in others."""

    def begin(self, building: Building) -> None:
        """Take over what the first pass found; once, before `run`."""

    def run(self, spill: FragmentSpill, buckets: Mapping[int, Sequence[int]]) -> Batches:
        """Build the groups of some shards.

        Args:
            spill: holds the fragments; a bucket is removed once it was read.
            buckets: for each shard its buckets, in order.

        Raises:
            DataError: a group breaks a rule and `on_error` is stop; raised when the groups of all
                batches before it were taken.
            WorkerError: a worker process died.
        """

    def close(self) -> None:
        """End the worker processes, whatever they do."""


def open_builders(config: ImportConfig, encoder: Encoder | None, text_bytes: int) -> Builders:
    """The builders that `config.workers` asks for; worker processes begin to start.

    Args:
        config: the import's settings.
        encoder: the tokenizer of this process, or None.
        text_bytes: approximate length of all inputs.
    """
    n_workers = min(config.workers, text_bytes // _WORKER_BYTES)
    return OwnBuilder(config, encoder) if n_workers < 2 else WorkerBuilders(config, n_workers)


class _Builder:
    """Builds the groups of one batch after another."""

    def __init__(self, config: ImportConfig, encoder: Encoder | None, building: Building) -> None:
        # Whoever takes the batches in order knows when there are too many broken rows.
        self._config = dataclasses.replace(config, max_errors=sys.maxsize)
        self._encoder = encoder
        self._building = building
        self._limit = None if encoder is None else model_max_length(encoder.tokenizer)

    def __call__(self, batch: SpilledGroups) -> Built:
        found = self._building
        tally = Tally(found.text_bytes, self._limit, by_sampler=found.by_sampler)
        assembler = Assembler(
            self._config,
            self._encoder,
            found.inputs,
            found.components,
            tally=tally,
            reduced=found.reduced,
        )
        groups = assembler.groups(batch.fragments())
        return Built(groups, tally, assembler.broken.records, batch.rows.num_rows)


def _batches(
    spill: FragmentSpill, buckets: Mapping[int, Sequence[int]]
) -> Iterator[tuple[int, SpilledGroups | None]]:
    """The batches of the given shards, and None at the end of each shard."""
    for shard, numbers in buckets.items():
        for bucket in numbers:
            for batch in spill.groups(bucket, _RESPONSES_AT_ONCE):
                yield shard, batch
            spill.remove(bucket)
        yield shard, None


class OwnBuilder:
    """Builds groups in this process, each batch when it is asked for; see `Builders`."""

    def __init__(self, config: ImportConfig, encoder: Encoder | None) -> None:
        self._config = config
        self._encoder = encoder
        self._build: _Builder | None = None

    def begin(self, building: Building) -> None:
        self._build = _Builder(self._config, self._encoder, building)

    def run(self, spill: FragmentSpill, buckets: Mapping[int, Sequence[int]]) -> Batches:
        assert self._build is not None
        for shard, batch in _batches(spill, buckets):
            yield shard, None if batch is None else self._build(batch)

    def close(self) -> None:
        pass


class WorkerBuilders:
    """Builds groups in worker processes; see `Builders`.

    Args:
        config: the import's settings.
        n_workers: number of processes.
    """

    def __init__(self, config: ImportConfig, n_workers: int) -> None:
        self._workers = [
            WorkerProcess(functools.partial(_prepare, config)) for _ in range(n_workers)
        ]
        # The number of the batch that a worker builds; -1 for a request that is no batch.
        self._running = dict.fromkeys(range(n_workers), -1)
        self._building: Building | None = None
        self._idle: list[int] = []
        self._done: dict[int, Built | Exception | None] = {}

    def begin(self, building: Building) -> None:
        self._building = building

    def run(self, spill: FragmentSpill, buckets: Mapping[int, Sequence[int]]) -> Batches:
        batches = _batches(spill, buckets)
        shards: deque[int] = deque()  # of the batches that were read and not yet yielded
        first = 0  # number of the first of them
        exhausted = False
        while not exhausted or shards:
            while not exhausted and len(shards) < len(self._workers) + _AHEAD and self._free():
                found = next(batches, None)
                if found is None:
                    exhausted = True
                    break
                self._start(first + len(shards), found[1])
                shards.append(found[0])
            if first in self._done:
                built = self._done.pop(first)
                if isinstance(built, Exception):
                    raise built
                first += 1
                yield shards.popleft(), built
            elif shards:
                self._wait()

    def _free(self) -> bool:
        """Whether a worker is idle; takes what the others have finished meanwhile."""
        self._wait(timeout_s=0)
        return bool(self._idle)

    def _start(self, number: int, batch: SpilledGroups | None) -> None:
        if batch is None:
            self._done[number] = None
            return
        worker = self._idle.pop()
        self._running[worker] = number
        self._workers[worker].send(batch)

    def _wait(self, timeout_s: float | None = None) -> None:
        """Take the replies that are there; without a timeout, wait for one."""
        connections: dict[Any, int] = {
            self._workers[worker].connection: worker for worker in self._running
        }
        for connection in wait(list(connections), timeout_s):
            worker = connections[connection]
            number = self._running.pop(worker)
            try:
                reply = self._workers[worker].receive()
            except WorkerDeathError as death:
                raise _died(str(death), at_start=number < 0) from None
            except Exception as error:
                if number < 0:
                    raise
                reply = error
            if number >= 0:
                self._done[number] = reply
            elif reply != _BEGUN:
                # The reply that says that the process is ready.
                self._running[worker] = -1
                self._workers[worker].send(self._building)
                continue
            self._idle.append(worker)

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()


_BEGUN = "begun"


def _died(how: str, *, at_start: bool) -> WorkerError:
    rule = "a worker process of an import runs until the last group is built"
    if at_start:
        return WorkerError(rule, received=f"one that died at its start: {how}", remedy=MAIN_GUARD)
    return WorkerError(
        rule,
        received=f"one that died: {how}",
        remedy="find out what killed it (memory, a crash of native code) and run the same command "
        "again, with fewer workers if memory was short; committed shards are kept",
    )


def _prepare(config: ImportConfig) -> Handler:
    """The handler of a worker process: takes a `Building`, then one batch at a time."""
    os.environ[_THREADS] = "false"
    logging.disable(logging.WARNING)  # the importing process has said what there is to say
    folder = config.tokenizer_name_or_path
    if "torch" not in sys.modules and folder and (Path(folder) / "tokenizer.json").is_file():
        # Half of a worker's memory and most of its start would be torch, which transformers loads
        # where it finds it. A tokenizer of this file needs none; one in a GGUF file does.
        sys.modules["torch"] = None  # type: ignore[assignment]
    return _Worker(config)


class _Worker:
    def __init__(self, config: ImportConfig) -> None:
        self._config = config
        self._encoder = load_encoder(config)
        self._build: _Builder | None = None

    def __call__(self, request: Building | SpilledGroups) -> str | Built:
        if isinstance(request, Building):
            self._build = _Builder(self._config, self._encoder, request)
            return _BEGUN
        assert self._build is not None
        return self._build(request)
