"""Selects the reward and reference sidecars of a dataset by name, version or fingerprint; checks
that it has groups at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.store.manifest import Manifest, ReferenceFamily, RewardFamily

RewardChoice = str | Mapping[str, float] | None


@dataclass(frozen=True)
class WeightedReward:
    """A reward family and its weight in `Group.rewards`."""

    family: RewardFamily
    weight: float = 1.0


def choose_reward_families(
    manifest: Manifest, choice: RewardChoice, *, file: Any = None
) -> list[WeightedReward]:
    """The reward families of a choice, each in its newest version unless a version is named.

    Args:
        manifest: of the dataset.
        choice: `name` or `name@version`; a mapping of several to their weights; None: the only one.
        file: the path or URL for errors.

    Raises:
        ConfigError: there is no such reward, there are several and none is named, one is named
            twice, a weight is not finite, or all weights are 0.
    """
    if not isinstance(choice, Mapping):
        return [WeightedReward(_family(manifest, choice, file))]
    weights = list(choice.values())
    if not all(map(math.isfinite, weights)) or not any(weights):
        raise ConfigError(
            "the weights of rewards are finite, and not all of them are 0",
            received=dict(choice),
            remedy="set reward to one name, or to {name: weight}",
            file=file,
        )
    found = [WeightedReward(_family(manifest, name, file), w) for name, w in choice.items()]
    labels = [f"{reward.family.name}@{reward.family.version}" for reward in found]
    if len(set(labels)) < len(labels):
        raise ConfigError(
            "each reward is named once in a combination",
            received=f"{dict(choice)}, which are {', '.join(labels)}",
            remedy="name each reward once",
            file=file,
        )
    return found


def _family(manifest: Manifest, name: str | None, file: Any) -> RewardFamily:
    named = {f"{family.name}@{family.version}": family for family in manifest.rewards}
    matching = [f for key, f in named.items() if name in (None, f.name, key)]
    if not matching and name is not None:
        raise ConfigError(
            "a reward is one of the dataset's, by its name or as name@version",
            received=f"{name!r}, and the dataset holds {sorted(named) or 'none'}",
            remedy="name one of them, or compute it with `gvpo-offline reward`",
            file=file,
        )
    if not matching or (name is None and len({f.name for f in matching}) > 1):
        raise ConfigError(
            "training needs one reward of the dataset",
            received=f"reward={name!r}, and the dataset holds {sorted(named) or 'none'}",
            remedy="set `reward` to one of them, or import a log that has a reward column",
            file=file,
        )
    return max(matching, key=lambda family: family.version)


def choose_reference_family(
    manifest: Manifest, fingerprint: str | None, *, file: Any = None
) -> ReferenceFamily:
    """The reference whose fingerprint starts with `fingerprint`; by default the only one."""
    prefix = fingerprint or ""
    matching = [f for f in manifest.references if f.fingerprint.startswith(prefix)]
    if len(matching) != 1:
        held = [f"{f.fingerprint[:12]} ({f.described})" for f in manifest.references]
        raise ConfigError(
            "training needs the log-probs of one reference",
            received=f"reference={fingerprint!r}, and the dataset holds {held or 'none'}",
            remedy="run `gvpo-offline reference` on the dataset"
            if not held
            else "set `reference` to the first digits of one fingerprint",
            file=file,
        )
    return matching[0]


def check_has_groups(manifest: Manifest, file: Any) -> None:
    """Raise DataError if a dataset holds incomplete groups alone: there is nothing to train on."""
    if manifest.n_groups or not manifest.n_incomplete:
        return
    raise DataError(
        "scoring and training need groups of at least 2 responses",
        received=f"{manifest.n_incomplete} incomplete groups, each a prompt with 1 response, and "
        "no other group",
        remedy="add responses for these prompts: import another log of them, or sample some "
        "(`gvpo-offline sample` with this dataset as `inputs`), then `gvpo-offline merge` both "
        "datasets",
        file=file,
    )
