"""The stages `merge` and `compact`, which write the next version of a dataset.

Merging writes a new version of the first dataset, not a new folder. Shards without new groups stay
the same files, and programs that read an older version are not affected.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gvpo_offline.errors import DataError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.identity import defaults_of, identity_settings
from gvpo_offline.merging.divided import is_divided
from gvpo_offline.merging.families import Family
from gvpo_offline.merging.inputs import (
    InputDataset,
    added_sha256,
    check_compatible,
    common_families,
    groups_sha256,
)
from gvpo_offline.merging.layout import HashPartitions
from gvpo_offline.merging.names import PromptGroupIds
from gvpo_offline.merging.outcome import COUNT_TEXTS, RewriteResult
from gvpo_offline.merging.rewrite import Rewrite
from gvpo_offline.merging.settings import CompactConfig, MergeConfig, RewriteSettings
from gvpo_offline.merging.waiting import (
    common_reward,
    completable,
    find_joins,
    incomplete_groups,
    with_incomplete,
    write_remaining,
)
from gvpo_offline.merging.work import discard, locked_dataset, remove_old
from gvpo_offline.secret_settings import public
from gvpo_offline.store.commit import TaskLog, TaskRecord, undo_on_bad_input
from gvpo_offline.store.location import local_folder
from gvpo_offline.store.manifest import (
    IncompleteGroups,
    LineageStep,
    Manifest,
    ReferenceFamily,
    RewardFamily,
    Sidecar,
    load_manifest,
)
from gvpo_offline.store.schema import SCHEMA_VERSION
from gvpo_offline.store.spill import power_of_two
from gvpo_offline.store.writer import publish
from gvpo_offline.version import __version__
from gvpo_offline.workers.settings import WorkerSettings

# Increment it with every change by which the same datasets and settings give other bytes.
_REWRITE_VERSION = 1
# Settings that do not change the written files, given the datasets.
_NOT_IN_IDENTITY = ("dataset", "add", "show_progress", "remove_old")


def merge(config: MergeConfig, worker_settings: WorkerSettings | None = None) -> RewriteResult:
    """Add the groups of other datasets to a dataset, as its next version.

    A dataset whose groups files an earlier merge already added is skipped, so that repeating the
    command changes nothing.

    Args:
        config: the datasets and how they are joined.
        worker_settings: where rows are read and shards are written; default: in this process.

    Raises:
        ConfigError: `shard` is set.
        DataError: the datasets or the rows of a group cannot be merged, or another process writes
            to the dataset. Nothing is published, and the files of this merge are removed.
        IntegrityError: the tokenizers differ, or a file is damaged.
        StorageError: the disk is full; committed shards stay, and the same command continues from
            them.
    """
    workers = _workers(config, worker_settings)
    root = local_folder("dataset", config.dataset)
    with locked_dataset(root) as spilled:
        dataset = InputDataset(root, 0)
        folders = [config.add] if isinstance(config.add, str) else config.add
        paths = {name: local_folder("add", name) for name in folders}
        merged = _merged_before(dataset.manifest)
        found = {name: added_sha256(load_manifest(path)) for name, path in paths.items()}
        skipped = [name for name in folders if found[name] in merged]
        names = [name for name in folders if name not in skipped]
        inputs = [dataset, *(InputDataset(paths[name], n) for n, name in enumerate(names, start=1))]
        before = _size_counts(dataset)
        added = {name: _size_counts(item) for name, item in zip(names, inputs[1:], strict=True)}
        if not names:
            return RewriteResult("merge", dataset.manifest, before, {}, {}, [], skipped, False)
        check_compatible(inputs)
        rename = PromptGroupIds(spilled / "names.sqlite") if config.match == "prompt" else None
        try:
            rewritten = _merged(config, inputs, rename, spilled, workers)
        finally:
            if rename is not None:
                rename.close()
        counts = _counts(rewritten.records)
        if any(item.manifest.incomplete for item in inputs):
            counts["completed_groups"] = sum(
                record.counts.get("completed_groups", 0) for record in rewritten.records
            )
            held = rewritten.incomplete
            counts["incomplete_groups"] = 0 if held is None else held.n_groups
        described = [
            _lineage_input(item, name)
            for item, name in zip(inputs, [config.dataset, *names], strict=True)
        ]
        step = _step("merge", config, described, counts)
        manifest = _publish(inputs, rewritten, step)
    left_out = rewritten.left_out
    return RewriteResult("merge", manifest, before, added, counts, left_out, skipped, True)


@dataclass(frozen=True)
class _Rewritten:
    """What a rewrite wrote: shards with the sidecars of `families`, and incomplete groups."""

    records: Sequence[TaskRecord]
    families: Sequence[Family]
    incomplete: IncompleteGroups | None
    left_out: list[str] = field(default_factory=list)


def _merged(
    config: MergeConfig,
    datasets: Sequence[InputDataset],
    rename: PromptGroupIds | None,
    spilled: Path,
    workers: WorkerSettings,
) -> _Rewritten:
    leave_out = config.incomplete == "drop"
    root, inputs = datasets[0].root, with_incomplete(datasets)
    families, left_out = common_families(datasets, config.incomplete)
    for item in inputs:
        item.join(families)
    joined = find_joins(inputs, rename)
    families, lacking = completable(families, joined, config.incomplete)
    reward, lost = common_reward(families, inputs, leave_out=leave_out)
    left_out += lacking + lost
    for item in inputs:
        item.keep(families)
    partitions = HashPartitions(inputs, rename)
    total = sum(entry.bytes for item in inputs for entry in item.manifest.groups)
    n_parts = max(partitions.n_parts or 1, power_of_two(total, config.shard_bytes))
    log = TaskLog(root, _stage_name("merge", config, inputs, families, n_parts))
    # To find duplicates, all files have to be read.
    keep = n_parts == partitions.n_parts and config.duplicates == "keep"
    keep = keep and not any(map(_lacks_counts, families))
    done = partitions.untouched(log.stage, families) if keep else {}
    rewrite = Rewrite(
        *(root, inputs, families, config, n_parts, config.response_ids, rename, done, reward)
    )
    with undo_on_bad_input(lambda: discard(root, log)):
        records = rewrite.run(log, spilled / "rows", workers)
        files = [entry for record in records for entry in record.files]
        files += write_remaining(root, log, inputs, rename, reward, config.rows_per_row_group)
    return _Rewritten(records, families, incomplete_groups(files, reward), left_out)


def _lacks_counts(family: Family) -> bool:
    """Whether the sidecars of the first dataset do not say how many responses have no number."""
    first = family.members[0]
    return not first.files or (family.partial and family.selects and not first.partial)


def compact(config: CompactConfig, worker_settings: WorkerSettings | None = None) -> RewriteResult:
    """Rewrite a dataset as its next version: few files of similar size, in hash order.

    Training reads the same groups in another order. A dataset that already has this form is not
    changed.

    Args:
        config: the dataset and the form of its files.
        worker_settings: where rows are read and shards are written; default: in this process.

    Raises:
        ConfigError: `shard` is set.
        DataError: another process writes to the dataset, or a group has a single response after
            duplicates are dropped.
        IntegrityError: a file is damaged.
        StorageError: the disk is full; committed shards stay, and the same command continues from
            them.
    """
    workers = _workers(config, worker_settings)
    root = local_folder("dataset", config.dataset)
    with locked_dataset(root) as spilled:
        dataset = InputDataset(root, 0)
        before, manifest = _size_counts(dataset), dataset.manifest
        earlier = _earlier_compaction(dataset, config)
        if earlier is not None:
            counts = earlier.counts
        else:
            manifest, counts = _compacted(config, dataset, spilled, workers)
        freed = remove_old(root, manifest) if config.remove_old else None
    changed = manifest.version != dataset.manifest.version
    return RewriteResult("compact", manifest, before, {}, counts, [], [], changed, freed)


def _earlier_compaction(dataset: InputDataset, config: CompactConfig) -> LineageStep | None:
    """The lineage step of a compaction that wrote these groups with these settings, or None."""
    settings = {"groups_sha256": groups_sha256(dataset.manifest.groups), **_recorded(config)}
    defaults = defaults_of(type(config))  # for settings that were added after a step was recorded
    for step in dataset.manifest.lineage:
        recorded = {**defaults, **step.config}
        if step.stage == "compact" and settings.items() <= recorded.items():
            return step
    return None


def _compacted(
    config: CompactConfig, dataset: InputDataset, spilled: Path, workers: WorkerSettings
) -> tuple[Manifest, dict[str, int]]:
    if not dataset.manifest.groups:  # incomplete groups alone, which stay in their files
        return dataset.manifest, _counts([])
    families, _ = common_families([dataset], "error")
    dataset.join(families)
    old = dataset.manifest.groups
    n_parts = power_of_two(sum(entry.bytes for entry in old), config.shard_bytes)
    log = TaskLog(dataset.root, _stage_name("compact", config, [dataset], families, n_parts))
    with undo_on_bad_input(lambda: discard(dataset.root, log)):
        records = Rewrite(dataset.root, [dataset], families, config, n_parts).run(
            log, spilled / "rows", workers
        )
    counts = _counts(records)
    new = [entry for record in records for entry in record.groups]
    if groups_sha256(new) == groups_sha256(old):
        discard(dataset.root, log)
        return dataset.manifest, counts
    step = _step("compact", config, [], counts)
    step.config["groups_sha256"] = groups_sha256(new)
    # Incomplete groups stay in their files.
    rewritten = _Rewritten(records, families, dataset.manifest.incomplete)
    return _publish([dataset], rewritten, step), counts


def _workers(config: RewriteSettings, given: WorkerSettings | None) -> WorkerSettings:
    """The settings of workers, checked before any work."""
    workers = given or WorkerSettings(show_progress=config.show_progress)
    is_divided(workers)
    return workers


def _recorded(config: RewriteSettings) -> dict[str, Any]:
    """All settings that determine the written files, given the datasets."""
    return {n: v for n, v in dataclasses.asdict(config).items() if n not in _NOT_IN_IDENTITY}


def _stage_name(
    stage: str,
    config: RewriteSettings,
    inputs: Sequence[InputDataset],
    families: Sequence[Family],
    n_parts: int,
) -> str:
    """Name of the commit records' folder, with a hash of everything that determines the files."""
    settings = identity_settings(config)
    for name in (*_NOT_IN_IDENTITY, "shard_bytes"):  # n_parts follows from shard_bytes
        settings.pop(name, None)
    identity = sha256_json(
        {
            "versions": [_REWRITE_VERSION, SCHEMA_VERSION],
            "settings": settings,
            "inputs": [item.content(families) for item in inputs],
            "families": [family.label for family in families],
            "n_parts": n_parts,
        }
    )
    return f"{stage}-{identity[:12]}"


