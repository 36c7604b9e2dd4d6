"""Incomplete groups: prompts with one response, kept apart from the groups of a dataset.

They are rows of Parquet files under `incomplete/`, with the columns of a groups file. Their rewards
are columns of the same file. Nothing trains on them, and no count of groups includes them; a merge
that adds responses to their prompts makes groups of them.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from gvpo_offline.errors import DataError
from gvpo_offline.files import make_folder, storage_errors, temporary_name
from gvpo_offline.group import Group
from gvpo_offline.rules import MIN_GROUP_SIZE, check_group
from gvpo_offline.store.arrow import groups_to_table, rewards_to_table
from gvpo_offline.store.commit import TaskRecord
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.manifest import BaseFile, FileEntry, Manifest, Sidecar
from gvpo_offline.store.parquet import ROWS_PER_ROW_GROUP, write_parquet
from gvpo_offline.store.schema import incomplete_schema
from gvpo_offline.store.sidecar_choice import WeightedReward
from gvpo_offline.store.storage import Storage
from gvpo_offline.store.writer import write_groups

FOLDER = "incomplete"
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


def incomplete_dataset(storage: Path | Storage, manifest: Manifest) -> GroupDataset | None:
    """The incomplete groups of a dataset, opened like groups, with their reward joined.

    Args:
        storage: of the dataset.
        manifest: of the dataset.

    Returns:
        A dataset whose groups have one response each; None if there are no incomplete groups.
    """
    held = manifest.incomplete
    if held is None:
        return None
    files = [
        # The files do not record their tokens; nothing reads the number here.
        BaseFile(**entry.model_dump(mode="json"), n_responses=entry.rows, n_tokens=0)
        for entry in held.files
    ]
    inline = [Sidecar(base_sha256=file.sha256, file=file) for file in files]
    rewards = [held.reward.model_copy(update={"files": inline})] if held.reward else []
    view = manifest.model_copy(
        update={"groups": files, "rewards": rewards, "references": [], "incomplete": None}
    )
    return GroupDataset(storage, view, [WeightedReward(family) for family in rewards])


class _Rows:
    """Tables of incomplete groups; each group is checked.

    Args:
        reward: whether the groups have rewards.
        n_components: number of the reward's components.
        vocab_size: number of token ids, if known.
    """

    def __init__(self, *, reward: bool, n_components: int, vocab_size: int | None) -> None:
        self.schema = incomplete_schema(rewards=reward, components=n_components > 0)
        self._reward = reward
        self._n_components = n_components
        self._vocab_size = vocab_size

    def table(self, groups: Sequence[Group]) -> pa.Table:
        """The rows of one row group; DataError if a group breaks a rule."""
        for group in groups:
            check_group(
                group,
                file=group.source or None,
                vocab_size=self._vocab_size,
                incomplete=True,
            )
        table = groups_to_table(groups)
        if self._reward:
            ids, rewards = [g.group_id for g in groups], [self._rewards(g) for g in groups]
            parts = [g.components for g in groups if g.components is not None]
            beside = rewards_to_table(ids, rewards, parts if self._n_components else None)
            for name in beside.column_names[1:]:
                table = table.append_column(name, beside.column(name))
        return table.cast(self.schema)

    def _rewards(self, group: Group) -> Any:
        found = 0 if group.components is None else len(group.components)
        if group.rewards is None or found != self._n_components:
            raise DataError(
                f"every response has a reward of {self._n_components} components",
                received="no reward" if group.rewards is None else f"{found} components",
                group=group.group_id,
            )
        return group.rewards


def write_incomplete(
    root: Path,
    task: str,
    groups: Iterable[Group],
    *,
    reward: bool,
    n_components: int = 0,
    vocab_size: int | None = None,
    rows_per_row_group: int = ROWS_PER_ROW_GROUP,
) -> FileEntry | None:
    """Write groups of one response to a file under `incomplete/`.

    Args:
        root: the dataset's folder.
        task: first part of the file's name.
        groups: the rows, in order. One row group of them is in memory at a time.
        reward: whether they have rewards, which are written too.
        n_components: number of the reward's components.
        vocab_size: number of token ids, if known.
        rows_per_row_group: groups per Parquet row group.

    Returns:
        The file; None if there are no groups.

    Raises:
        DataError: a group breaks a rule, or has another number of responses than one.
        StorageError: the disk is full.
    """
    rows = _Rows(reward=reward, n_components=n_components, vocab_size=vocab_size)
    left = iter(groups)
    pieces = iter(lambda: list(itertools.islice(left, rows_per_row_group)), [])
    tables = map(rows.table, pieces)
    head = next(tables, None)
    if head is None:
        return None
    return write_parquet(root, FOLDER, task, rows.schema, itertools.chain([head], tables))


class IncompleteSpool:
    """Takes the groups of one response out of a stream of groups, and writes them afterwards.

    They are held in a temporary file on disk, since the shard of the other groups is written at the
    same time. A context manager, which removes that file.

    Args:
        root: the dataset's folder.
        task: first part of the file's name.
        reward, n_components, vocab_size, rows_per_row_group: as in `write_incomplete`.
    """

    def __init__(
        self,
        root: Path,
        task: str,
        *,
        reward: bool,
        n_components: int = 0,
        vocab_size: int | None = None,
        rows_per_row_group: int = ROWS_PER_ROW_GROUP,
    ) -> None:
        self._root = root
        self._task = task
        self._rows = _Rows(reward=reward, n_components=n_components, vocab_size=vocab_size)
        self._size = rows_per_row_group
        self._held: list[Group] = []
        # In a folder of its own: other files under `.spill` belong to the caller.
        self._folder = root / ".spill" / f"{FOLDER}-{task}"
        self._path = temporary_name(self._folder, task)
        self._sizes: list[int] = []

    def __enter__(self) -> IncompleteSpool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def others(self, groups: Iterable[Group]) -> Iterator[Group]:
        """Yield the groups of two responses or more; hold back the others."""
        for group in groups:
            if group.group_size >= MIN_GROUP_SIZE:
                yield group
                continue
            self._held.append(group)
            if len(self._held) == self._size:
                self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        table, self._held = self._rows.table(self._held), []
        self._sizes.append(table.num_rows)
        with storage_errors(self._path):
            make_folder(self._folder)
            # One short stream per row group, so that no file stays open.
            with (
                self._path.open("ab") as file,
                pa.ipc.new_stream(file, self._rows.schema, options=_OPTIONS) as stream,
            ):
                stream.write_table(table)

    def write(self) -> FileEntry | None:
        """Write the file of what was held back; None if nothing was.

        Raises:
            StorageError: the disk is full.
        """
        self._flush()
        if not self._sizes:
            return None
        return write_parquet(self._root, FOLDER, self._task, self._rows.schema, self._tables())

    def _tables(self) -> Iterator[pa.Table]:
        with pa.OSFile(str(self._path)) as file:
            for _ in self._sizes:
                with pa.ipc.open_stream(file) as stream:
                    yield stream.read_all()


def write_shard(
    root: Path,
    stage: str,
    task: str,
    groups: Iterable[Group],
    *,
    reward: str | None,
    components: Sequence[str] = (),
    vocab_size: int | None = None,
    rows_per_row_group: int = ROWS_PER_ROW_GROUP,
) -> TaskRecord:
    """Write one shard of groups, and those of one response to a file of incomplete groups.

    Args:
        root, stage, task, groups, reward, components, vocab_size, rows_per_row_group: as in
            `writer.write_groups`; here a group may have one response.

    Returns:
        A record for `TaskLog.commit`. The file of incomplete groups, if there is one, is in
        `files`; there is no groups file if every group is incomplete.

    Raises:
        DataError, StorageError: as `writer.write_groups`.
    """
    record = TaskRecord(stage=stage, task=task)
    with IncompleteSpool(
        root,
        task,
        reward=reward is not None,
        n_components=len(components),
        vocab_size=vocab_size,
        rows_per_row_group=rows_per_row_group,
    ) as spool:
        complete = spool.others(groups)
        head = next(complete, None)
        if head is not None:
            record = write_groups(
                root,
                stage,
                task,
                itertools.chain([head], complete),
                reward=reward,
                components=components,
                vocab_size=vocab_size,
                rows_per_row_group=rows_per_row_group,
            )
        entry = spool.write()
    return record.model_copy(update={"files": [] if entry is None else [entry]})
