"""All losses, exact importance weighting, and the controls, as objectives for tabular.py."""

from __future__ import annotations

from dataclasses import dataclass

from tabular import (
    Log,
    Objective,
    World,
    per_group_deviation,
    relative_lengths,
)
from torch import Tensor

from gvpo_offline.losses import LOSS_TYPES, GroupTerms, group_loss

# The optimum of qrpo is that of another reward, the quantile.
LOSSES = tuple(name for name in LOSS_TYPES if name != "qrpo")
WEIGHTED = "exact importance weights"
CONTROLS = ("rewards / deviation", "log-ratios / length")


@dataclass(frozen=True)
class Setting:
    """A world, a log, and the probabilities of the log's sampler, (P, Y)."""

    world: World
    log: Log
    probs: Tensor


def objective_of(
    name: str, setting: Setting, *, anchor: float = 0.0, imitation: float = 0.0
) -> Objective:
    """The loss or control with the given name; `anchor` and `imitation` apply to gvpo.

    topr and oapl get the exact log-probs of the sampler.
    """
    beta = setting.world.beta
    scale: Tensor | float = 1.0
    if name == WEIGHTED:
        return importance_weighted(setting)
    if name == "log-ratios / length":
        scale = relative_lengths(setting.world, setting.log)
    sampler = setting.log.take(setting.probs.log()) if name in ("topr", "oapl") else None

    def objective(seq_logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, log: Log) -> Tensor:
        if name == "rewards / deviation":
            rewards = rewards / per_group_deviation(rewards, log)
        return group_loss(
            name if name in LOSSES else "gvpo",
            seq_logprobs / scale,
            ref_logprobs / scale,
            rewards,
            log.group,
            beta=beta,
            anchor=anchor,
            imitation=imitation,
            sampler_logprobs=sampler,
        ).loss

    return objective


def importance_weighted(setting: Setting) -> Objective:
    """RLOO with the KL term in the reward and unclipped, unbiased importance weights pi / mu.

    It needs mu, the probability of each response under the mixture of samplers, which real logs do
    not have.
    """
    sampler_N = setting.log.take(setting.probs.log())

    def objective(seq_logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, log: Log) -> Tensor:
        beta = setting.world.beta
        terms = GroupTerms.build(seq_logprobs, ref_logprobs, rewards, log.group, beta=beta)
        scale_N = (terms.group_sizes_G / (terms.group_sizes_G - 1))[terms.group_N]
        advantages_N = terms.centre(terms.rewards_N) * scale_N
        costs_N = beta * terms.log_ratios_N.detach() - advantages_N
        return terms.mean((seq_logprobs - sampler_N).exp() * costs_N).mean()

    return objective