def _merged_before(manifest: Manifest) -> set[str]:
    """The hashes (`groups_sha256`) of the datasets that earlier merges added."""
    return {
        str(described["groups_sha256"])
        for step in manifest.lineage
        if step.stage == "merge"
        for described in step.inputs[1:]
    }


def _lineage_input(item: InputDataset, name: str) -> dict[str, Any]:
    """The lineage entry of a merged dataset: its path, version, counts and own lineage."""
    return {
        "path": name,
        "version": item.manifest.version,
        "groups_sha256": added_sha256(item.manifest),
        **_size_counts(item),
        "lineage": [] if item.number == 0 else [s.model_dump() for s in item.manifest.lineage],
    }


def _size_counts(item: InputDataset) -> dict[str, int]:
    files = item.manifest.groups
    return {
        "groups": sum(entry.rows for entry in files),
        "responses": sum(entry.n_responses for entry in files),
        "tokens": sum(entry.n_tokens for entry in files),
    }


def _counts(records: Sequence[TaskRecord]) -> dict[str, int]:
    files = [entry for record in records for entry in record.groups]
    found: Counter[str] = Counter()
    for record in records:
        found.update(record.counts)
    return {
        "groups": sum(entry.rows for entry in files),
        "responses": sum(entry.n_responses for entry in files),
        "tokens": sum(entry.n_tokens for entry in files),
        **{name: found[name] for name in COUNT_TEXTS},
    }


