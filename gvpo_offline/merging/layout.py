"""Partitions the range of hash(group_id), and finds the files that a merge keeps unchanged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gvpo_offline.hashing import UInt64Array, text_keys
from gvpo_offline.merging.families import Family
from gvpo_offline.merging.inputs import InputDataset, Rename
from gvpo_offline.merging.work import task_name
from gvpo_offline.store.commit import TaskRecord
from gvpo_offline.store.spill import leading_bits

_MAX_PARTS = 1 << 16


class HashPartitions:
    """Partition of the range of hash(group_id) by a dataset's files, and the parts that change.

    Reads the id of every group, and with `rename` its prompt.

    Args:
        inputs: the dataset, then the datasets that are added to it.
        rename: maps groups to their ids in the result; None: they keep their ids.

    Attributes:
        n_parts: number of parts, a power of two, such that each file of the dataset lies in a part
            of its own; None if there is no such number up to 2^16.
    """

    def __init__(self, inputs: Sequence[InputDataset], rename: Rename | None) -> None:
        self._dataset = inputs[0]
        # Per file: lowest key, highest key, and whether the keys ascend.
        self._ranges: list[tuple[int, int, bool]] = []
        self._touched = np.zeros(_MAX_PARTS, bool)
        self._read_dataset(rename)
        for item in inputs[1:]:  # of incomplete groups, `ids` gives those that are joined
            for row_group in range(item.groups.n_row_groups):
                _, named = item.ids(row_group, rename)
                self._touch(text_keys(named))
        self.n_parts = self._parts()

    def _touch(self, keys: UInt64Array) -> None:
        self._touched[leading_bits(keys, _MAX_PARTS).astype(np.int64)] = True

    def _read_dataset(self, rename: Rename | None) -> None:
        row_group = 0
        for file in self._dataset.manifest.groups:
            keys = [np.zeros(0, np.uint64)]
            for _ in file.row_groups:
                own, named = self._dataset.ids(row_group, rename)
                keys.append(text_keys(own))
                renamed = [(a, b) for a, b in zip(own, named, strict=True) if a != b]
                self._touch(text_keys(name for pair in renamed for name in pair))
                row_group += 1
            of_file = np.concatenate(keys)
            ascending = bool((of_file[1:] > of_file[:-1]).all())
            ends = (int(of_file.min()), int(of_file.max())) if len(of_file) else (0, 0)
            self._ranges.append((*ends, ascending))

    def _parts(self) -> int | None:
        """The smallest power of two such that each file lies in a part of its own, or None."""
        n_parts = 1
        while n_parts <= _MAX_PARTS:
            low, high = (self._part_of(end, n_parts) for end in (0, 1))
            if np.array_equal(low, high) and len(np.unique(low)) == len(low):
                return n_parts
            n_parts *= 2
        return None

    def _part_of(self, end: int, n_parts: int) -> npt.NDArray[np.int64]:
        ends = np.array([file[end] for file in self._ranges], np.uint64)
        return leading_bits(ends, n_parts).astype(np.int64)

    def untouched(self, stage: str, families: Sequence[Family]) -> dict[int, TaskRecord]:
        """Records of the files that stay unchanged, by part, with the sidecars of `families`."""
        if self.n_parts is None:
            return {}
        touched = np.logical_or.reduce(self._touched.reshape(self.n_parts, -1), axis=1)
        sidecars = [
            {sidecar.base_sha256: sidecar for sidecar in family.members[0].files}
            for family in families
        ]
        return {
            part: TaskRecord(
                stage=stage,
                task=task_name(part),
                groups=[base],
                sidecars=[of_family[base.sha256] for of_family in sidecars],
            )
            for base, part, (_, _, ascending) in zip(
                self._dataset.manifest.groups,
                self._part_of(0, self.n_parts).tolist(),
                self._ranges,
                strict=True,
            )
            if ascending and not touched[part]
        }
