"""The incomplete groups of merged datasets: which of them a merge completes, and which remain.

Each dataset's incomplete groups are an input of the merge beside its groups. An incomplete group is
joined where another row of the merge has its id; those rows go through the same plan as groups. The
others are copied to the incomplete groups of the new version.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gvpo_offline.errors import DataError
from gvpo_offline.group import Group
from gvpo_offline.hashing import UInt64Array, sha256_json, text_keys
from gvpo_offline.merging.families import Family, family_label, same_family
from gvpo_offline.merging.inputs import GROUP_COLUMNS, InputDataset, Rename
from gvpo_offline.merging.settings import IncompleteRule
from gvpo_offline.merging.work import waiting_name
from gvpo_offline.store.arrow import groups_from_table
from gvpo_offline.store.commit import TaskLog, TaskRecord
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.incomplete import incomplete_dataset, write_incomplete
from gvpo_offline.store.manifest import (
    FileEntry,
    IncompleteGroups,
    RewardFamily,
    TokenizerInfo,
)

Flags = npt.NDArray[np.bool_]


class IncompleteInput(InputDataset):
    """The incomplete groups of a dataset that is merged.

    Args:
        of: the dataset.
        dataset: its incomplete groups.
        number: index among the inputs of the merge.
    """

    def __init__(self, of: InputDataset, dataset: GroupDataset, number: int) -> None:
        self.root = of.root
        self.number = number
        self.position = of.position
        self.manifest = dataset.manifest
        self.groups = dataset
        self._joined = []
        self._joins: list[Flags] = []

    @property
    def reward(self) -> RewardFamily | None:
        """The reward that its files hold."""
        return self.manifest.rewards[0] if self.manifest.rewards else None

    def has(self, family: Family) -> bool:
        """Whether its files hold a reward or reference."""
        own = self.reward
        return own is not None and same_family(own, family.members[0])

    def join(self, families: Sequence[Family]) -> None:
        """As `InputDataset.join`; a family that its files do not hold has gaps in every row."""
        self.groups.verify()
        self._joined = [(f, self.groups if self.has(f) else None) for f in families]

    def content(self, families: Sequence[Family]) -> str:
        """SHA-256 over the hashes of the files."""
        return sha256_json(["incomplete", [file.sha256 for file in self.manifest.groups]])

    @property
    def bytes(self) -> int:
        """Total size of the files, in bytes."""
        return sum(entry.bytes for entry in self.manifest.groups)

    def find_joins(self, keys: UInt64Array, rename: Rename | None) -> bool:
        """Note which rows are joined: those whose id's hash is among `keys`, (n,) uint64.

        Returns:
            Whether there is one.
        """
        self._joins = []
        for row_group in range(self.groups.n_row_groups):
            _, named = super().ids(row_group, rename)
            self._joins.append(np.isin(text_keys(named), keys))
        return any(flags.any() for flags in self._joins)

    def first_join(self) -> dict[str, Any]:
        """File, row and group of the first row that is joined, as keywords of an error."""
        row_group, row = next(
            (number, int(flags.argmax())) for number, flags in enumerate(self._joins) if flags.any()
        )
        own, _ = super().ids(row_group, None)
        place = self.location(row_group)
        return {"file": place.file, "row": place.first_row + row, "group": own[row]}

    def all_ids(self, row_group: int, rename: Rename | None) -> tuple[list[str], list[str]]:
        """As `InputDataset.ids`, of every row."""
        return super().ids(row_group, rename)

    def ids(self, row_group: int, rename: Rename | None) -> tuple[list[str], list[str]]:
        """The ids of the rows that are joined, as `InputDataset.ids`."""
        own, named = super().ids(row_group, rename)
        rows = np.flatnonzero(self._joins[row_group]).tolist()
        return [own[row] for row in rows], [named[row] for row in rows]

    def rows(self, row_group: int, rename: Rename | None) -> pa.Table:
        """The rows that are joined, as `InputDataset.rows`."""
        return super().rows(row_group, rename).filter(pa.array(self._joins[row_group]))

    def remaining(
        self, row_groups: range, rename: Rename | None, *, reward: bool
    ) -> Iterator[Group]:
        """The groups of some row groups that are not joined, with their ids in the result."""
        names = [column.name for column in GROUP_COLUMNS]
        for row_group in row_groups:
            keep = ~self._joins[row_group]
            if not keep.any():
                continue
            _, named = super().ids(row_group, rename)
            columns = [*names, "rewards", "components"] if reward else names
            table = self.groups.table(row_group, columns)
            kept = groups_from_table(table.filter(pa.array(keep)).combine_chunks())
            for group, row in zip(kept, np.flatnonzero(keep).tolist(), strict=True):
                yield replace(group, group_id=named[row])

    def stays_whole(self, row_groups: range, rename: Rename | None) -> bool:
        """Whether no row of some row groups is joined or gets another id."""
        for row_group in row_groups:
            own, named = super().ids(row_group, rename)
            if self._joins[row_group].any() or own != named:
                return False
        return True


def with_incomplete(datasets: Sequence[InputDataset]) -> list[InputDataset]:
    """The inputs of a merge: each dataset, followed by its incomplete groups if it has some.

    Their numbers are set to their places in the list.
    """
    inputs: list[InputDataset] = []
    for item in datasets:
        item.number = len(inputs)
        inputs.append(item)
        waiting = incomplete_dataset(item.root, item.manifest)
        if waiting is not None:
            inputs.append(IncompleteInput(item, waiting, len(inputs)))
    return inputs


def of_incomplete(inputs: Sequence[InputDataset]) -> list[IncompleteInput]:
    """The incomplete groups among the inputs of a merge."""
    return [item for item in inputs if isinstance(item, IncompleteInput)]


def find_joins(inputs: Sequence[InputDataset], rename: Rename | None) -> list[IncompleteInput]:
    """Find the incomplete groups that other rows of the merge complete; see `IncompleteInput`.

    Reads the id of every group, and with `rename` its prompt; memory: eight bytes per group.

    Returns:
        The inputs that have some.
    """
    waiting = of_incomplete(inputs)
    if not waiting:
        return []
    apart, others = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
    for item in inputs:  # in this order, in which `rename` meets the prompts first
        for row_group in range(item.groups.n_row_groups):
            if isinstance(item, IncompleteInput):
                apart.append(text_keys(item.all_ids(row_group, rename)[1]))
            else:
                others.append(text_keys(item.ids(row_group, rename)[1]))
    found, times = np.unique(np.concatenate(apart), return_counts=True)
    keys = found[(times > 1) | np.isin(found, np.concatenate(others))]
    return [item for item in waiting if item.find_joins(keys, rename)]


def completable(
    families: Sequence[Family], joined: Sequence[IncompleteInput], incomplete: IncompleteRule
) -> tuple[list[Family], list[str]]:
    """The families that every joined incomplete group has, and the labels of the others.

    With `incomplete: keep` all families, of which those that one lacks become partial.

    Raises:
        DataError: one lacks a family, and `incomplete` is `error`.
    """
    lacking = [family for family in families if not all(item.has(family) for item in joined)]
    if incomplete == "keep":
        for family in lacking:
            family.partial = True
        return list(families), []
    if lacking and incomplete == "error":
        family = lacking[0]
        item = next(item for item in joined if not item.has(family))
        raise DataError(
            "the responses of a group have the same rewards and references",
            received=f"{family.label}, which the incomplete groups of {item.root} that other "
            "responses would complete do not have",
            remedy="keep it for the others (incomplete: keep) and score these afterwards "
            "(only_missing: true); or drop it from the new version (incomplete: drop) and compute "
            "it again there; the older version keeps it",
            **item.first_join(),
        )
    left = [family for family in families if not any(family is other for other in lacking)]
    return left, [family.label for family in lacking]


def common_reward(
    families: Sequence[Family], inputs: Sequence[InputDataset], *, leave_out: bool
) -> tuple[Family | None, list[str]]:
    """The reward that the incomplete groups of the new version have, and labels of others.

    Raises:
        DataError: they have different rewards, or one that the groups do not have, and `leave_out`
            is False.
    """
    waiting = of_incomplete(inputs)
    for family in families:
        if waiting and all(item.has(family) for item in waiting):
            return family, []
    held = [item for item in waiting if item.reward is not None]
    if held and not leave_out:
        first = held[0]
        assert first.reward is not None
        raise DataError(
            "the incomplete groups of merged datasets have the same reward, which their groups "
            "have too, or none",
            received=f"{family_label(first.reward)} in {first.root}, which the other datasets do "
            "not have",
            remedy="compute it for them first, or drop it from the new version "
            "(incomplete: drop); the older version keeps it",
            file=first.root,
        )
    return None, [family_label(item.reward) for item in held if item.reward is not None]


def write_remaining(
    root: Path,
    log: TaskLog,
    inputs: Sequence[InputDataset],
    rename: Rename | None,
    reward: Family | None,
    rows_per_row_group: int,
) -> list[FileEntry]:
    """The files of the incomplete groups that are not joined.

    A file of the first dataset of which every row remains is kept; the others are written anew, one
    task for each.

    Raises:
        DataError, IntegrityError, StorageError: as `write_incomplete` and `GroupDataset.table`.
    """
    found: list[FileEntry] = []
    task = 0
    for item in of_incomplete(inputs):
        first = 0
        for file in item.manifest.groups:
            row_groups = range(first, first + len(file.row_groups))
            first, task = row_groups.stop, task + 1
            if item.position == 0 and item.stays_whole(row_groups, rename):
                found.append(_entry(file))
                continue
            record = log.committed(waiting_name(task))
            if record is None:
                files = incomplete_file(
                    root,
                    waiting_name(task),
                    item.remaining(row_groups, rename, reward=reward is not None),
                    reward,
                    inputs[0].manifest.tokenizer,
                    rows_per_row_group,
                )
                record = log.commit(
                    TaskRecord(stage=log.stage, task=waiting_name(task), files=files)
                )
            found += record.files
    return found


def incomplete_file(
    root: Path,
    task: str,
    groups: Iterator[Group],
    reward: Family | None,
    tokenizer: TokenizerInfo | None,
    rows_per_row_group: int,
) -> list[FileEntry]:
    """Write incomplete groups with the reward of a family, as `write_incomplete`.

    Returns:
        The file; an empty list if there are no groups.
    """
    member = None if reward is None else reward.members[0]
    entry = write_incomplete(
        root,
        task,
        groups,
        reward=reward is not None,
        n_components=len(member.components) if isinstance(member, RewardFamily) else 0,
        vocab_size=tokenizer.vocab_size if tokenizer else None,
        rows_per_row_group=rows_per_row_group,
    )
    return [] if entry is None else [entry]


def _entry(file: FileEntry) -> FileEntry:
    return FileEntry(**{name: getattr(file, name) for name in FileEntry.model_fields})


def incomplete_groups(files: Sequence[FileEntry], reward: Family | None) -> IncompleteGroups | None:
    """The manifest's entry for files of incomplete groups; None if there are none."""
    if not files:
        return None
    member = None if reward is None else reward.members[0]
    apart = member.model_copy(update={"files": []}) if isinstance(member, RewardFamily) else None
    return IncompleteGroups(files=list(files), reward=apart)
