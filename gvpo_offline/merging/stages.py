"""The stages `merge` and `compact`: datasets to the next version of a dataset.

Merging writes into the dataset that is added to, not into a new folder: its versions are the same
dataset, shards that nothing joins stay the very files they are, and whoever reads an older version
reads on.
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
    Input,
    check_compatible,
    common_families,
    groups_sha256,
)
from gvpo_offline.merging.layout import Cut
from gvpo_offline.merging.names import PromptNames
from gvpo_offline.merging.rewrite import Rewrite
from gvpo_offline.merging.settings import CompactConfig, MergeConfig, RewriteSettings
from gvpo_offline.merging.work import discard, discarding, remove_old, workplace
from gvpo_offline.store.commit import TaskLog, TaskRecord
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

# Raise it whenever the same datasets and settings would give other bytes than before.
_REWRITE_VERSION = 1
# Settings that decide nothing about what is written, given the datasets.
_UNDECIDING = ("dataset", "add", "show_progress", "remove_old")


@dataclass(frozen=True)
class RewriteResult:
    """What merging or compacting made.

    Attributes:
        stage: merge or compact.
        manifest: the newest version of the dataset.
        before: groups, responses and tokens of the dataset as it was.
        added: groups, responses and tokens of what was added, by folder.
        counts: groups, responses and tokens now; and what was joined, found and dropped.
        left_out: rewards and references that not every dataset has.
        skipped: folders whose groups an earlier merge had added already.
        changed: whether there is a new version.
        freed: bytes that removing older versions freed.
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
        """The result for people, one fact a line."""
        head = f"done, version {self.manifest.version}" if self.changed else "nothing to do"
        lines = [f"{self.stage}: {head}", f"  before: {_sizes(self.before)}"]
        lines += [f"  added: {_sizes(sizes)} from {name}" for name, sizes in self.added.items()]
        if self.changed:
            lines.append(f"  now: {_sizes(self.counts)} in {len(self.manifest.groups)} files")
        lines += [f"  {name} had been merged before" for name in self.skipped]
        lines += [
            f"  {label} was left out: not every dataset has it"
            for label in dict.fromkeys(self.left_out)
        ]
        for name, text in _SAID.items():
            if self.counts.get(name):
                lines.append(f"  {self.counts[name]:,} {text}")
        if self.freed is not None:
            lines.append(f"  older versions were removed: {self.freed:,} bytes")
        return lines


_SIZES = ("groups", "responses", "tokens")
_SAID = {
    "joined_groups": "groups were joined from several",
    "duplicates": "responses have the token ids of an earlier one of their group",
    "differing_rewards": "of these have another reward than that one",
    "dropped_duplicates": "duplicates were dropped (duplicates: drop)",
    "dropped_singletons": "groups were dropped that had a single response left (singletons: drop)",
    "dropped_responses": "groups lost their responses' texts, which some responses do not have",
    "dropped_response_ids": "groups lost their response ids, which some responses do not have or "
    "two have (response_ids: drop)",
}


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{sizes[name]:,} {name}" for name in _SIZES)


def merge(config: MergeConfig) -> RewriteResult:
    """Add the groups of other datasets to a dataset, as its next version.

    A dataset whose very groups an earlier merge added is passed over, so that the same command
    repeated changes nothing.

    Raises:
        DataError: the datasets do not go together, rows of one group neither, or another process
            rewrites the dataset. Nothing is published then, and nothing is left behind.
        IntegrityError: the tokenizers differ, or a file is damaged.
        StorageError: no room; committed shards are kept, and the same command goes on from there.
    """
    root = local_folder("dataset", config.dataset)
    with workplace(root) as spilled:
        dataset = Input(root, 0)
        folders = [config.add] if isinstance(config.add, str) else config.add
        paths = {name: local_folder("add", name) for name in folders}
        merged = _merged_before(dataset.manifest)
        found = {name: groups_sha256(load_manifest(path).groups) for name, path in paths.items()}
        skipped = [name for name in folders if found[name] in merged]
        names = [name for name in folders if name not in skipped]
        inputs = [dataset, *(Input(paths[name], n) for n, name in enumerate(names, start=1))]
        before = _counted(dataset)
        added = {name: _counted(item) for name, item in zip(names, inputs[1:], strict=True)}
        if not names:
            return RewriteResult("merge", dataset.manifest, before, {}, {}, [], skipped, False)
        check_compatible(inputs)
        families, left_out = common_families(inputs, leave_out=config.incomplete == "drop")
        for item in inputs:
            item.join(families)
        rename = PromptNames(spilled / "names.sqlite") if config.match == "prompt" else None
        try:
            records = _merged(config, inputs, families, rename, spilled)
        finally:
            if rename is not None:
                rename.close()
        counts = _counts(records)
        described = [
            _described(item, name)
            for item, name in zip(inputs, [config.dataset, *names], strict=True)
        ]
        step = _step("merge", config, described, counts)
        manifest = _publish(inputs, families, records, step)
    return RewriteResult("merge", manifest, before, added, counts, left_out, skipped, True)


