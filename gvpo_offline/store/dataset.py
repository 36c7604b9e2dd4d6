"""Reads a dataset: groups joined with a reward and a reference, one row group at a time."""

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
from gvpo_offline.store.arrow import groups_from_table
from gvpo_offline.store.columns import (
    RowGroupLocation,
    add_weighted,
    cast_columns,
    check_components,
    check_present,
    check_scalars,
    response_counts,
)
from gvpo_offline.store.location import RemoteSettings, local_folder
from gvpo_offline.store.manifest import RESTORE, FileEntry, Manifest, ReferenceFamily, Sidecar
from gvpo_offline.store.parquet import Shard, read_row_group
from gvpo_offline.store.row_group_sizes import are_many, rows_before, size_array
from gvpo_offline.store.schema import (
    GROUPS_COLUMNS,
    REFERENCE_COLUMNS,
    REWARDS_COLUMNS,
    TRAINING_COLUMNS,
    Column,
)
from gvpo_offline.store.shown import ShownDataset
from gvpo_offline.store.sidecar_choice import (
    RewardChoice,
    WeightedReward,
    check_has_groups,
    choose_reference_family,
    choose_reward_families,
)
from gvpo_offline.store.storage import LocalStorage, Storage, open_storage

BASE_SHA256_KEY = b"gvpo_offline.base_sha256"
_OPEN_FILES = 32
_REWARDS_ALONE = tuple(c for c in REWARDS_COLUMNS if c.required)
Progress = Callable[[Sequence[FileEntry]], Iterator[FileEntry]]


@dataclass(frozen=True)
class _JoinedSidecars:
    """The sidecars of one reward or reference family, in the order of the groups files."""

    columns: Sequence[Column]
    sidecars: Sequence[Sidecar]
    weight: float = 1.0

    def wanted(self, columns: Sequence[str]) -> list[str]:
        """Those of `columns` that these files hold, without `group_id`."""
        return [c.name for c in self.columns if c.name in columns and c.name != "group_id"]


