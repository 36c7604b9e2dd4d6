"""Reading a dataset: a manifest, one of its rewards and one of its references, row group by row
group.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gvpo_offline.errors import IntegrityError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.schema import (
    GROUPS_COLUMNS,
    REFERENCE_COLUMNS,
    REWARDS_COLUMNS,
    TRAINING_COLUMNS,
    Column,
    Group,
    groups_from_table,
)
from gvpo_offline.store.choice import (
    RewardChoice,
    WeightedReward,
    choose_reference,
    choose_rewards,
)
from gvpo_offline.store.columns import (
    Place,
    add_weighted,
    check_components,
    check_present,
    check_scalars,
    conformed,
    sizes_of,
)
from gvpo_offline.store.commit import verify_file
from gvpo_offline.store.manifest import (
    FileEntry,
    Manifest,
    ReferenceFamily,
    Sidecar,
    load_manifest,
)
from gvpo_offline.store.parquet import open_parquet, read_row_group

BASE_SHA256_KEY = b"gvpo_offline.base_sha256"
_OPEN_FILES = 32
_REWARDS_ALONE = tuple(c for c in REWARDS_COLUMNS if c.required)
Progress = Callable[[Sequence[FileEntry]], Iterator[FileEntry]]


@dataclass(frozen=True)
class _Joined:
    """The sidecars of one family, in the order of the groups files."""

    columns: Sequence[Column]
    sidecars: Sequence[Sidecar]
    weight: float = 1.0

    def wanted(self, columns: Sequence[str]) -> list[str]:
        """Which of `columns` these files hold, the group's id aside."""
        return [c.name for c in self.columns if c.name in columns and c.name != "group_id"]


