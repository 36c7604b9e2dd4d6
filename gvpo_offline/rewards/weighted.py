"""The scorers of a reward and the weighted sum of their numbers, for stored and fresh responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gvpo_offline.group import FloatArray
from gvpo_offline.rewards.cases import ScoringInput
from gvpo_offline.rewards.scorer import Scorer
from gvpo_offline.workers.progress import portion


class ScoredGroup(NamedTuple):
    """The numbers of a group's responses.

    Attributes:
        total: (k,) the weighted sum over the scorers that have a number; NaN where none has.
        components: (C, k) each scorer's number, then its extra components; NaN where missing.
    """

    total: FloatArray
    components: FloatArray


class WeightedScorers:
    """Scorers by name, and their weights in the reward.

    Args:
        scorers: by name, in the order of the components.
        weights: of each scorer, by name.
    """

    def __init__(self, scorers: Mapping[str, Scorer], weights: Mapping[str, float]) -> None:
        self.scorers = dict(scorers)
        self._named_weights = dict(weights)
        self._weights_S = np.array([weights[name] for name in scorers])

    @property
    def needs_token_ids(self) -> bool:
        """Whether a scorer reads response_token_ids."""
        return any(scorer.needs_token_ids for scorer in self.scorers.values())

    @property
    def components(self) -> list[str]:
        """Names of the components: each scorer, followed by its extra components."""
        return [
            f"{name}{suffix}"
            for name, scorer in self.scorers.items()
            for suffix in ("", *(f".{extra}" for extra in scorer.extra_components))
        ]

    def identity(self, missing: float | None) -> dict[str, Any]:
        """All that the rewards depend on; errors as `Scorer.identity`.

        Args:
            missing: reward of a response for which no scorer has a number; None: an error.
        """
        return {
            "scorers": {
                name: {**scorer.identity(), "weight": self._named_weights[name]}
                for name, scorer in self.scorers.items()
            },
            "missing": missing,
        }

    def start(self) -> None:
        """Start the scorers."""
        for scorer in self.scorers.values():
            scorer.start()

    def stop(self) -> None:
        """Stop the scorers."""
        for scorer in self.scorers.values():
            scorer.stop()

    def score(self, groups: Sequence[ScoringInput]) -> list[ScoredGroup]:
        """Score groups that belong together: all of a row group, or the answers to some prompts.

        Raises:
            DataError: as `Scorer.score`.
        """
        scored = []
        for scorer in self.scorers.values():
            with portion(len(groups) / len(self.scorers), len(groups)):
                scored.append(scorer.score(groups))
        return [self.weighted(parts) for parts in zip(*scored, strict=True)]

    def weighted(self, parts: Sequence[FloatArray]) -> ScoredGroup:
        """The sum over the scorers, from each scorer's (C, k) numbers."""
        # The first row of each scorer's numbers goes into the reward.
        total_k = weighted_total(self._weights_S, np.stack([part[0] for part in parts]))
        return ScoredGroup(total_k, np.concatenate(parts))


def weighted_total(weights_S: FloatArray, values_Sk: FloatArray) -> FloatArray:
    """The weighted sum over the scorers that have a number: (k,); NaN where none has."""
    total_k: FloatArray = np.nansum(weights_S[:, np.newaxis] * values_Sk, axis=0)
    total_k[np.isnan(values_Sk).all(axis=0)] = np.nan
    return total_k
