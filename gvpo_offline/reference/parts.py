"""Tasks of the reference stage: a groups file each, or row groups of a large file.

A large groups file is scored in parts, so that several workers share it and an interruption costs
one part. When all parts are committed, they are joined to the sidecar of the file, byte for byte
the one that a single task writes, under the record of that task. Then the parts are removed. A
file whose sidecar is committed, also by a version of the package without parts, is not divided.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from gvpo_offline.errors import IntegrityError
from gvpo_offline.files import lock_folder
from gvpo_offline.store.commit import TaskLog, TaskRecord, read_record
from gvpo_offline.store.manifest import BaseFile
from gvpo_offline.store.parquet import open_parquet, read_row_group
from gvpo_offline.store.schema import REFERENCE_COLUMNS, arrow_schema
from gvpo_offline.store.within import path_within
from gvpo_offline.store.writer import write_sidecar
from gvpo_offline.workers.run import run_stage
from gvpo_offline.workers.settings import WorkerSettings
from gvpo_offline.workers.stage import Stage

NAME_DIGITS = 16
# Tokens of the groups of a part. A part takes minutes, so that its files and its commit cost little
# beside it; a file of the default size of a shard has dozens.
PART_TOKENS = 2**20


@dataclass(frozen=True)
class FileRange:
    """Some consecutive row groups of a groups file: start to stop - 1, numbered within the file."""

    file: int
    start: int
    stop: int
    whole: bool


class PartsStage(Stage, Protocol):
    """A stage whose tasks are `FileRange`s.

    Attributes:
        folder: the sidecars' folder, relative to `root`.
        files: the groups files.
        ranges: the range of each task, by its name, in order.
    """

    folder: str
    files: Sequence[BaseFile]
    ranges: Mapping[str, FileRange]


def file_task(base: BaseFile) -> str:
    """The name of the task whose record holds the sidecar of a groups file."""
    return base.sha256[:NAME_DIGITS]


def file_ranges(files: Sequence[BaseFile], log: TaskLog) -> dict[str, FileRange]:
    """The tasks for some groups files, by name, in order.

    Args:
        files: the groups files.
        log: of the stage; a file whose sidecar is committed is one task.
    """
    ranges = {}
    for number, base in enumerate(files):
        n, name = len(base.row_groups), file_task(base)
        size = max(1, n * PART_TOKENS // max(1, base.n_tokens))
        if size >= n or log.exists(name):
            ranges[name] = FileRange(number, 0, n, whole=True)
            continue
        for start in range(0, n, size):
            stop = min(n, start + size)
            ranges[f"{name}-{start:06d}-{stop:06d}"] = FileRange(number, start, stop, whole=False)
    return ranges


def run_parts(stage: PartsStage, settings: WorkerSettings) -> list[TaskRecord] | None:
    """Run the tasks of a stage, and join the parts of each groups file.

    Returns:
        A record with one sidecar for each groups file, in order; None while tasks of other shards
        (`shard: i/n`) are missing.

    Raises:
        GVPOError: as `run_stage`.
    """
    try:
        records = run_stage(stage, settings)
    except IntegrityError:
        # Another process may have joined and removed the parts while this one verified them.
        if not _all_joined(stage):
            raise
        records = []
    if records is None and not _all_joined(stage):
        return None
    log = TaskLog(stage.root, stage.name)
    handle = lock_folder(log.folder, wait=True)
    try:
        return [_joined(stage, log, base) for base in stage.files]
    finally:
        if handle is not None:
            os.close(handle)


def _all_joined(stage: PartsStage) -> bool:
    log = TaskLog(stage.root, stage.name)
    return all(log.exists(file_task(base)) for base in stage.files)


def _joined(stage: PartsStage, log: TaskLog, base: BaseFile) -> TaskRecord:
    """The record of a groups file, joined from its parts if it is not committed."""
    name = file_task(base)
    committed = log.committed(name)
    if committed is not None:
        return committed
    names = [task for task, own in stage.ranges.items() if stage.files[own.file] is base]
    parts = [record for record in map(log.committed, names) if record is not None]
    assert len(parts) == len(names)  # run_stage has committed them
    tables = _rows(stage.root, parts)
    schema = arrow_schema(REFERENCE_COLUMNS)
    sidecar = write_sidecar(stage.root, stage.folder, name, base, schema, tables)
    counts: Counter[str] = Counter()
    for record in parts:
        counts.update(record.counts)
    return log.commit(
        TaskRecord(stage=stage.name, task=name, sidecars=[sidecar], counts=dict(counts))
    )


def _rows(root: Path, parts: Sequence[TaskRecord]) -> Iterator[pa.Table]:
    """The row groups of some parts, in order."""
    schema = arrow_schema(REFERENCE_COLUMNS)
    for entry in (entry for record in parts for entry in record.files):
        path = root / entry.path
        with open_parquet(path, entry.footer_sha256) as file:
            for number in range(len(entry.row_groups)):
                table = read_row_group(file, path, number, schema.names)
                yield table.select(schema.names).cast(schema).combine_chunks()


def remove_parts(root: Path, stage: str) -> None:
    """Remove the parts of groups files whose sidecars are committed, with their records."""
    log = TaskLog(root, stage)
    for path in sorted(log.folder.glob(f"{'?' * NAME_DIGITS}-*.json")):
        if not log.exists(path.name[:NAME_DIGITS]):
            continue
        with suppress(OSError):  # another process removes them too, or the folder is read-only
            files = read_record(path).files
            # First the record: a record whose file is missing is an error for the next run.
            path.unlink()
            for entry in files:
                path_within(root, entry.path).unlink(missing_ok=True)
