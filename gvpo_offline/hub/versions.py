"""Order of a dataset's versions, and partial copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gvpo_offline.errors import DataError
from gvpo_offline.hub.settings import PullConfig
from gvpo_offline.store.manifest import LineageStep, Manifest
from gvpo_offline.store.sidecar_choice import choose_reference_family, choose_reward_families
from gvpo_offline.version import __version__

PULL = "pull"


def continues(newer: Manifest, older: Manifest) -> bool:
    """Whether `newer` is a later version of the same dataset as `older`.

    It is if its number is higher and its lineage begins with that of `older`; the steps that mark
    partial copies are ignored.
    """
    before, after = _own_steps(older), _own_steps(newer)
    return newer.version > older.version and after[: len(before)] == before


def _own_steps(manifest: Manifest) -> list[LineageStep]:
    return [step for step in manifest.lineage if step.stage != PULL]


def is_partial(manifest: Manifest) -> bool:
    """Whether the dataset is a partial copy: pulled without some rewards or references."""
    return len(_own_steps(manifest)) < len(manifest.lineage)


def without_parts(manifest: Manifest, config: PullConfig, commit: str) -> Manifest:
    """The manifest with only the rewards and references that `config` selects.

    A step of its lineage marks it as a partial copy. If `config` selects everything, the manifest
    is returned as it is.

    Raises:
        ConfigError: a reward or reference does not exist, or is ambiguous.
    """
    place = f"datasets/{config.repo_id}"
    rewards, references = manifest.rewards, manifest.references
    if config.rewards is not None:
        named = [
            choose_reward_families(manifest, name, file=place)[0].family for name in config.rewards
        ]
        rewards = [family for family in rewards if family in named]
    if config.references is not None:
        found = [choose_reference_family(manifest, each, file=place) for each in config.references]
        references = [family for family in references if family in found]
    if rewards == manifest.rewards and references == manifest.references:
        return manifest
    kept: dict[str, Any] = {
        "rewards": [f"{family.name}@{family.version}" for family in rewards],
        "references": [family.fingerprint for family in references],
    }
    step = LineageStep(
        stage=PULL,
        package_version=__version__,
        config={"repo_id": config.repo_id, "commit": commit, **kept},
    )
    lineage = [*manifest.lineage, step]
    return manifest.model_copy(
        update={"rewards": rewards, "references": references, "lineage": lineage}
    )


def check_continues(newer: Manifest, held: Manifest, place: Any, remedy: str) -> None:
    """Raise DataError unless `newer` is a later version of `held`, which lies at `place`."""
    if continues(newer, held):
        return
    theirs = ", ".join(step.stage for step in held.lineage) or "nothing"
    raise DataError(
        f"version {newer.version} of a dataset continues the version that is there already",
        received=f"version {held.version} there, "
        + ("which is as new or newer" if held.version >= newer.version else f"made by {theirs}"),
        remedy=remedy,
        file=place,
    )


def choose_version(versions: Sequence[int], wanted: int | None, place: Any) -> int:
    """The version `wanted`, by default the newest.

    Raises:
        DataError: it does not exist.
    """
    if not versions or (wanted is not None and wanted not in versions):
        raise DataError(
            "the repository holds a dataset of this package, with a manifest"
            + ("" if wanted is None else f" of version {wanted}"),
            received=f"versions {list(versions)}" if versions else "no manifest",
            remedy="correct repo_id or revision, or make a dataset of its files with "
            "`gvpo-offline import`",
            file=place,
        )
    return versions[-1] if wanted is None else wanted
