"""Reading a dataset: a manifest, one of its rewards and one of its references, row group by row
group.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gvpo_offline.errors import IntegrityError
from gvpo_offline.group import Group
from gvpo_offline.hashing import sha256_json
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
from gvpo_offline.store.location import RemoteSettings, local_folder
from gvpo_offline.store.manifest import (
    FileEntry,
    Manifest,
    ReferenceFamily,
    Sidecar,
)
from gvpo_offline.store.parquet import Shard, read_row_group
from gvpo_offline.store.schema import (
    GROUPS_COLUMNS,
    REFERENCE_COLUMNS,
    REWARDS_COLUMNS,
    TRAINING_COLUMNS,
    Column,
)
from gvpo_offline.store.storage import LocalStorage, Storage, open_storage
from gvpo_offline.store.tables import groups_from_table

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
    Opening reads the manifest only. The object is cheap to pickle: open files are left behind. Any
    thread may read, and several at once.

    Args:
        root: the dataset's folder, or the storage that holds it.
        manifest: one version of it.
        rewards: the reward families to join: `Group.rewards` is their weighted sum. Components come
            along where there is a single family. Empty: none.
        reference: the reference family to join, or None.
    """

    def __init__(
        self,
        root: Path | Storage,
        manifest: Manifest,
        rewards: Sequence[WeightedReward] = (),
        reference: ReferenceFamily | None = None,
    ) -> None:
        self.storage = LocalStorage(root) if isinstance(root, Path) else root
        self.manifest = manifest
        self.rewards = tuple(rewards)
        self.reference = reference
        self._joined = [
            _Joined(
                REWARDS_COLUMNS if len(self.rewards) == 1 else _REWARDS_ALONE,
                _aligned(self.storage, manifest, reward.family.files, "reward"),
                reward.weight,
            )
            for reward in self.rewards
        ]
        if reference is not None:
            aligned = _aligned(self.storage, manifest, reference.files, "reference")
            self._joined.append(_Joined(REFERENCE_COLUMNS, aligned))
        self._handles: OrderedDict[str, Shard] = OrderedDict()

    @property
    def root(self) -> Path | str:
        """The dataset's folder or URL, as messages name it."""
        return self.storage.root

    @property
    def folder(self) -> Path:
        """The dataset's local folder, to write into; ConfigError if it is at a URL."""
        return local_folder("dataset", self.root)

    @functools.cached_property
    def row_group_sizes(self) -> npt.NDArray[np.int64]:
        """(n_row_groups,) int64, the number of groups in each row group."""
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
        """SHA-256 over the content of all files in use; it identifies a run's data."""
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

    def verify(
        self,
        *,
        content: bool = True,
        whole: bool = False,
        progress: Progress | None = None,
        part: slice = slice(None),
    ) -> None:
        """Check every file in use, or a part of them.

        Args:
            content: the SHA-256 of local files, the footers of remote ones, and not the size alone.
                Pages are verified whenever they are read, whatever was checked before.
            whole: the SHA-256 of remote files as well, which reads them whole.
            progress: wraps the list of files.
            part: of `files()`.

        Raises:
            IntegrityError: naming a file that is missing, shortened or altered.
        """
        files = self.files()[part]
        self.storage.verify(progress(files) if progress else files, content=content, whole=whole)

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
        read = self._read(sidecar.file, local, wanted, joined.columns, sidecar.base_sha256)
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
                if sizes is not None:  # finite rewards may have a sum that is not
                    number = read.column_names.index(name)
                    check_scalars(read.set_column(number, name, column), name, sizes, place)
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
        return Place(self.storage.name(entry.path), sum(entry.row_groups[:local]))

    def _read(
        self,
        entry: FileEntry,
        local: int,
        columns: Sequence[str],
        known: Sequence[Column],
        base_sha256: str | None = None,
    ) -> pa.Table:
        """Some columns of a row group of one file; `base_sha256`: what a sidecar is bound to."""
        place = self._place_in(entry, local)
        with self._opened(entry) as shard:
            if base_sha256 is not None:
                _check_bound(shard, base_sha256, place.file)
            present = shard.schema_arrow.names
            check_present(present, known, place.file)
            wanted = [c.name for c in known if c.name in {*columns, "group_id"} & set(present)]
            table = read_row_group(shard, place.file, local, wanted).select(wanted)
        return conformed(table, known, place)

    @contextmanager
    def _opened(self, entry: FileEntry) -> Iterator[Shard]:
        """An open file, for this thread alone; it is kept for later where it read well."""
        shard = self._handles.pop(entry.path, None)
        if shard is None:
            shard = self.storage.open(entry)
            numbers = range(shard.num_row_groups)
            sizes = tuple(shard.metadata.row_group(i).num_rows for i in numbers)
            if sizes != entry.row_groups:
                raise IntegrityError(
                    "the file's row groups are those that the manifest names",
                    received=f"{len(sizes)} with {sum(sizes)} rows instead of "
                    f"{len(entry.row_groups)} with {entry.rows}",
                    remedy="restore the file from a copy",
                    file=self.storage.name(entry.path),
                )
        yield shard
        self._handles[entry.path] = shard
        while len(self._handles) > _OPEN_FILES:
            with suppress(KeyError):  # another thread was faster
                self._handles.popitem(last=False)[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": OrderedDict()}


def _check_bound(shard: Shard, base_sha256: str, file: Path | str) -> None:
    """Raise IntegrityError if a sidecar's footer names another groups file."""
    metadata = shard.schema_arrow.metadata or {}
    bound_to = metadata.get(BASE_SHA256_KEY, base_sha256.encode()).decode("ascii", "replace")
    if bound_to != base_sha256:
        raise IntegrityError(
            f"the sidecar is bound to the groups file {base_sha256[:16]}…",
            received=f"one of {bound_to[:16]}…",
            remedy="restore the file from a copy, or write the sidecar again for this dataset",
            file=file,
        )


def _aligned(
    storage: Storage, manifest: Manifest, files: Sequence[Sidecar], label: str
) -> list[Sidecar]:
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
                file=storage.name(base.path),
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
    remote: RemoteSettings | None = None,
) -> GroupDataset:
    """Open a dataset for reading.

    Args:
        path: a folder with a manifest, as `gvpo-offline import` writes; or the URL of one, in any
            file system of fsspec: s3://, gs://, hf://, https:// …
        reward: which reward to join (`name` or `name@version`), or several with weights
            (`{name: weight}`); may be left out if there is one.
        reference: which reference to join, by the first digits of its fingerprint; likewise.
        version: an older manifest version; by default the newest.
        join: what must be joined; leave one out to read a dataset that does not have it yet.
        remote: how a URL is read: cache, patience, options of the file system.

    Raises:
        DataError: there is no dataset at `path`.
        ConfigError: the reward or reference does not exist, or several do and none was named; or
            nothing here reads the URL.
        IntegrityError: the manifest was altered, or a sidecar does not fit its groups file.
        StorageError: the URL cannot be read.
    """
    storage = open_storage(path, remote)
    manifest = storage.manifest(version)
    file = storage.root
    return GroupDataset(
        storage,
        manifest,
        choose_rewards(manifest, reward, file=file) if "reward" in join else (),
        choose_reference(manifest, reference, file=file) if "reference" in join else None,
    )
