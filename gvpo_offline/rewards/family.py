"""A reward that the dataset already has, as a component of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gvpo_offline.group import FloatArray
from gvpo_offline.rewards.cases import ScoringInput
from gvpo_offline.rewards.kinds import RewardSettings
from gvpo_offline.rewards.scorer import SimpleScorer
from gvpo_offline.store.arrow import column_array, split_list
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.sidecar_choice import choose_reward_families


class FamilyScorer(SimpleScorer):
    """Returns the numbers of one version of a reward.

    Raises:
        ConfigError: the dataset has no such reward.
    """

    def __init__(self, settings: RewardSettings, dataset: GroupDataset) -> None:
        super().__init__()
        rewards = choose_reward_families(dataset.manifest, settings.reward, file=dataset.root)
        family = rewards[0].family
        self._label = f"{family.name}@{family.version}"
        self._dataset = GroupDataset(dataset.folder.resolve(), dataset.manifest, rewards)

    def identity(self) -> dict[str, Any]:
        """Name and version; the numbers of a version never change."""
        return {"kind": "reward", "reward": self._label}

    def score(self, groups: Sequence[ScoringInput]) -> list[FloatArray]:
        """(1, k) for each group."""
        table = self._dataset.table(groups[0].row_group, ["response_lengths", "rewards"])
        rows = split_list(column_array(table, "rewards"))
        held = dict(zip(table.column("group_id").to_pylist(), rows, strict=True))
        return [np.array(held[own.group_id], np.float64)[np.newaxis] for own in groups]
