"""The stages `merge` and `compact`, which write the next version of a dataset.

Merging writes a new version of the first dataset, not a new folder. Shards without new groups stay
the same files, and programs that read an older version are not affected.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gvpo_offline.errors import DataError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.identity import defaults_of, identity_settings
from gvpo_offline.merging.inputs import (
    Family,
    InputDataset,
    check_compatible,
    common_families,
    groups_sha256,
)
from gvpo_offline.merging.layout import HashPartitions
from gvpo_offline.merging.names import PromptGroupIds
from gvpo_offline.merging.rewrite import Rewrite
from gvpo_offline.merging.settings import CompactConfig, MergeConfig, RewriteSettings
from gvpo_offline.merging.work import discard, locked_dataset, remove_old
from gvpo_offline.store.commit import TaskLog, TaskRecord, undo_on_bad_input
from gvpo_offline.store.location import local_folder
from gvpo_offline.store.manifest import (
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

# Increment it with every change by which the same datasets and settings give other bytes.
_REWRITE_VERSION = 1
# Settings that do not change the written files, given the datasets.
_NOT_IN_IDENTITY = ("dataset", "add", "show_progress", "remove_old")


@dataclass(frozen=True)
class RewriteResult:
    """The result of `merge` or `compact`.

    Attributes:
        stage: "merge" or "compact".
        manifest: the newest version of the dataset.
        before: numbers of groups, responses and tokens of the dataset before the stage.
        added: numbers of groups, responses and tokens of the added datasets, by folder.
        counts: numbers of groups, responses and tokens of the new version, and of joined groups,
            duplicates and dropped responses and groups.
        left_out: labels of rewards and references that only some of the datasets have.
        skipped: folders whose groups an earlier merge already added.
        changed: whether a new version was published.
        freed: bytes freed by removing older versions; None if none were removed.
    """

    stage: str
    manifest: Manifest
    before: dict[str, int]
    added: dict[str, dict[str, int]]
    counts: dict[str, int]
    left_out: list[str]
    skipped: list[str]
    changed: bool
    freed: int | None = None

    def lines(self) -> list[str]:
        """The lines that the command prints."""
        head = f"done, version {self.manifest.version}" if self.changed else "nothing to do"
        lines = [f"{self.stage}: {head}", f"  before: {_sizes(self.before)}"]
        lines += [f"  added: {_sizes(sizes)} from {name}" for name, sizes in self.added.items()]
        if self.changed:
            lines.append(f"  now: {_sizes(self.counts)} in {len(self.manifest.groups)} files")
        lines += [
            f"  {name} was skipped: an earlier merge already added it" for name in self.skipped
        ]
        lines += [
            f"  {label} was left out: not every dataset has it"
            for label in dict.fromkeys(self.left_out)
        ]
        for name, text in _COUNT_TEXTS.items():
            if self.counts.get(name):
                lines.append(f"  {self.counts[name]:,} {text}")
        if self.freed is not None:
            lines.append(f"  older versions were removed: {self.freed:,} bytes")
        return lines


_SIZES = ("groups", "responses", "tokens")
_COUNT_TEXTS = {
    "joined_groups": "groups were joined from several rows",
    "duplicates": "responses have the token ids of an earlier response of their group",
    "differing_rewards": "of these have another reward than that response",
    "dropped_duplicates": "duplicates were dropped (duplicates: drop)",
    "dropped_singletons": "groups with a single response left were dropped (singletons: drop)",
    "dropped_responses": "groups lost their responses' texts: some of the responses have none",
    "dropped_response_ids": "groups lost their response ids: some of the responses have none, or "
    "two have the same (response_ids: drop)",
}


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{sizes[name]:,} {name}" for name in _SIZES)


def merge(config: MergeConfig) -> RewriteResult:
    """Add the groups of other datasets to a dataset, as its next version.

    A dataset whose groups files an earlier merge already added is skipped, so that repeating the
    command changes nothing.

    Raises:
        DataError: the datasets or the rows of a group cannot be merged, or another process writes
            to the dataset. Nothing is published, and the files of this merge are removed.
        IntegrityError: the tokenizers differ, or a file is damaged.
        StorageError: the disk is full; committed shards stay, and the same command continues from
            them.
    """
    root = local_folder("dataset", config.dataset)
    with locked_dataset(root) as spilled:
        dataset = InputDataset(root, 0)
        folders = [config.add] if isinstance(config.add, str) else config.add
        paths = {name: local_folder("add", name) for name in folders}
        merged = _merged_before(dataset.manifest)
        found = {name: groups_sha256(load_manifest(path).groups) for name, path in paths.items()}
        skipped = [name for name in folders if found[name] in merged]
        names = [name for name in folders if name not in skipped]
        inputs = [dataset, *(InputDataset(paths[name], n) for n, name in enumerate(names, start=1))]
        before = _size_counts(dataset)
        added = {name: _size_counts(item) for name, item in zip(names, inputs[1:], strict=True)}
        if not names:
            return RewriteResult("merge", dataset.manifest, before, {}, {}, [], skipped, False)
        check_compatible(inputs)
        families, left_out = common_families(inputs, leave_out=config.incomplete == "drop")
        for item in inputs:
            item.join(families)
        rename = PromptGroupIds(spilled / "names.sqlite") if config.match == "prompt" else None
        try:
            records = _merged(config, inputs, families, rename, spilled)
        finally:
            if rename is not None:
                rename.close()
        counts = _counts(records)
        described = [
            _lineage_input(item, name)
            for item, name in zip(inputs, [config.dataset, *names], strict=True)
        ]
        step = _step("merge", config, described, counts)
        manifest = _publish(inputs, families, records, step)
    return RewriteResult("merge", manifest, before, added, counts, left_out, skipped, True)


def _merged(
    config: MergeConfig,
    inputs: Sequence[InputDataset],
    families: Sequence[Family],
    rename: PromptGroupIds | None,
    spilled: Path,
) -> list[TaskRecord]:
    root = inputs[0].root
    partitions = HashPartitions(inputs, rename)
    total = sum(entry.bytes for item in inputs for entry in item.manifest.groups)
    n_parts = max(partitions.n_parts or 1, power_of_two(total, config.shard_bytes))
    log = TaskLog(root, _stage_name("merge", config, inputs, families, n_parts))
    # To find duplicates, all files have to be read.
    keep = n_parts == partitions.n_parts and config.duplicates == "keep"
    done = partitions.untouched(log.stage, families) if keep else {}
    rewrite = Rewrite(root, inputs, families, config, n_parts, config.response_ids, rename, done)
    with undo_on_bad_input(lambda: discard(root, log)):
        return rewrite.run(log, spilled / "rows")


def compact(config: CompactConfig) -> RewriteResult:
    """Rewrite a dataset as its next version: few files of similar size, in hash order.

    Training reads the same groups in another order. A dataset that already has this form is not
    changed.

    Raises:
        DataError: another process writes to the dataset, or a group has a single response after
            duplicates are dropped.
        IntegrityError: a file is damaged.
        StorageError: the disk is full; committed shards stay, and the same command continues from
            them.
    """
    root = local_folder("dataset", config.dataset)
    with locked_dataset(root) as spilled:
        dataset = InputDataset(root, 0)
        before, manifest = _size_counts(dataset), dataset.manifest
        earlier = _earlier_compaction(dataset, config)
        if earlier is not None:
            counts = earlier.counts
        else:
            manifest, counts = _compacted(config, dataset, spilled)
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
    config: CompactConfig, dataset: InputDataset, spilled: Path
) -> tuple[Manifest, dict[str, int]]:
    families, _ = common_families([dataset], leave_out=False)
    dataset.join(families)
    old = dataset.manifest.groups
    n_parts = power_of_two(sum(entry.bytes for entry in old), config.shard_bytes)
    log = TaskLog(dataset.root, _stage_name("compact", config, [dataset], families, n_parts))
    with undo_on_bad_input(lambda: discard(dataset.root, log)):
        records = Rewrite(dataset.root, [dataset], families, config, n_parts).run(
            log, spilled / "rows"
        )
    counts = _counts(records)
    new = [entry for record in records for entry in record.groups]
    if groups_sha256(new) == groups_sha256(old):
        discard(dataset.root, log)
        return dataset.manifest, counts
    step = _step("compact", config, [], counts)
    step.config["groups_sha256"] = groups_sha256(new)
    return _publish([dataset], families, records, step), counts


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
        "groups_sha256": groups_sha256(item.manifest.groups),
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
        **{name: found[name] for name in _COUNT_TEXTS},
    }


def _step(
    stage: str, config: RewriteSettings, inputs: list[dict[str, Any]], counts: dict[str, int]
) -> LineageStep:
    settings = dataclasses.asdict(config)
    del settings["show_progress"]
    return LineageStep(
        stage=stage, package_version=__version__, config=settings, inputs=inputs, counts=counts
    )


def _publish(
    inputs: Sequence[InputDataset],
    families: Sequence[Family],
    records: Sequence[TaskRecord],
    step: LineageStep,
) -> Manifest:
    """Publish the next version: the manifest with the new files and the samplers of all inputs."""
    root, old = inputs[0].root, inputs[0].manifest
    rewards: list[RewardFamily] = []
    references: list[ReferenceFamily] = []
    for number, family in enumerate(families):
        files: list[Sidecar] = [r.sidecars[number] for r in records if r.groups]
        member = family.members[0]
        if isinstance(member, RewardFamily):
            rewards.append(member.model_copy(update={"files": files}))
        else:
            references.append(member.model_copy(update={"files": files}))
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
                "references": references,
                "lineage": [*newest.lineage, step],
            }
        )

    return publish(root, build)
