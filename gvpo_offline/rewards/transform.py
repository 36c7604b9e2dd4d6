"""Transforms of a reward that the dataset already has, within each group.

A transform changes the optimum of training. GVPO's optimum is pi_ref * exp(R / beta), so another
R is another policy. A constant that is added to all rewards of a group changes nothing; the
differences of the rewards within a group, divided by beta, are what the policy learns.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gvpo_offline.errors import DataError
from gvpo_offline.group import FloatArray
from gvpo_offline.rewards.cases import ScoringInput, ScoringInputReader
from gvpo_offline.rewards.family import FamilyScorer
from gvpo_offline.rewards.kinds import RewardSettings, TransformSettings
from gvpo_offline.rewards.scorer import settings_of
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.values import share_beaten

if TYPE_CHECKING:
    from gvpo_offline.workers.settings import WorkerSettings

_log = logging.getLogger(__name__)


class TransformScorer(FamilyScorer):
    """A transform of one version of a reward, computed within each group.

    Counts: `clipped`, rewards that a bound or `eps` changed; `equal_groups`, groups whose rewards
    are all equal, so that `standardise` gives 0 for each.

    Raises:
        ConfigError: the dataset has no such reward.
    """

    def __init__(self, settings: TransformSettings, dataset: GroupDataset) -> None:
        super().__init__(RewardSettings(kind="reward", reward=settings.of), dataset)
        self._settings = settings

    def identity(self) -> dict[str, Any]:
        """The settings, with the reward's version; the numbers of a version never change."""
        return {**settings_of(self._settings), "of": self._label}

    def prepare(self, reader: ScoringInputReader, worker_settings: WorkerSettings) -> bool:
        """Warns that the transformed reward has another optimum."""
        _log.warning(
            "%s of reward %s: the optimum of GVPO, pi_ref * exp(R / beta), is another one under "
            "the transformed reward R; choose beta for the new differences within a group",
            self._settings.transform,
            self._label,
        )
        return True

    def score(self, groups: Sequence[ScoringInput]) -> list[FloatArray]:
        """(1, k) for each group."""
        rows = super().score(groups)
        return [self._transformed(g, own[0])[None] for g, own in zip(groups, rows, strict=True)]

    def _transformed(self, group: ScoringInput, rewards: FloatArray) -> FloatArray:
        settings = self._settings
        match settings.transform:
            case "rank":
                return share_beaten(-rewards)
            case "logit":
                _check_probabilities(rewards, settings.eps, group, self._label)
                return logit(rewards, settings.eps, self.counts)
            case "standardise":
                return standardised(rewards, self.counts)
            case "clip":
                return clipped(rewards, settings.low, settings.high, self.counts)


def logit(rewards: FloatArray, eps: float, counts: Counter[str]) -> FloatArray:
    """log(p / (1 - p)) of each reward p, as log p - log(1 - p).

    Args:
        rewards: (k,) probabilities; NaN where missing, which stays NaN.
        eps: p is first clipped to [eps, 1 - eps]; 0: p lies between 0 and 1, both excluded.
        counts: `clipped` grows by the number of rewards that eps changed.

    Returns:
        (k,) nats.
    """
    inside = clipped(rewards, eps, 1 - eps, counts) if eps else rewards
    return np.asarray(np.log(inside) - np.log1p(-inside))


def _check_probabilities(rewards: FloatArray, eps: float, group: ScoringInput, label: str) -> None:
    """Raise DataError unless all rewards lie in (0, 1), or with an eps in [0, 1]."""
    outside = (rewards < 0) | (rewards > 1) if eps else (rewards <= 0) | (rewards >= 1)
    if outside.any():
        index = int(np.flatnonzero(outside)[0])
        raise DataError(
            "logit is a transform of probabilities between 0 and 1, "
            + ("both included with eps" if eps else "both excluded"),
            received=f"{rewards[index]} for response {index}, in reward {label}",
            remedy="choose another transform"
            if eps or not 0 <= rewards[index] <= 1
            else "set eps, which clips probabilities to [eps, 1 - eps]",
            **group.location,
        )


def standardised(rewards: FloatArray, counts: Counter[str]) -> FloatArray:
    """(r - mean) / std over the group, std with k - 1.

    All 0 where the rewards are equal: their std is 0, and no response is better than another.

    Args:
        rewards: (k,); NaN where missing, which stays NaN and is left out of mean and std.
        counts: `equal_groups` grows by 1 if the rewards are equal.

    Returns:
        (k,).
    """
    present = ~np.isnan(rewards)
    found = np.full(len(rewards), np.nan)
    values = rewards[present]
    if not len(values):
        return found
    # Not by the std: that of equal numbers is not exactly 0, as their mean is rounded.
    if values.max() == values.min():
        counts["equal_groups"] += 1
        found[present] = 0.0
        return found
    # Scaled, so that no square overflows or vanishes.
    values = values / np.abs(values).max()
    found[present] = (values - values.mean()) / values.std(ddof=1)
    return found


def clipped(
    rewards: FloatArray, low: float | None, high: float | None, counts: Counter[str]
) -> FloatArray:
    """min(max(r, low), high); None: no bound.

    Args:
        rewards: (k,); NaN where missing, which stays NaN.
        low, high: the bounds.
        counts: `clipped` grows by the number of rewards that a bound changed.

    Returns:
        (k,).
    """
    found = np.asarray(np.clip(rewards, low, high))
    counts["clipped"] += int(((found != rewards) & ~np.isnan(rewards)).sum())
    return found