class GroupDataset:
    """A dataset as training sees it: groups joined with their reward and one reference.

    A *row group* is the unit of reading; they are numbered through all files in manifest order.
    Opening reads the manifest only. The object is cheap to pickle: open files are left behind.

    Args:
        root: the dataset's folder.
        manifest: one version of it.
        rewards: the reward families to join: `Group.rewards` is their weighted sum. Components come
            along where there is a single family. Empty: none.
        reference: the reference family to join, or None.
    """

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        rewards: Sequence[WeightedReward] = (),
        reference: ReferenceFamily | None = None,
    ) -> None:
        self.root = root
        self.manifest = manifest
        self.rewards = tuple(rewards)
        self.reference = reference
        self._joined = [
            _Joined(
                REWARDS_COLUMNS if len(self.rewards) == 1 else _REWARDS_ALONE,
                _aligned(root, manifest, reward.family.files, "reward"),
                reward.weight,
            )
            for reward in self.rewards
        ]
        if reference is not None:
            aligned = _aligned(root, manifest, reference.files, "reference")
            self._joined.append(_Joined(REFERENCE_COLUMNS, aligned))
        self._handles: OrderedDict[str, pq.ParquetFile] = OrderedDict()

    @functools.cached_property
    def row_group_sizes(self) -> npt.NDArray[np.int64]:
        """Groups in each row group: (n_row_groups,) int64."""
        files = self.manifest.groups
        array = functools.cache(lambda sizes: np.array(sizes, np.int64))  # most are cut alike
        return np.concatenate([np.zeros(0, np.int64), *(array(f.row_groups) for f in files)])

    @functools.cached_property
    def _first_row_group(self) -> npt.NDArray[np.int64]:
        counts = [len(file.row_groups) for file in self.manifest.groups]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    @property
    def n_groups(self) -> int:
        """Groups of the dataset."""
        return int(self.row_group_sizes.sum())

    @property
    def n_row_groups(self) -> int:
        """Row groups of the dataset."""
        return len(self.row_group_sizes)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the content of all files in use: what a run's data *is*."""
        files: list[Any] = [file.sha256 for file in self.manifest.groups]
        for joined in self._joined:
            files += [sidecar.file.sha256 for sidecar in joined.sidecars]
        weights = [reward.weight for reward in self.rewards]
        return sha256_json(files if weights in ([], [1.0]) else [*files, weights])

    def files(self) -> list[FileEntry]:
        """Every file in use, once each."""
        entries: list[FileEntry] = list(self.manifest.groups)
        for joined in self._joined:
            entries += [sidecar.file for sidecar in joined.sidecars]
        return list({entry.path: entry for entry in entries}.values())

    def verify(self, *, content: bool = True, progress: Progress | None = None) -> None:
        """Check size and (with `content`) SHA-256 of every file in use.

        Raises:
            IntegrityError: naming the first file that is missing, shortened or altered.
        """
        files = self.files()
        for entry in progress(files) if progress else files:
            verify_file(self.root, entry, content=content)

    def locate(self, row_group: int) -> tuple[int, int]:
        """File number, and number of the row group within that file."""
        file = int(np.searchsorted(self._first_row_group, row_group, side="right")) - 1
        return file, row_group - int(self._first_row_group[file])

    def table(self, row_group: int, columns: Sequence[str]) -> pa.Table:
        """Some columns of one row group, sidecars joined; `group_id` is always among them.

        Columns of the schema that a file does not have are left out of the result.

        Raises:
            IntegrityError: a page fails its checksum, or a sidecar is not this groups file's.
            DataError: a column is missing or of another type, a reward or reference log-prob is
                not finite, or there is not one per response.
        """
        file, local = self.locate(row_group)
        base = self.manifest.groups[file]
        table = self._read(base, local, columns, GROUPS_COLUMNS)
        sizes = sizes_of(table)
        for joined in self._joined:
            wanted = joined.wanted(columns)
            if wanted:
                table = self._join(table, joined, file, local, wanted, sizes)
        return table

    def _join(
        self,
        table: pa.Table,
        joined: _Joined,
        file: int,
        local: int,
        wanted: Sequence[str],
        sizes: pa.ChunkedArray | None,
    ) -> pa.Table:
        """The table with the columns of one sidecar; a further reward is added to those before."""
        sidecar = joined.sidecars[file]
        read = self._read_sidecar(sidecar, local, wanted, joined.columns)
        place = self._place_in(sidecar.file, local)
        if not read.column("group_id").equals(table.column("group_id")):
            raise IntegrityError(
                "a sidecar's rows bear the group ids of its groups file",
                received=f"other ids in row group {local}",
                remedy="write the sidecar again for this dataset",
                file=place.file,
            )
        for name in read.column_names[1:]:
            column = read.column(name)
            if sizes is not None and name == "components":
                check_components(read, sizes, self._n_components, place)
            elif sizes is not None and name != "ref_token_logprobs":
                check_scalars(read, name, sizes, place)
            if name == "rewards" and (joined.weight != 1.0 or len(self.rewards) > 1):
                before = table.column(name) if name in table.column_names else None
                column = add_weighted(before, column, joined.weight)
                if before is not None:
                    table = table.drop_columns([name])
            table = table.append_column(name, column)
        return table

    @property
    def _n_components(self) -> int:
        return len(self.rewards[0].family.components) if len(self.rewards) == 1 else 0

    def groups(self, row_group: int, columns: Sequence[str] = TRAINING_COLUMNS) -> list[Group]:
        """The groups of one row group with rewards and reference log-probs where joined."""
        extra = [name for name in ("rewards", "ref_seq_logprobs") if name not in columns]
        return groups_from_table(self.table(row_group, [*columns, *extra]))

    def place(self, row_group: int, column: str = "group_id") -> Place:
        """The file that holds a column of a row group, and the row that it begins with there."""
        number, local = self.locate(row_group)
        entry: FileEntry = self.manifest.groups[number]
        for joined in self._joined:
            if joined.wanted([column]):
                entry = joined.sidecars[number].file
        return self._place_in(entry, local)

    def _place_in(self, entry: FileEntry, local: int) -> Place:
        return Place(self.root / entry.path, sum(entry.row_groups[:local]))

    def _read(
        self, entry: FileEntry, local: int, columns: Sequence[str], known: Sequence[Column]
    ) -> pa.Table:
        path = self.root / entry.path
        handle = self._handle(entry)
        present = handle.schema_arrow.names
        check_present(present, known, path)
        wanted = [c.name for c in known if c.name in {*columns, "group_id"} & set(present)]
        table = read_row_group(handle, path, local, wanted).select(wanted)
        return conformed(table, known, self._place_in(entry, local))

    def _read_sidecar(
        self, sidecar: Sidecar, local: int, columns: Sequence[str], known: Sequence[Column]
    ) -> pa.Table:
        metadata = self._handle(sidecar.file).schema_arrow.metadata or {}
        bound_to = metadata.get(BASE_SHA256_KEY)
        if bound_to is not None and bound_to.decode("ascii", "replace") != sidecar.base_sha256:
            raise IntegrityError(
                f"the sidecar is bound to the groups file {sidecar.base_sha256[:16]}…",
                received=f"one of {bound_to.decode('ascii', 'replace')[:16]}…",
                remedy="restore the file from a copy, or write the sidecar again for this dataset",
                file=self.root / sidecar.file.path,
            )
        return self._read(sidecar.file, local, columns, known)

    def _handle(self, entry: FileEntry) -> pq.ParquetFile:
        handle = self._handles.pop(entry.path, None)
        if handle is None:
            path = self.root / entry.path
            handle = open_parquet(path, entry.footer_sha256)
            numbers = range(handle.num_row_groups)
            sizes = tuple(handle.metadata.row_group(i).num_rows for i in numbers)
            if sizes != entry.row_groups:
                raise IntegrityError(
                    "the file's row groups are those that the manifest names",
                    received=f"{len(sizes)} with {sum(sizes)} rows instead of "
                    f"{len(entry.row_groups)} with {entry.rows}",
                    remedy="restore the file from a copy",
                    file=path,
                )
        self._handles[entry.path] = handle
        while len(self._handles) > _OPEN_FILES:
            self._handles.popitem(last=False)[1].close()
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": OrderedDict()}


