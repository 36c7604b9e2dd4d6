"""Adding to a dataset: shards of groups, sidecars, and the manifest version that names them."""

from __future__ import annotations

import fcntl
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from gvpo_offline.errors import DataError
from gvpo_offline.group import Group
from gvpo_offline.rules import check_group
from gvpo_offline.store.commit import TaskRecord, create_only, verify_file
from gvpo_offline.store.manifest import (
    BaseFile,
    Manifest,
    Sidecar,
    dump_manifest,
    load_manifest,
    manifest_path,
    manifest_versions,
)
from gvpo_offline.store.parquet import ROWS_PER_ROW_GROUP, write_parquet
from gvpo_offline.store.schema import GROUPS_COLUMNS, arrow_schema, rewards_schema
from gvpo_offline.store.tables import groups_to_table, rewards_to_table

# Entries that a folder may hold and still count as ours to write into.
_OWN_ENTRIES = {
    *("commits", "groups", "rewards", "reference", ".spill"),
    *("prompts", "samples", "batches", "judgements"),
}


def write_groups(
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
    """Write one shard of groups, and its rewards sidecar when `reward` names one.

    Args:
        root: the dataset's folder.
        stage, task: what the shard's files are named after in the commit log.
        groups: the shard's rows, in order; each is held to `rules.check_group`. Only one row group
            of them is held at a time.
        reward: name of the reward family, whose values are `Group.rewards`.
        components: names of the parts that the rewards were made of: `RewardFamily.components`, the
            same ones for every shard. With any, each group has its `Group.components`.
        vocab_size: upper bound of the token ids, where known.
        rows_per_row_group: groups in a Parquet row group.

    Returns:
        A record for `TaskLog.commit`; until then no reader sees the files.

    Raises:
        DataError: a group breaks a rule, or its id occurs twice.
        StorageError: no room.
    """
    gate = _Gate(vocab_size, rewarded=reward is not None, n_components=len(components))
    rows = iter(groups)
    pieces = iter(lambda: list(itertools.islice(rows, rows_per_row_group)), [])
    entry = write_parquet(
        root, "groups", task, arrow_schema(GROUPS_COLUMNS), map(gate.admit, pieces)
    )
    base = BaseFile(**entry.model_dump(), n_responses=gate.n_responses, n_tokens=gate.n_tokens)
    sidecars = []
    if reward is not None:
        schema = rewards_schema(components=bool(components))
        sidecars.append(write_sidecar(root, f"rewards/{reward}", task, base, schema, gate.rewards))
    return TaskRecord(stage=stage, task=task, groups=[base], sidecars=sidecars)


class _Gate:
    """Checks the groups of one shard as they pass, and keeps what its sidecar and record need."""

    def __init__(self, vocab_size: int | None, *, rewarded: bool, n_components: int) -> None:
        self.n_responses = 0
        self.n_tokens = 0
        self.rewards: list[pa.Table] = []
        self._vocab_size = vocab_size
        self._rewarded = rewarded
        self._n_components = n_components
        self._seen: set[str] = set()

    def admit(self, groups: Sequence[Group]) -> pa.Table:
        """The rows of one row group, or DataError if a group breaks a rule."""
        for group in groups:
            check_group(group, file=group.source or None, row=None, vocab_size=self._vocab_size)
            if group.group_id in self._seen:
                raise DataError(
                    "a group id occurs once in a dataset",
                    received=f"{group.group_id} again at row {len(self._seen)}",
                    remedy="give different prompts different ids",
                    group=group.group_id,
                )
            self._seen.add(group.group_id)
            self.n_responses += group.group_size
            self.n_tokens += group.n_tokens
        if self._rewarded:
            self.rewards.append(_rewards(groups, self._n_components))
        return groups_to_table(groups)


def _rewards(groups: Sequence[Group], n_components: int) -> pa.Table:
    rewards, components = [], []
    for group in groups:
        if group.rewards is None:
            raise DataError("every response has a reward", received="none", group=group.group_id)
        rewards.append(group.rewards)
        found = 0 if group.components is None else len(group.components)
        if found != n_components:
            raise DataError(
                f"every group has the reward's {n_components} components",
                received=f"{found}",
                group=group.group_id,
            )
        if group.components is not None:
            components.append(group.components)
    ids = [group.group_id for group in groups]
    return rewards_to_table(ids, rewards, components if n_components else None)


def write_sidecar(
    root: Path,
    folder: str,
    task: str,
    base: BaseFile,
    schema: pa.Schema,
    row_groups: Iterable[pa.Table],
) -> Sidecar:
    """Write a sidecar of `base`, row group for row group; the footer names the base's hash.

    Raises:
        StorageError: no room.
    """
    bound = schema.with_metadata({"gvpo_offline.base_sha256": base.sha256})
    tables = (table.replace_schema_metadata(bound.metadata) for table in row_groups)
    entry = write_parquet(root, folder, task, bound, tables)
    assert entry.row_groups == base.row_groups, (entry.row_groups, base.row_groups)
    return Sidecar(base_sha256=base.sha256, file=entry)


def claim_folder(root: Path) -> None:
    """Make `root` a folder that a dataset may be written into.

    Raises:
        DataError: it holds files that no dataset of ours would.
    """
    if root.exists() and not root.is_dir():
        raise DataError("the output is a folder", received="a file", file=root)
    root.mkdir(parents=True, exist_ok=True)
    strangers = sorted(
        entry.name
        for entry in root.iterdir()
        if entry.name not in _OWN_ENTRIES
        and not entry.name.startswith("manifest-")
        and not entry.name.endswith(".tmp")
    )
    if strangers:
        raise DataError(
            "the output folder is empty or holds a dataset",
            received=", ".join(strangers[:5]),
            remedy="choose another output_dir, or empty this one",
            file=root,
        )


def lock_folder(root: Path, *, wait: bool = False) -> int | None:
    """Lock a dataset's folder against everybody else who writes groups into it.

    Args:
        root: the folder.
        wait: whether to wait for the lock, instead of refusing.

    Returns:
        A handle; closing it, or the end of the process, frees the lock. None on a file system
        without locks: commits still keep two runs apart.

    Raises:
        DataError: another process holds the lock.
    """
    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise DataError(
            "one import at a time, or merge or compaction or pull, writes into a folder",
            received="another process that is at work there",
            remedy="wait until it is done, or choose another folder",
            file=root,
        ) from error
    except OSError:
        os.close(handle)
        return None
    return handle


def publish(root: Path, build: Callable[[Manifest | None], Manifest | None]) -> Manifest:
    """Write the next manifest version, unless there is nothing to add.

    Args:
        root: the dataset's folder.
        build: makes the next manifest from the newest (None if there is none), or returns None
            where the newest has all that there is to add. Called again if another process
            published in the meantime, so that neither addition is lost.

    Raises:
        IntegrityError: a file that the new version names is missing or of another length.
        DataError: a reward or reference of the new version does not cover all its groups.
    """
    while True:
        versions = manifest_versions(root)
        newest = load_manifest(root) if versions else None
        version = versions[-1] + 1 if versions else 1
        built = build(newest)
        if built is None:
            assert newest is not None
            return newest
        manifest = built.model_copy(update={"version": version})
        for entry in manifest.groups:
            verify_file(root, entry, content=False)
        families = [f.files for f in manifest.rewards] + [f.files for f in manifest.references]
        for sidecars in families:
            _check_covered(root, manifest, sidecars)
            for sidecar in sidecars:
                verify_file(root, sidecar.file, content=False)
        if create_only(manifest_path(root, version), dump_manifest(manifest)):
            return manifest


def _check_covered(root: Path, manifest: Manifest, sidecars: Sequence[Sidecar]) -> None:
    """Raise DataError unless there is a sidecar for each groups file."""
    if {base.sha256 for base in manifest.groups} != {s.base_sha256 for s in sidecars}:
        raise DataError(
            "a reward or reference covers all groups of the version that it is added to",
            received="other groups: the dataset was merged or compacted meanwhile",
            remedy="run the same command again",
            file=root,
        )
