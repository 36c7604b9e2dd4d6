"""A dataset, opened for a report: one reward and one reference, where there are any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gvpo_offline.errors import DataError
from gvpo_offline.info.dataset import reward_label
from gvpo_offline.report.settings import ReportSettings
from gvpo_offline.store.adopt import adopt_parquet
from gvpo_offline.store.coverage import coverage_of
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.location import RemoteSettings, is_url, local_path
from gvpo_offline.store.manifest import Manifest, ReferenceFamily
from gvpo_offline.store.sidecar_choice import (
    RewardChoice,
    WeightedReward,
    choose_reference_family,
    choose_reward_families,
)


@dataclass(frozen=True)
class Opened:
    """A dataset as a report reads it.

    Attributes:
        dataset: with the reward and the reference that are described, if there are any.
        is_file: whether it is a Parquet file of another program.
        reward: the label of the reward, with weights if it is a sum; "" for none.
        components: names of the reward's components.
        other_rewards: labels of the rewards that are not described.
        other_references: fingerprints of the references that are not described.
    """

    dataset: GroupDataset
    is_file: bool = False
    reward: str = ""
    components: Sequence[str] = ()
    other_rewards: Sequence[str] = ()
    other_references: Sequence[str] = ()


def open_plain(
    path: str, *, version: int | None = None, remote: RemoteSettings | None = None
) -> tuple[GroupDataset, bool]:
    """A dataset without rewards and references, and whether it is a Parquet file.

    Raises:
        DataError, ConfigError, IntegrityError, StorageError: as `open_dataset`.
    """
    if not is_url(path) and local_path(path).is_file():
        return adopt_parquet([local_path(path)], checked=False), True
    return open_dataset(path, version=version, join=(), remote=remote), False


def open_for_report(settings: ReportSettings) -> Opened:
    """Open the dataset of the settings.

    Raises:
        DataError, ConfigError, IntegrityError, StorageError: as `open_dataset`, but that a dataset
            may lack rewards, references and groups, and may have several of them.
    """
    plain, is_file = open_plain(
        settings.dataset, version=settings.dataset_version, remote=settings.remote
    )
    manifest = plain.manifest
    file = plain.root
    rewards: list[WeightedReward] = []
    if manifest.rewards or settings.reward is not None:
        whole = [family for family in manifest.rewards if not family.partial]
        newest: RewardChoice = reward_label(whole[-1]) if whole else None
        if whole or settings.reward is not None:
            rewards = choose_reward_families(manifest, settings.reward or newest, file=file)
        _refuse_partial(rewards, manifest, file)
    reference: ReferenceFamily | None = None
    if settings.reference is not None:
        reference = choose_reference_family(manifest, settings.reference, file=file)
    elif manifest.references:
        reference = manifest.references[-1]
    described = {reward_label(each.family) for each in rewards}
    own = None if reference is None else reference.fingerprint
    return Opened(
        GroupDataset(plain.storage, manifest, rewards, reference),
        is_file,
        " + ".join(map(_weighted_label, rewards)),
        tuple(rewards[0].family.components) if len(rewards) == 1 else (),
        tuple(reward_label(f) for f in manifest.rewards if reward_label(f) not in described),
        tuple(f.fingerprint for f in manifest.references if f.fingerprint != own),
    )


def _refuse_partial(rewards: Sequence[WeightedReward], manifest: Manifest, file: Any) -> None:
    """Raise DataError if a reward that is named lacks numbers; else the newest whole one is taken.

    What the others cover stands among the rewards of the dataset.
    """
    for reward in rewards:
        own = coverage_of(reward.family, manifest)
        if own is not None:
            raise DataError(
                "a report describes a reward that every response has",
                received=f"{reward_label(reward.family)}, which covers {own.text}",
                remedy="score what is new with `gvpo-offline reward --only_missing true`, or leave "
                "`reward` out",
                file=file,
            )


def _weighted_label(reward: WeightedReward) -> str:
    label = reward_label(reward.family)
    return label if reward.weight == 1 else f"{reward.weight:g} * {label}"
