"""Every loss, and the controls, as objectives of the tabular world."""

from __future__ import annotations

from dataclasses import dataclass

from tabular import (
    BETA,
    Log,
    Objective,
    World,
    per_group_deviation,
    relative_lengths,
)
from torch import Tensor

from gvpo_offline.losses import LOSS_TYPES, group_loss

LOSSES = LOSS_TYPES
CONTROLS = ("rewards / deviation", "log-ratios / length")


@dataclass(frozen=True)
class Setting:
    """A world, a log of it, and what the sampler's probabilities were, (P, Y)."""

    world: World
    log: Log
    probs: Tensor


def objective_of(name: str, setting: Setting) -> Objective:
    """A loss or control by its name."""
    scale: Tensor | float = 1.0
    if name == "log-ratios / length":
        scale = relative_lengths(setting.world, setting.log)
    sampler = setting.log.take(setting.probs.log()) if name == "topr" else None

    def objective(seq_logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, log: Log) -> Tensor:
        if name == "rewards / deviation":
            rewards = rewards / per_group_deviation(rewards, log)
        return group_loss(
            name if name in LOSSES else "gvpo",
            seq_logprobs / scale,
            ref_logprobs / scale,
            rewards,
            log.group,
            beta=BETA,
            sampler_logprobs=sampler,
        ).loss

    return objective