def _merged(
    config: MergeConfig,
    inputs: Sequence[Input],
    families: Sequence[Family],
    rename: PromptNames | None,
    spilled: Path,
) -> list[TaskRecord]:
    root = inputs[0].root
    cut = Cut(inputs, rename)
    total = sum(entry.bytes for item in inputs for entry in item.manifest.groups)
    n_parts = max(cut.n_parts or 1, power_of_two(total, config.shard_bytes))
    log = TaskLog(root, _stage_name("merge", config, inputs, families, n_parts))
    # Whoever wants duplicates found wants them found everywhere.
    keep = n_parts == cut.n_parts and config.duplicates == "keep"
    done = cut.untouched(log.stage, families) if keep else {}
    rewrite = Rewrite(root, inputs, families, config, n_parts, config.response_ids, rename, done)
    with discarding(root, log):
        return rewrite.run(log, spilled / "rows")


def compact(config: CompactConfig) -> RewriteResult:
    """Write a dataset's files anew, as its next version: few, of one size, in hash order.

    Training sees the same groups in another order. A dataset that has that form already is left as
    it is.

    Raises:
        DataError: another process rewrites the dataset, or dropped duplicates leave a group with a
            single response.
        IntegrityError: a file is damaged.
        StorageError: no room; committed shards are kept, and the same command goes on from there.
    """
    root = local_folder("dataset", config.dataset)
    with workplace(root) as spilled:
        dataset = Input(root, 0)
        before, manifest = _counted(dataset), dataset.manifest
        earlier = _earlier(dataset, config)
        if earlier is not None:
            counts = earlier.counts
        else:
            manifest, counts = _compacted(config, dataset, spilled)
        freed = remove_old(root, manifest) if config.remove_old else None
    changed = manifest.version != dataset.manifest.version
    return RewriteResult("compact", manifest, before, {}, counts, [], [], changed, freed)


def _earlier(dataset: Input, config: CompactConfig) -> LineageStep | None:
    """The compaction with these settings that made the dataset's very groups, if one did."""
    settings = {"groups_sha256": groups_sha256(dataset.manifest.groups), **_recorded(config)}
    defaults = defaults_of(type(config))  # of settings that are younger than a step
    for step in dataset.manifest.lineage:
        recorded = {**defaults, **step.config}
        if step.stage == "compact" and settings.items() <= recorded.items():
            return step
    return None


def _compacted(
    config: CompactConfig, dataset: Input, spilled: Path
) -> tuple[Manifest, dict[str, int]]:
    families, _ = common_families([dataset], leave_out=False)
    dataset.join(families)
    old = dataset.manifest.groups
    n_parts = power_of_two(sum(entry.bytes for entry in old), config.shard_bytes)
    log = TaskLog(dataset.root, _stage_name("compact", config, [dataset], families, n_parts))
    with discarding(dataset.root, log):
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
    """The settings that decide what is written, given the datasets; all of them."""
    return {n: v for n, v in dataclasses.asdict(config).items() if n not in _UNDECIDING}


def _stage_name(
    stage: str,
    config: RewriteSettings,
    inputs: Sequence[Input],
    families: Sequence[Family],
    n_parts: int,
) -> str:
    """The folder of the commit records: it holds a hash of all that the files depend on."""
    settings = identity_settings(config)
    for name in (*_UNDECIDING, "shard_bytes"):  # n_parts says it
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
    """The groups that merges added to a dataset, by the hash of their files."""
    return {
        str(described["groups_sha256"])
        for step in manifest.lineage
        if step.stage == "merge"
        for described in step.inputs[1:]
    }


def _described(item: Input, name: str) -> dict[str, Any]:
    """What the lineage says about a dataset that was merged: where its groups came from."""
    return {
        "path": name,
        "version": item.manifest.version,
        "groups_sha256": groups_sha256(item.manifest.groups),
        **_counted(item),
        "lineage": [] if item.number == 0 else [s.model_dump() for s in item.manifest.lineage],
    }


def _counted(item: Input) -> dict[str, int]:
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
        **{name: found[name] for name in _SAID},
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
    inputs: Sequence[Input],
    families: Sequence[Family],
    records: Sequence[TaskRecord],
    step: LineageStep,
) -> Manifest:
    """The next version: the dataset's own, with the new files and all samplers."""
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
                received=f"version {newest.version if newest else None} beside {old.version}",
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
