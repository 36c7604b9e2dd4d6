"""Adding to a dataset: shards of groups, sidecars, and the manifest version that names them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from gvpo_offline.errors import DataError
from gvpo_offline.rules import check_group
from gvpo_offline.schema import (
    GROUPS_COLUMNS,
    REWARDS_COLUMNS,
    Group,
    arrow_schema,
    groups_to_table,
    rewards_to_table,
)
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

# Entries that a folder may hold and still count as ours to write into.
_OWN_ENTRIES = {
    *("commits", "groups", "rewards", "reference", ".spill"),
    *("prompts", "samples", "batches"),
}


def write_groups(
    root: Path,
    stage: str,
    task: str,
    groups: Iterable[Group],
    *,
    reward: str | None,
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
        vocab_size: upper bound of the token ids, where known.
        rows_per_row_group: groups in a Parquet row group.

    Returns:
        A record for `TaskLog.commit`; until then no reader sees the files.

    Raises:
        DataError: a group breaks a rule, or its id occurs twice.
        StorageError: no room.
    """
    gate = _Gate(vocab_size, rewarded=reward is not None)
    rows = iter(groups)
    pieces = iter(lambda: list(itertools.islice(rows, rows_per_row_group)), [])
    entry = write_parquet(
        root, "groups", task, arrow_schema(GROUPS_COLUMNS), map(gate.admit, pieces)
    )
    base = BaseFile(**entry.model_dump(), n_responses=gate.n_responses, n_tokens=gate.n_tokens)
    sidecars = []
    if reward is not None:
        sidecars.append(
            write_sidecar(
                root, f"rewards/{reward}", task, base, REWARDS_COLUMNS_SCHEMA, gate.rewards
            )
        )
    return TaskRecord(stage=stage, task=task, groups=[base], sidecars=sidecars)


REWARDS_COLUMNS_SCHEMA = arrow_schema(REWARDS_COLUMNS)


class _Gate:
    """Checks the groups of one shard as they pass, and keeps what its sidecar and record need."""

    def __init__(self, vocab_size: int | None, *, rewarded: bool) -> None:
        self.n_responses = 0
        self.n_tokens = 0
        self.rewards: list[pa.Table] = []
        self._vocab_size = vocab_size
        self._rewarded = rewarded
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
            self.rewards.append(_rewards(groups))
        return groups_to_table(groups)


def _rewards(groups: Sequence[Group]) -> pa.Table:
    rewards = [group.rewards for group in groups]
    if any(values is None for values in rewards):
        missing = next(group for group in groups if group.rewards is None)
        raise DataError("every response has a reward", received="none", group=missing.group_id)
    return rewards_to_table([g.group_id for g in groups], [r for r in rewards if r is not None])


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


def publish(root: Path, build: Callable[[Manifest | None], Manifest]) -> Manifest:
    """Write the next manifest version.

    Args:
        root: the dataset's folder.
        build: makes the next manifest from the newest (None if there is none). Called again if
            another process published in the meantime, so that neither addition is lost.

    Raises:
        IntegrityError: a file that the new version names is missing or of another length.
    """
    while True:
        versions = manifest_versions(root)
        newest = load_manifest(root) if versions else None
        version = versions[-1] + 1 if versions else 1
        manifest = build(newest).model_copy(update={"version": version})
        for entry in manifest.groups:
            verify_file(root, entry, content=False)
        families = [f.files for f in manifest.rewards] + [f.files for f in manifest.references]
        for sidecar in itertools.chain.from_iterable(families):
            verify_file(root, sidecar.file, content=False)
        if create_only(manifest_path(root, version), dump_manifest(manifest)):
            return manifest