class GroupDataset(ShownDataset):
    """A dataset for reading: groups joined with their reward and one reference.

    A *row group* is the unit of reading; row groups are numbered across all files in manifest
    order. Opening reads the manifest only. The object pickles cheaply, without its open files.
    It is thread-safe.

    Args:
        root: the dataset's folder, or its storage.
        manifest: one version of the dataset.
        rewards: the reward families to join; `Group.rewards` is their weighted sum. Components are
            joined if there is a single family. Empty: none.
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
            _JoinedSidecars(
                REWARDS_COLUMNS if len(self.rewards) == 1 else _REWARDS_ALONE,
                _aligned(self.storage, manifest, reward.family.files, "reward"),
                reward.weight,
            )
            for reward in self.rewards
        ]
        if reference is not None:
            aligned = _aligned(self.storage, manifest, reference.files, "reference")
            self._joined.append(_JoinedSidecars(REFERENCE_COLUMNS, aligned))
        self._handles: OrderedDict[str, Shard] = OrderedDict()

    @property
    def root(self) -> Path | str:
        """The dataset's folder, or its URL."""
        return self.storage.root

    @property
    def folder(self) -> Path:
        """The dataset's local folder, for writing; ConfigError if it is at a URL."""
        return local_folder("dataset", self.root)

    @functools.cached_property
    def row_group_sizes(self) -> npt.NDArray[np.int64]:
        """(n_row_groups,) int64, the number of groups in each row group."""
        files = self.manifest.groups
        # Claims of a manifest take memory from here on, so the large ones are compared with files.
        self.storage.verify((f for f in files if are_many(f.row_groups)), content=False)
        # Cached because most files have the same sizes.
        array = functools.cache(size_array)
        return np.concatenate([np.zeros(0, np.int64), *(array(f.row_groups) for f in files)])

    @functools.cached_property
    def _first_row_group(self) -> npt.NDArray[np.int64]:
        counts = [len(file.row_groups) for file in self.manifest.groups]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    @property
    def n_groups(self) -> int:
        """Groups of the dataset."""
        return self.manifest.n_groups

    @property
    def n_row_groups(self) -> int:
        """Row groups of the dataset."""
        return int(self._first_row_group[-1])

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the hashes of all files in use, which identifies the training data."""
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
        """Check the files in use.

        Args:
            content: check the SHA-256 of local files and the footers of remote ones as well as the
                sizes. Pages are verified at every read in any case.
            whole: check the SHA-256 of remote files too, which downloads them.
            progress: wraps the list of files.
            part: slice of `files()` to check.

        Raises:
            IntegrityError: a file is missing, shortened or altered.
        """
        files = self.files()[part]
        self.storage.verify(progress(files) if progress else files, content=content, whole=whole)

    def locate(self, row_group: int) -> tuple[int, int]:
        """Index of a row group's file, and of the row group within that file."""
        file = int(np.searchsorted(self._first_row_group, row_group, side="right")) - 1
        return file, row_group - int(self._first_row_group[file])

    def table(self, row_group: int, columns: Sequence[str]) -> pa.Table:
        """Some columns of one row group, sidecars joined; `group_id` is always included.

        Columns of the schema that a file does not have are missing from the result.

        Raises:
            IntegrityError: a page fails its checksum, or a sidecar belongs to another groups file.
            DataError: a required column is missing, a column has another type, or there is not one
                finite reward and reference log-prob per response. A reference of a selection has
                NaN for every other response, and a partial family for those without a number.
        """
        file, local = self.locate(row_group)
        base = self.manifest.groups[file]
        table = self._read(base, local, columns, GROUPS_COLUMNS)
        sizes = response_counts(table)
        for joined in self._joined:
            wanted = joined.wanted(columns)
            if wanted:
                table = self._join(table, joined, file, local, wanted, sizes)
        return table

    def _join(
        self,
        table: pa.Table,
        joined: _JoinedSidecars,
        file: int,
        local: int,
        wanted: Sequence[str],
        sizes: pa.ChunkedArray | None,
    ) -> pa.Table:
        """The table with the columns of one sidecar; the rewards of several families are summed."""
        sidecar = joined.sidecars[file]
        read = self._read(sidecar.file, local, wanted, joined.columns, sidecar.base_sha256)
        location = self._location_in(sidecar.file, local)
        if not read.column("group_id").equals(table.column("group_id")):
            raise IntegrityError(
                "the rows of a sidecar have the group ids of its groups file",
                received=f"other ids in row group {local}",
                remedy="write the sidecar again for this dataset",
                file=location.file,
            )
        for name in read.column_names[1:]:
            column = read.column(name)
            if sizes is not None and name == "components":
                check_components(read, sizes, self._n_components, location)
            elif sizes is not None and name != "ref_token_logprobs":
                gaps = self._rewards_have_gaps if name == "rewards" else self._reference_has_gaps
                check_scalars(read, name, sizes, location, gaps=gaps)
            if name == "rewards" and (joined.weight != 1.0 or len(self.rewards) > 1):
                before = table.column(name) if name in table.column_names else None
                column = add_weighted(before, column, joined.weight)
                if sizes is not None:  # finite rewards may have a sum that is not
                    number = read.column_names.index(name)
                    summed = read.set_column(number, name, column)
                    check_scalars(summed, name, sizes, location, gaps=self._rewards_have_gaps)
                if before is not None:
                    table = table.drop_columns([name])
            table = table.append_column(name, column)
        return table

    @property
    def _reference_has_gaps(self) -> bool:
        own = self.reference
        return own is not None and (own.selection is not None or own.partial)

    @property
    def _rewards_have_gaps(self) -> bool:
        return any(reward.family.partial for reward in self.rewards)

    @property
    def _n_components(self) -> int:
        return len(self.rewards[0].family.components) if len(self.rewards) == 1 else 0

    def groups(self, row_group: int, columns: Sequence[str] = TRAINING_COLUMNS) -> list[Group]:
        """The groups of one row group, with rewards and reference log-probs where joined."""
        extra = [name for name in ("rewards", "ref_seq_logprobs") if name not in columns]
        return groups_from_table(self.table(row_group, [*columns, *extra]))

    def location(self, row_group: int, column: str = "group_id") -> RowGroupLocation:
        """The location of a column of a row group: its file, and its first row in the file."""
        number, local = self.locate(row_group)
        entry: FileEntry = self.manifest.groups[number]
        for joined in self._joined:
            if joined.wanted([column]):
                entry = joined.sidecars[number].file
        return self._location_in(entry, local)

    def _location_in(self, entry: FileEntry, local: int) -> RowGroupLocation:
        return RowGroupLocation(self.storage.name(entry.path), rows_before(entry.row_groups, local))

    def _read(
        self,
        entry: FileEntry,
        local: int,
        columns: Sequence[str],
        known: Sequence[Column],
        base_sha256: str | None = None,
    ) -> pa.Table:
        """Some columns of a row group of one file; `base_sha256`: groups file of a sidecar."""
        location = self._location_in(entry, local)
        with self._opened(entry) as shard:
            if base_sha256 is not None:
                _check_bound(shard, base_sha256, location.file)
            present = shard.schema_arrow.names
            check_present(present, known, location.file)
            wanted = [c.name for c in known if c.name in {*columns, "group_id"} & set(present)]
            table = read_row_group(shard, location.file, local, wanted).select(wanted)
        return cast_columns(table, known, location)

    @contextmanager
    def _opened(self, entry: FileEntry) -> Iterator[Shard]:
        """An open file for this thread alone, returned to the pool unless reading it failed."""
        shard = self._handles.pop(entry.path, None)
        if shard is None:
            shard = self.storage.open(entry)
            footer = shard.metadata
            sizes = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
            if sizes != entry.row_groups:
                raise IntegrityError(
                    "the file has the row groups in the manifest",
                    received=f"{len(sizes)} with {sum(sizes)} rows instead of "
                    f"{len(entry.row_groups)} with {entry.rows}",
                    remedy=RESTORE,
                    file=self.storage.name(entry.path),
                )
        yield shard
        self._handles[entry.path] = shard
        while len(self._handles) > _OPEN_FILES:
            with suppress(KeyError):  # another thread removed it
                self._handles.popitem(last=False)[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": OrderedDict()}


def _check_bound(shard: Shard, base_sha256: str, file: Path | str) -> None:
    """Raise IntegrityError if a sidecar's footer has the hash of another groups file."""
    metadata = shard.schema_arrow.metadata or {}
    bound_to = metadata.get(BASE_SHA256_KEY, base_sha256.encode()).decode("ascii", "replace")
    if bound_to != base_sha256:
        raise IntegrityError(
            f"the sidecar is bound to the groups file {base_sha256[:16]}…",
            received=f"a sidecar of {bound_to[:16]}…",
            remedy="restore the file from a copy, or write the sidecar again for this dataset",
            file=file,
        )


def _aligned(
    storage: Storage, manifest: Manifest, files: Sequence[Sidecar], label: str
) -> list[Sidecar]:
    """The sidecars in the order of the groups files.

    Raises:
        IntegrityError: a groups file has no sidecar, or one with other row groups.
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
        path: a dataset's folder, as `gvpo-offline import` writes it; or its URL in any fsspec file
            system: s3://, gs://, hf://, https:// …
        reward: the reward to join (`name` or `name@version`), or several with weights
            (`{name: weight}`); may be omitted if there is one.
        reference: the reference to join, by the first digits of its fingerprint; may be omitted if
            there is one.
        version: manifest version; by default the newest.
        join: what to join; leave one out for a dataset that does not have it yet.
        remote: how a URL is read: cache, timeout, attempts, options of the file system.

    Raises:
        DataError: there is no dataset at `path`, or it holds incomplete groups alone and `join`
            names something.
        ConfigError: the reward or reference does not exist, or there are several and none is named;
            or no installed file system reads the URL.
        IntegrityError: the manifest was altered, or a sidecar does not match its groups file.
        StorageError: the URL cannot be read.
    """
    storage = open_storage(path, remote)
    manifest = storage.manifest(version)
    file = storage.root
    if join:
        check_has_groups(manifest, file)
    return GroupDataset(
        storage,
        manifest,
        choose_reward_families(manifest, reward, file=file) if "reward" in join else (),
        choose_reference_family(manifest, reference, file=file) if "reference" in join else None,
    )
