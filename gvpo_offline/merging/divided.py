"""A rewrite as two stages that any engine runs: reading rows, then writing shards.

    groups files with sidecars -> (map) rows in buckets of hash(group_id) -> (reduce) shards

A map task reads one file of an input and writes its rows to one file, cut by bucket. A reduce task
takes the buckets of one shard from the files of all map tasks, in the order of the inputs, and
writes the shard as one process does. Where groups get other ids (`match: prompt`), the table of ids
is in one process, which reads all rows then.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gvpo_offline.errors import ConfigError
from gvpo_offline.merging.inputs import InputDataset, spill_schema
from gvpo_offline.merging.work import task_name
from gvpo_offline.store.commit import TaskLog, TaskRecord
from gvpo_offline.store.manifest import BaseFile
from gvpo_offline.store.pieces import PieceWriter, read_pieces
from gvpo_offline.store.spill import TableSpill
from gvpo_offline.workers.progress import advance
from gvpo_offline.workers.run import run_stage, started
from gvpo_offline.workers.settings import WorkerSettings
from gvpo_offline.workers.stage import Task

if TYPE_CHECKING:
    from gvpo_offline.merging.rewrite import Rewrite

_ALL = "all"  # the task that reads every row


def is_divided(workers: WorkerSettings) -> bool:
    """Whether a rewrite is run by workers.

    Raises:
        ConfigError: as a job of an array, of which each would read every row.
    """
    if workers.shard is not None:
        raise ConfigError(
            "a dataset is rewritten by one command, which holds its lock",
            received=f"shard: {workers.shard}",
            remedy="leave out shard; set workers, or engine: ray for several machines",
        )
    return workers.engine != "local" or workers.workers > 1


@dataclass
class ReadStage:
    """Reads the rows of the inputs; a task for each of their files. See `workers.stage.Stage`.

    Attributes:
        root: folder of the rows and of the commit records.
        rewrite: the rewrite, whose inputs are read.
        n_buckets: number of buckets, a power of two.
    """

    root: Path
    rewrite: Rewrite
    n_buckets: int
    name: str = "read"
    unit: str = "groups"

    def tasks(self) -> list[Task]:
        """A task for each file of each input; one for all if groups get other ids."""
        if self.rewrite.rename is not None:
            return [Task(_ALL, sum(e.rows for i in self.rewrite.inputs for e in _files(i)))]
        return [
            Task(f"{number:03d}-{place:06d}", entry.rows)
            for number, item in enumerate(self.rewrite.inputs)
            for place, entry in enumerate(_files(item))
        ]

    def start(self) -> None:
        """Nothing is prepared."""

    def path(self, task: str) -> Path:
        """The file of a task."""
        return self.root / "rows" / f"{task}.rows"

    def work(self, task: Task) -> TaskRecord:
        """Read a file of an input.

        Raises:
            DataError, IntegrityError: as `InputDataset.rows`.
            StorageError: the disk is full.
        """
        schema = spill_schema(self.rewrite.families)
        writer = PieceWriter(self.path(task.name), schema, self.n_buckets)
        try:
            for item, row_groups in self._parts(task.name):
                for row_group in row_groups:
                    table = item.rows(row_group, self.rewrite.rename)
                    writer.add(table)
                    advance(table.num_rows)
            buckets = writer.finish()
        finally:
            writer.close()
        return TaskRecord(stage=self.name, task=task.name, details={"buckets": buckets})

    def _parts(self, task: str) -> Iterator[tuple[InputDataset, range]]:
        """The inputs, and the row groups of each, that a task reads."""
        inputs = self.rewrite.inputs
        if task == _ALL:
            yield from ((item, range(item.groups.n_row_groups)) for item in inputs)
            return
        number, place = map(int, task.split("-"))
        sizes = [len(entry.row_groups) for entry in _files(inputs[number])]
        first = sum(sizes[:place])
        yield inputs[number], range(first, first + sizes[place])


def _files(item: InputDataset) -> Sequence[BaseFile]:
    return item.groups.manifest.groups


@dataclass
class WriteStage:
    """Writes shards; a task for each. See `workers.stage.Stage`.

    Attributes:
        root: the dataset's folder.
        rewrite: the rewrite.
        name: of the commit records.
        parts: the shards to write.
        per_part: buckets of a shard.
        files: the files of the map tasks, in order.
        spilled: a folder for the rows of the shard that a worker writes.
    """

    root: Path
    rewrite: Rewrite
    name: str
    parts: Sequence[int]
    per_part: int
    files: Sequence[Path]
    spilled: Path
    unit: str = "shards"

    def tasks(self) -> list[Task]:
        """A task for each shard."""
        return [Task(task_name(part), 1) for part in self.parts]

    def start(self) -> None:
        """Nothing is prepared."""

    def work(self, task: Task) -> TaskRecord:
        """Write a shard.

        Raises:
            DataError: the rows of a group cannot be joined; names file, row and group.
            IntegrityError: a file of a map task is damaged.
            StorageError: the disk is full.
        """
        part = next(own for own in self.parts if task_name(own) == task.name)
        buckets = range(part * self.per_part, (part + 1) * self.per_part)
        spill = TableSpill(
            self.spilled / uuid.uuid4().hex,
            spill_schema(self.rewrite.families),
            self.rewrite.n_parts * self.per_part,
        )
        try:
            spill.open()
            for path in self.files:
                for bucket in buckets:
                    for table in read_pieces(path, bucket):
                        spill.add(table)
            spill.flush()
            return self.rewrite.write(self.name, spill, part, buckets)
        finally:
            spill.close()


def run_divided(
    rewrite: Rewrite,
    log: TaskLog,
    folder: Path,
    per_part: int,
    known: dict[int, TaskRecord],
    workers: WorkerSettings,
) -> None:
    """Write and commit the shards that are not in `known`, to which their records are added.

    Args:
        rewrite: what is written.
        log: the log to which shards are committed.
        folder: of the rows, created and removed here.
        per_part: buckets of a shard.
        known: the records of shards that need not be written, by part.
        workers: where the tasks run.

    Raises:
        GVPOError: as `Rewrite.run`; or a worker died.
    """
    reading = ReadStage(folder, rewrite, rewrite.n_parts * per_part)
    # The table of new ids is in this process.
    alone = WorkerSettings(show_progress=workers.show_progress)
    try:
        with started(workers):
            read = run_stage(reading, alone if rewrite.rename is not None else workers)
            assert read is not None  # only with `shard`
            held = {bucket // per_part for r in read for bucket in r.details["buckets"]}
            parts = sorted(held - known.keys())
            writing = WriteStage(
                *(rewrite.root.resolve(), replace(rewrite, rename=None, done={}), log.stage),
                *(parts, per_part, [reading.path(r.task).resolve() for r in read]),
                spilled=folder.resolve() / "shards",
            )
            records = run_stage(writing, workers)
            assert records is not None
            known.update(zip(parts, records, strict=True))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
