"""Rewards that are made of parts: which weights, and the sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gvpo_offline.errors import ConfigError
from gvpo_offline.importing.settings import ImportConfig

Parts = Mapping[str, Sequence[float | None]]
"""Parts of the rewards of n responses: n numbers by name, None where a response lacks the part."""


def part_weights(config: ImportConfig, default: Mapping[str, float]) -> Mapping[str, float]:
    """The weights of a reward's parts: `reward_weights`, or else `default`, which names them all.

    Raises:
        ConfigError: a weight for a part that there is not.
    """
    unknown = sorted(set(config.reward_weights) - set(default))
    if unknown:
        raise ConfigError(
            f"reward_weights names parts of the reward that format: {config.format} has",
            received=", ".join(unknown),
            remedy=f"choose among {', '.join(default)}"
            if default
            else "leave reward_weights out: this format's reward has no parts",
        )
    return config.reward_weights or default


def weighted_sum(parts: Parts, weights: Mapping[str, float], n: int) -> list[float | None]:
    """Rewards of n responses: for each the weighted sum of the parts that it has.

    A response that has none of the parts with a weight has no reward, which is None and not 0.
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
