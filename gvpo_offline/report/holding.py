"""What a dataset holds, as its manifests say: nothing else is read, however large it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gvpo_offline.store.location import is_url, local_path
from gvpo_offline.store.manifest import (
    FileEntry,
    LineageStep,
    Manifest,
    ReferenceFamily,
    RewardFamily,
    TokenizerInfo,
    load_manifest,
    manifest_path,
    manifest_versions,
)
from gvpo_offline.store.storage import open_storage


@dataclass(frozen=True)
class Files:
    """How many files, and their length in bytes."""

    files: int
    bytes: int


@dataclass(frozen=True)
class HeldReward:
    """A reward.

    Attributes:
        label: name@version.
        components: names of the parts that are kept beside it.
        config: what made it; empty where it came with the log.
    """

    label: str
    components: list[str]
    config: dict[str, Any]
    size: Files


@dataclass(frozen=True)
class HeldReference:
    """A reference; the fields are those of the manifest.

    Attributes:
        tokenizer: whose tokens the model reads: "the dataset's", "another", or "not said".
    """

    fingerprint: str
    model_name_or_path: str
    model_class: str
    dtype: str
    autocast_dtype: str | None
    attn_implementation: str
    layout: str
    tokenizer: str
    size: Files


@dataclass(frozen=True)
class Held:
    """What one manifest says that a dataset holds.

    Attributes:
        version: its number.
        groups, responses, tokens: how many; tokens count each prompt once.
        base, total: files of groups, and all files.
        samplers: settings by name.
        lineage: the commands that made it, oldest first.
    """

    version: int
    groups: int
    responses: int
    tokens: int
    base: Files
    total: Files
    tokenizer: TokenizerInfo | None
    samplers: dict[str, dict[str, Any]]
    rewards: list[HeldReward]
    references: list[HeldReference]
    lineage: list[LineageStep]


@dataclass(frozen=True)
class HeldVersion:
    """A version, against the one before it.

    Attributes:
        written: when its manifest was written here, ISO 8601, UTC; "" at a URL.
        added, removed: labels of what it brought and of what it left out.
        new: files that the version before did not name.
    """

    version: int
    written: str
    groups: int
    added: list[str]
    removed: list[str]
    new: Files


@dataclass(frozen=True)
class Holding:
    """A dataset in a folder, or at a URL.

    Attributes:
        path: the folder, or the URL.
        written: when its manifest was written there, ISO 8601, UTC; "" at a URL.
        held: what it holds.
        versions: this version and older ones, oldest first; at a URL this one alone.
    """

    path: str
    written: str
    held: Held
    versions: list[HeldVersion]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        plain = asdict(self)
        tokenizer = self.held.tokenizer
        return {
            "path": self.path,
            "written": self.written,
            **plain["held"],
            "tokenizer": None if tokenizer is None else tokenizer.model_dump(),
            "lineage": [step.model_dump(mode="json") for step in self.held.lineage],
            "versions": plain["versions"],
        }


def holding(path: str | Path, version: int | None = None) -> Holding:
    """What a dataset holds.

    Args:
        path: its folder, or its URL.
        version: an older version; by default the newest.

    Raises:
        DataError: there is no dataset, or no such version.
        IntegrityError: a manifest was altered.
    """
    if is_url(path):
        manifest = open_storage(path).manifest(version)
        return Holding(str(path), "", held_by(manifest), [_version(None, manifest)])
    root = local_path(path)
    manifest = load_manifest(root, version)
    return Holding(
        path=str(root),
        written=_written(root, manifest.version),
        held=held_by(manifest),
        versions=_versions(root, manifest),
    )


def held_by(manifest: Manifest) -> Held:
    """What a manifest says."""
    return Held(
        version=manifest.version,
        groups=manifest.n_groups,
        responses=sum(file.n_responses for file in manifest.groups),
        tokens=sum(file.n_tokens for file in manifest.groups),
        base=_files(manifest.groups),
        total=_files(manifest.files()),
        tokenizer=manifest.tokenizer,
        samplers=manifest.samplers,
        rewards=[_reward(family) for family in manifest.rewards],
        references=[_reference(family, manifest) for family in manifest.references],
        lineage=manifest.lineage,
    )


def _files(entries: Iterable[FileEntry]) -> Files:
    sizes = [entry.bytes for entry in entries]
    return Files(len(sizes), sum(sizes))


def reward_label(family: RewardFamily) -> str:
    """name@version."""
    return f"{family.name}@{family.version}"


def _reward(family: RewardFamily) -> HeldReward:
    return HeldReward(
        label=reward_label(family),
        components=family.components,
        config=family.config,
        size=_files(sidecar.file for sidecar in family.files),
    )


def _reference(family: ReferenceFamily, manifest: Manifest) -> HeldReference:
    own = manifest.tokenizer and manifest.tokenizer.fingerprint
    other = family.tokenizer_fingerprint
    said = "not said" if None in (own, other) else "the dataset's" if own == other else "another"
    return HeldReference(
        fingerprint=family.fingerprint,
        model_name_or_path=family.model_name_or_path,
        model_class=family.model_class,
        dtype=family.dtype,
        autocast_dtype=family.autocast_dtype,
        attn_implementation=family.attn_implementation,
        layout=family.layout,
        tokenizer=said,
        size=_files(sidecar.file for sidecar in family.files),
    )


def _versions(root: Path, newest: Manifest) -> list[HeldVersion]:
    older = [version for version in manifest_versions(root) if version < newest.version]
    manifests = [*(load_manifest(root, version) for version in older), newest]
    befores = [None, *manifests]
    found = [_version(*pair) for pair in zip(befores, manifests, strict=False)]
    return [replace(each, written=_written(root, each.version)) for each in found]


def _version(before: Manifest | None, manifest: Manifest) -> HeldVersion:
    old = _parts(before) if before else {}
    parts = _parts(manifest)
    known = {entry.path for entry in before.files()} if before else set()
    # A part whose files are others was written anew, as merging and compacting do.
    return HeldVersion(
        version=manifest.version,
        written="",
        groups=manifest.n_groups,
        added=[label for label, paths in parts.items() if old.get(label) != paths],
        removed=[label for label in old if label not in parts],
        new=_files(entry for entry in manifest.files() if entry.path not in known),
    )


def _parts(manifest: Manifest) -> dict[str, Sequence[str]]:
    """The paths of each part of a dataset, by its label."""
    return {
        "groups": [entry.path for entry in manifest.groups],
        **{f"reward {reward_label(f)}": [s.file.path for s in f.files] for f in manifest.rewards},
        **{
            f"reference {f.fingerprint[:12]}": [s.file.path for s in f.files]
            for f in manifest.references
        },
    }


def _written(root: Path, version: int) -> str:
    seconds = manifest_path(root, version).stat().st_mtime
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