def _step(
    stage: str, config: RewriteSettings, inputs: list[dict[str, Any]], counts: dict[str, int]
) -> LineageStep:
    settings = public(dataclasses.asdict(config))
    del settings["show_progress"]
    return LineageStep(
        stage=stage, package_version=__version__, config=settings, inputs=inputs, counts=counts
    )


def _publish(inputs: Sequence[InputDataset], rewritten: _Rewritten, step: LineageStep) -> Manifest:
    """Publish the next version: the manifest with the new files and the samplers of all inputs."""
    root, old = inputs[0].root, inputs[0].manifest
    records = rewritten.records
    rewards: list[RewardFamily] = []
    references: list[ReferenceFamily] = []
    for number, family in enumerate(rewritten.families):
        files: list[Sidecar] = [r.sidecars[number] for r in records if r.groups]
        member = family.members[0]
        partial = any(sidecar.missing_responses for sidecar in files)
        update = {"files": files, "partial": family.partial and partial}
        if isinstance(member, RewardFamily):
            rewards.append(member.model_copy(update=update))
        else:
            references.append(member.model_copy(update=update))
    samplers = {name: s for item in inputs for name, s in item.manifest.samplers.items()}

    def build(newest: Manifest | None) -> Manifest:
        if newest is None or newest.version != old.version:
            raise DataError(
                "a dataset gets no other version while its groups are rewritten",
                received=f"version {newest.version if newest else None}, published after version "
                f"{old.version} was read",
                remedy="run the same command again",
                file=root,
            )
        return newest.model_copy(
            update={
                "samplers": dict(sorted(samplers.items())),
                "groups": [entry for record in records for entry in record.groups],
                "rewards": rewards,
                "references": references if any(r.groups for r in records) else [],
                "incomplete": rewritten.incomplete,
                "lineage": [*newest.lineage, step],
            }
        )

    return publish(root, build)