def _aligned(root: Path, manifest: Manifest, files: Sequence[Sidecar], label: str) -> list[Sidecar]:
    """The sidecars in the order of the groups files, or IntegrityError if one is missing or
    foreign.
    """
    by_base = {sidecar.base_sha256: sidecar for sidecar in files}
    aligned = []
    for base in manifest.groups:
        sidecar = by_base.get(base.sha256)
        if sidecar is None or sidecar.file.row_groups != base.row_groups:
            raise IntegrityError(
                f"every groups file has a {label} sidecar with the same rows",
                received="none" if sidecar is None else f"{sidecar.file.rows} rows",
                remedy=f"compute the {label} for the whole dataset again",
                file=root / base.path,
            )
        aligned.append(sidecar)
    return aligned


def open_dataset(
    path: str | Path,
    *,
    reward: RewardChoice = None,
    reference: str | None = None,
    version: int | None = None,
    join: Sequence[str] = ("reward", "reference"),
) -> GroupDataset:
    """Open a dataset's folder for reading.

    Args:
        path: a folder with a manifest, as `gvpo-offline import` writes.
        reward: which reward to join (`name` or `name@version`), or several with weights
            (`{name: weight}`); may be left out if there is one.
        reference: which reference to join, by the first digits of its fingerprint; likewise.
        version: an older manifest version; by default the newest.
        join: what must be joined; leave one out to read a dataset that does not have it yet.

    Raises:
        DataError: there is no dataset at `path`.
        ConfigError: the reward or reference does not exist, or several do and none was named.
        IntegrityError: the manifest was altered, or a sidecar does not fit its groups file.
    """
    root = Path(path)
    manifest = load_manifest(root, version)
    return GroupDataset(
        root,
        manifest,
        choose_rewards(manifest, reward, file=root) if "reward" in join else (),
        choose_reference(manifest, reference, file=root) if "reference" in join else None,
    )
