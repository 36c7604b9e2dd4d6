"""Rewards that are weighted sums of parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gvpo_offline.errors import ConfigError
from gvpo_offline.importing.settings import ImportConfig

Parts = Mapping[str, Sequence[float | None]]
"""The parts of n rewards: n numbers per part name, None where a response lacks the part."""


def part_weights(config: ImportConfig, default: Mapping[str, float]) -> Mapping[str, float]:
    """The weights of a reward's parts: `reward_weights` if set, else `default`.

    Args:
        config: the import's settings.
        default: the default weight of every part that the format has; empty if it has no parts.

    Raises:
        ConfigError: `reward_weights` names a part that the format does not have.
    """
    unknown = sorted(set(config.reward_weights) - set(default))
    if unknown:
        raise ConfigError(
            f"each name in reward_weights is a part of the reward of format: {config.format}",
            received=", ".join(unknown),
            remedy=f"choose among {', '.join(default)}"
            if default
            else "remove reward_weights: this format's reward has no parts",
        )
    return config.reward_weights or default


def weighted_sum(parts: Parts, weights: Mapping[str, float], n: int) -> list[float | None]:
    """Rewards of n responses: the weighted sum of the parts that each response has.

    The reward of a response that has no part with a nonzero weight is None (missing), not 0.
    """
    rewards: list[float | None] = []
    for i in range(n):
        terms = [
            weight * part
            for name, weight in weights.items()
            if weight and (part := parts[name][i]) is not None
        ]
        rewards.append(sum(terms) if terms else None)
    return rewards
