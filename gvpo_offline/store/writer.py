"""Adds to a dataset: shards of groups, sidecars, and the manifest version that lists them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from gvpo_offline.errors import DataError
from gvpo_offline.files import remove_abandoned
from gvpo_offline.group import Group
from gvpo_offline.rules import check_group
from gvpo_offline.store.arrow import groups_to_table, rewards_to_table
from gvpo_offline.store.commit import TaskRecord, create_only, verify_file
from gvpo_offline.store.manifest import (
    BaseFile,
    Manifest,
    Sidecar,
    check_manifest,
    dump_manifest,
    load_manifest,
    manifest_path,
    manifest_versions,
    with_schema_version,
)
from gvpo_offline.store.parquet import ROWS_PER_ROW_GROUP, write_parquet
from gvpo_offline.store.schema import GROUPS_COLUMNS, arrow_schema, rewards_schema

# Entries of a dataset's folder; a folder with others is not written to.
IMPORT_REPORT = "import_report.jsonl"
"""File beside the manifest that lists the rows that an import dropped; not part of the dataset."""
_OWN_ENTRIES = {
    IMPORT_REPORT,
    *("commits", "groups", "rewards", "reference", "incomplete", ".spill"),
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
        stage, task: of the commit record.
        groups: the shard's rows, in order; each is checked by `rules.check_group`. One row group
            of them is in memory at a time.
        reward: name of the reward family of `Group.rewards`; None: no rewards are written.
        components: names of the reward's components (`RewardFamily.components`), the same for every
            shard. If there are any, each group has `Group.components`.
        vocab_size: number of token ids, if known.
        rows_per_row_group: groups per Parquet row group.

    Returns:
        A record for `TaskLog.commit`; no reader sees the files before that.

    Raises:
        DataError: a group breaks a rule, or its id occurs twice.
        StorageError: the disk is full.
    """
    checker = _ShardChecker(vocab_size, rewarded=reward is not None, n_components=len(components))
    rows = iter(groups)
    pieces = iter(lambda: list(itertools.islice(rows, rows_per_row_group)), [])
    entry = write_parquet(
        root, "groups", task, arrow_schema(GROUPS_COLUMNS), map(checker.table, pieces)
    )
    base = BaseFile(
        **entry.model_dump(), n_responses=checker.n_responses, n_tokens=checker.n_tokens
    )
    sidecars = []
    if reward is not None:
        schema = rewards_schema(components=bool(components))
        sidecars.append(
            write_sidecar(root, f"rewards/{reward}", task, base, schema, checker.rewards)
        )
    return TaskRecord(stage=stage, task=task, groups=[base], sidecars=sidecars)


class _ShardChecker:
    """Checks the groups of one shard while they are written, and keeps rewards and counts."""

    def __init__(self, vocab_size: int | None, *, rewarded: bool, n_components: int) -> None:
        self.n_responses = 0
        self.n_tokens = 0
        self.rewards: list[pa.Table] = []
        self._vocab_size = vocab_size
        self._rewarded = rewarded
        self._n_components = n_components
        self._seen: set[str] = set()

    def table(self, groups: Sequence[Group]) -> pa.Table:
        """The rows of one row group; DataError if a group breaks a rule."""
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
                f"every group has the {n_components} components of its reward",
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
    """Write a sidecar with the row groups of `base`; its footer has the hash of `base`.

    Raises:
        StorageError: the disk is full.
    """
    bound = schema.with_metadata({"gvpo_offline.base_sha256": base.sha256})
    tables = (table.replace_schema_metadata(bound.metadata) for table in row_groups)
    entry = write_parquet(root, folder, task, bound, tables)
    assert entry.row_groups == base.row_groups, (entry.row_groups, base.row_groups)
    return Sidecar(base_sha256=base.sha256, file=entry)


def is_own_entry(name: str) -> bool:
    """Whether an entry of a dataset's folder has the name of one that stages write."""
    return name in _OWN_ENTRIES or name.startswith("manifest-") or name.endswith(".tmp")


def claim_folder(root: Path) -> None:
    """Create `root`, or check that a dataset may be written to it.

    Raises:
        DataError: it holds files that do not belong to a dataset.
    """
    if os.path.lexists(root) and not root.is_dir():
        found = "a link to nothing" if root.is_symlink() and not root.exists() else "a file"
        raise DataError("the output is a folder", received=found, file=root)
    root.mkdir(parents=True, exist_ok=True)
    others = sorted(entry.name for entry in root.iterdir() if not is_own_entry(entry.name))
    if others:
        raise DataError(
            "the output folder is empty or holds a dataset",
            received=", ".join(others[:5]),
            remedy="choose another output_dir, or empty this one",
            file=root,
        )


def publish(root: Path, build: Callable[[Manifest | None], Manifest | None]) -> Manifest:
    """Write the next manifest version, unless there is nothing to add.

    Args:
        root: the dataset's folder.
        build: returns the next manifest, given the newest (None if there is none); or None if there
            is nothing to add. Called again if another process published in the meantime, so that
            neither addition is lost.

    Raises:
        IntegrityError: a file of the new version is missing or has another length.
        DataError: a reward or reference of the new version does not cover all groups.
    """
    remove_abandoned(root, "manifest-*.json")
    while True:
        versions = manifest_versions(root)
        newest = load_manifest(root) if versions else None
        version = versions[-1] + 1 if versions else 1
        built = build(newest)
        if built is None:
            assert newest is not None
            return newest
        manifest = with_schema_version(built.model_copy(update={"version": version}))
        check_manifest(manifest, manifest_path(root, version))
        for entry in manifest.files():
            verify_file(root, entry, content=False)
        families = [f.files for f in manifest.rewards] + [f.files for f in manifest.references]
        for sidecars in families:
            _check_covered(root, manifest, sidecars)
        if create_only(manifest_path(root, version), dump_manifest(manifest)):
            return manifest


def _check_covered(root: Path, manifest: Manifest, sidecars: Sequence[Sidecar]) -> None:
    """Raise DataError unless each groups file has a sidecar."""
    if {base.sha256 for base in manifest.groups} != {s.base_sha256 for s in sidecars}:
        raise DataError(
            "a reward or reference covers all groups of the version that it is added to",
            received="other groups, because the dataset was merged or compacted in the meantime",
            remedy="run the same command again",
            file=root,
        )
