"""Writes new shards from the rows of datasets, for merging and compacting.

    rows with all their sidecars -> spilled in buckets of hash(group_id) -> planned -> shards

Each part of the range of hashes is one shard and one task. The groups file of a shard is written
first; the sidecars follow from the same plan, because each records the hash of its groups file.
Each pass holds at most one bucket of rows in memory, and the plan of one shard: 16 bytes per
response.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from gvpo_offline.errors import DataError
from gvpo_offline.group import Group
from gvpo_offline.merging.divided import is_divided, run_divided
from gvpo_offline.merging.families import Family
from gvpo_offline.merging.inputs import GROUP_COLUMNS, InputDataset, Rename, spill_schema
from gvpo_offline.merging.plan import Planner
from gvpo_offline.merging.settings import RewriteSettings
from gvpo_offline.merging.waiting import incomplete_file, of_incomplete
from gvpo_offline.merging.work import task_name
from gvpo_offline.progress_bar import ProgressBar
from gvpo_offline.store.arrow import groups_from_table
from gvpo_offline.store.commit import TaskLog, TaskRecord
from gvpo_offline.store.coverage import count_missing
from gvpo_offline.store.manifest import FileEntry, Sidecar
from gvpo_offline.store.response_index import ResponseIndex, n_partly_null, take_responses
from gvpo_offline.store.schema import arrow_schema
from gvpo_offline.store.spill import TableSpill, power_of_two
from gvpo_offline.store.writer import write_groups, write_sidecar
from gvpo_offline.workers.settings import WorkerSettings

_BUCKET_BYTES = 8 << 20  # on disk; in memory a bucket takes about eight times as much
_RESPONSES_AT_ONCE = 2048


@dataclass(frozen=True)
class Rewrite:
    """Writes the groups of datasets into shards.

    Attributes:
        root: folder of the shards.
        inputs: the datasets, with the sidecars of `families` opened.
        families: rewards and references that all inputs have.
        settings: handling of duplicates and singletons, and groups per row group.
        n_parts: number of shards, a power of two; some may be empty.
        response_ids: as in `MergeConfig`.
        rename: maps groups to their ids in the result; None: they keep their ids.
        done: records of shards that need not be written, by part.
        reward: the reward of incomplete groups; None: they have none.
    """

    root: Path
    inputs: Sequence[InputDataset]
    families: Sequence[Family]
    settings: RewriteSettings
    n_parts: int
    response_ids: Literal["error", "drop"] = "error"
    rename: Rename | None = None
    done: Mapping[int, TaskRecord] = field(default_factory=dict)
    reward: Family | None = None

    def run(
        self, log: TaskLog, spilled: Path, workers: WorkerSettings | None = None
    ) -> list[TaskRecord]:
        """Write and commit every shard that is neither done nor committed.

        Args:
            log: the log to which shards are committed. A record lists the sidecars of its shard in
                the order of `families`.
            spilled: folder of the spilled rows, created and removed here.
            workers: who reads and writes; default: this process.

        Returns:
            The records of the parts with groups, in order, including parts whose groups were all
            dropped.

        Raises:
            DataError: the rows of a group cannot be joined; names file, row and group.
            IntegrityError: a file is damaged.
            StorageError: the disk is full; committed shards stay.
        """
        records = dict(self.done)
        for part in range(self.n_parts):
            record = None if part in records else log.committed(task_name(part))
            if record is not None:
                records[part] = record
        per_part = self._buckets_per_part()
        if workers is not None and is_divided(workers):
            if len(records) < self.n_parts:
                run_divided(self, log, spilled, per_part, records, workers)
        else:
            self._run_here(log, spilled, per_part, records)
        if not of_incomplete(self.inputs) and not any(r.groups for r in records.values()):
            raise DataError(
                "a dataset has at least 1 group",
                received="no group with two responses after duplicates were dropped",
                remedy="keep duplicates (duplicates: keep)",
                file=self.root,
            )
        return [records[part] for part in sorted(records)]

    def _run_here(
        self, log: TaskLog, spilled: Path, per_part: int, records: dict[int, TaskRecord]
    ) -> None:
        """Write and commit the shards that are not in `records`, and add theirs."""
        skip = [b for part in records for b in self._buckets(part, per_part)]
        spill = TableSpill(spilled, spill_schema(self.families), self.n_parts * per_part, skip)
        try:
            if len(records) < self.n_parts:
                spill.open()
                self._spill(spill)
            with self._bar("writing shards", self.n_parts, len(records)) as bar:
                for part in range(self.n_parts):
                    if part in records:
                        continue
                    buckets = self._buckets(part, per_part)
                    if any(spill.holds(bucket) for bucket in buckets):
                        records[part] = log.commit(self.write(log.stage, spill, part, buckets))
                    bar.update()
        finally:
            spill.close()

    def _bar(self, what: str, total: int, initial: int = 0) -> AbstractContextManager[Any]:
        quiet = not self.settings.show_progress
        bar: AbstractContextManager[Any] = ProgressBar(
            desc=what, total=total, initial=initial, disable=quiet
        )
        return bar

    def _buckets_per_part(self) -> int:
        total = sum(item.bytes for item in self.inputs)
        return max(1, power_of_two(total, _BUCKET_BYTES) // self.n_parts)

    def _buckets(self, part: int, per_part: int) -> range:
        return range(part * per_part, (part + 1) * per_part)

    def _spill(self, spill: TableSpill) -> None:
        with self._bar("reading", sum(i.groups.n_row_groups for i in self.inputs)) as bar:
            for item in self.inputs:
                for row_group in range(item.groups.n_row_groups):
                    spill.add(item.rows(row_group, self.rename))
                    bar.update()
        spill.flush()

    def write(self, stage: str, spill: TableSpill, part: int, buckets: range) -> TaskRecord:
        """Write the shard of a part from its buckets, which are removed; returns its record."""
        counts: Counter[str] = Counter()
        plans: list[tuple[int, ResponseIndex]] = []
        single: list[tuple[int, ResponseIndex]] = []
        groups = self._groups(spill, buckets, plans, single, counts)
        head = next(groups, None)
        record = TaskRecord(stage=stage, task=task_name(part))
        if head is not None:
            tokenizer = self.inputs[0].manifest.tokenizer
            record = write_groups(
                self.root,
                stage,
                task_name(part),
                itertools.chain([head], groups),
                reward=None,
                vocab_size=tokenizer.vocab_size if tokenizer else None,
                rows_per_row_group=self.settings.rows_per_row_group,
            )
            sidecars = [self._sidecar(spill, family, record, plans) for family in self.families]
            record = record.model_copy(update={"sidecars": sidecars})
        if single:
            record = record.model_copy(
                update={"files": self._still_incomplete(spill, part, single)}
            )
        for bucket in buckets:
            spill.remove(bucket)
        return record.model_copy(update={"counts": dict(sorted(counts.items()))})

    def _groups(
        self,
        spill: TableSpill,
        buckets: range,
        plans: list[tuple[int, ResponseIndex]],
        single: list[tuple[int, ResponseIndex]],
        counts: Counter[str],
    ) -> Iterator[Group]:
        """Yield the groups of some buckets; append the plan of each bucket to `plans`, and that of
        groups that remain incomplete to `single`.
        """
        rewards = [f.field("rewards") for f in self.families if f.columns[0].name == "rewards"]
        planner = Planner(
            self.settings.duplicates,
            self.settings.singletons,
            rewards,
            lambda number, row_group: self.inputs[number].location(row_group),
            counts,
            [item.number for item in of_incomplete(self.inputs)],
        )
        names = dict.fromkeys([*planner.columns, *(column.name for column in GROUP_COLUMNS)])
        for bucket in buckets:
            table = spill.read(bucket, list(names))
            if table is None:
                continue
            index, left = planner.plan(table)
            if left is not None:
                single.append((bucket, left))
            if index is None:
                continue
            plans.append((bucket, index))
            for name in ("responses", "response_ids"):
                counts[f"dropped_{name}"] += n_partly_null(table, name, index)
            for piece in index.pieces(_RESPONSES_AT_ONCE):
                for group in groups_from_table(take_responses(table, GROUP_COLUMNS, piece)):
                    yield self._with_unique_ids(group, counts)

    def _with_unique_ids(self, group: Group, counts: Counter[str]) -> Group:
        ids = group.response_ids
        if ids is None or len(set(ids)) == len(ids):
            return group
        if self.response_ids == "error":
            raise DataError(
                "response ids are unique within a group",
                received=", ".join(sorted({i for i in ids if ids.count(i) > 1})),
                remedy="if the logs number their responses independently, drop the ids of such "
                "groups (response_ids: drop); if it is the same response twice, drop the second "
                "(duplicates: drop)",
                group=group.group_id,
            )
        counts["dropped_response_ids"] += 1
        return replace(group, response_ids=None)

    def _still_incomplete(
        self, spill: TableSpill, part: int, single: Sequence[tuple[int, ResponseIndex]]
    ) -> list[FileEntry]:
        """The file of incomplete groups whose further responses were dropped as duplicates."""
        beside = () if self.reward is None else self.reward.columns
        fields = {} if self.reward is None else {self.reward.field(c.name): c.name for c in beside}

        def groups() -> Iterator[Group]:
            for bucket, index in single:
                table = spill.read(bucket, [*(c.name for c in GROUP_COLUMNS), *fields])
                assert table is not None  # the groups of this plan were read from the bucket
                table = table.rename_columns([fields.get(n, n) for n in table.schema.names])
                yield from groups_from_table(
                    take_responses(table, [*GROUP_COLUMNS, *beside], index)
                )

        return incomplete_file(
            self.root,
            task_name(part),
            groups(),
            self.reward,
            self.inputs[0].manifest.tokenizer,
            self.settings.rows_per_row_group,
        )

    def _sidecar(
        self,
        spill: TableSpill,
        family: Family,
        record: TaskRecord,
        plans: Sequence[tuple[int, ResponseIndex]],
    ) -> Sidecar:
        base = record.groups[0]
        columns = [GROUP_COLUMNS[0], *family.columns]
        assert columns[0].name == "group_id"
        missing: Counter[str] = Counter()
        names = {column.name: family.field(column.name) for column in family.columns}

        def tables() -> Iterator[pa.Table]:
            for bucket, index in plans:
                table = spill.read(bucket, ["group_id", *names.values()])
                assert table is not None  # the groups of this plan were read from the bucket
                fields = table.schema.names
                own = {field: name for name, field in names.items()}
                found = take_responses(
                    table.rename_columns([own.get(name, name) for name in fields]), columns, index
                )
                if family.partial:
                    missing.update(count_missing(found, family.columns[0].name))
                yield found

        sidecar = write_sidecar(
            self.root,
            family.folder,
            record.task,
            base,
            arrow_schema(columns),
            resized(tables(), base.row_groups),
        )
        return sidecar.model_copy(update=dict(missing))


def resized(tables: Iterator[pa.Table], sizes: Sequence[int]) -> Iterator[pa.Table]:
    """Yield the rows of `tables` in tables of the given numbers of rows."""
    held = next(tables)
    for size in sizes:
        while held.num_rows < size:
            held = pa.concat_tables([held, next(tables)])
        yield held.slice(0, size).combine_chunks()
        held = held.slice(size)
