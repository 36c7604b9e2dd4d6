"""Training on a problem with a known optimum: 8 prompts x 24 responses, see `tabular`.

The gate: KL(pi_theta || pi*) is at most 1% of that of the untrained reference. GVPO passes it with
any sampler that covers the reference. Two common normalisations and the anchor, which change the
optimum, must fail it; otherwise the gate would not be a test. Run with `-s` to print the figures.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tabular import (
    BETA,
    COVERING_SAMPLERS,
    NARROW_SAMPLERS,
    Log,
    Objective,
    World,
    draw_log,
    make_world,
    per_group_deviation,
    relative_lengths,
    train,
)
from torch import Tensor

from gvpo_offline.losses import gvpo_loss

SEEDS = (0, 1, 2)
GATE = 0.01

world_of = cache(make_world)


def gvpo(seq_logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, log: Log) -> Tensor:
    return gvpo_loss(seq_logprobs, ref_logprobs, rewards, log.group, beta=BETA).loss


def with_anchor(seq_logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, log: Log) -> Tensor:
    return gvpo_loss(seq_logprobs, ref_logprobs, rewards, log.group, beta=BETA, anchor=1.0).loss


def by_deviation(seq_logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, log: Log) -> Tensor:
    """Control: rewards divided by the standard deviation of their group."""
    return gvpo(seq_logprobs, ref_logprobs, rewards / per_group_deviation(rewards, log), log)


def by_length(world: World) -> Objective:
    """Control: log-ratios divided by the length of their response."""

    def objective(seq_logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, log: Log) -> Tensor:
        lengths = relative_lengths(world, log)
        return gvpo(seq_logprobs / lengths, ref_logprobs / lengths, rewards, log)

    return objective


def with_length_weights(world: World) -> Objective:
    """Length weights that keep the optimum: weights on the squared residuals."""

    def objective(seq_logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, log: Log) -> Tensor:
        return gvpo_loss(
            seq_logprobs,
            ref_logprobs,
            rewards,
            log.group,
            beta=BETA,
            response_weights=1 / relative_lengths(world, log),
        ).loss

    return objective


def share_of_reference_kl(name: str, seed: int, sampler: str, objective: Objective) -> float:
    """Train, then print and return KL(pi_theta || pi*) / KL(reference || pi*)."""
    world = world_of(seed)
    untouched = world.kl_to_optimum(world.ref_logprobs)
    kl = world.kl_to_optimum(train(world, draw_log(world, sampler), objective))
    print(f"{name}, {sampler}, seed {seed}: KL {kl:.6f}, {kl / untouched:.3%} of {untouched:.4f}")
    return kl / untouched


@pytest.mark.parametrize("seed", SEEDS)
def test_the_world_is_the_documented_one(seed: int) -> None:
    world = world_of(seed)
    log = draw_log(world, "reference")
    sizes = torch.bincount(log.group)
    untouched = world.kl_to_optimum(world.ref_logprobs)
    print(f"seed {seed}: the untouched reference scores {untouched:.4f}")
    assert untouched == pytest.approx(0.149, abs=0.01)
    assert len(sizes) == 8 * 200
    assert set(sizes.tolist()) == set(range(2, 9))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sampler", COVERING_SAMPLERS)
def test_gvpo_reaches_the_optimum_from_any_covering_sampler(sampler: str, seed: int) -> None:
    assert share_of_reference_kl("GVPO", seed, sampler, gvpo) <= GATE


@pytest.mark.parametrize("seed", SEEDS)
def test_response_weights_leave_the_optimum_where_it_is(seed: int) -> None:
    objective = with_length_weights(world_of(seed))
    assert share_of_reference_kl("GVPO++, weights 1/length", seed, "uniform", objective) <= GATE


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sampler", NARROW_SAMPLERS)
def test_narrow_samplers_are_fitted_and_shown(sampler: str, seed: int) -> None:
    """The sampler does not cover the optimum, so the KL has no gate; the log itself is fitted."""
    world = world_of(seed)
    log = draw_log(world, sampler)
    logprobs = train(world, log, gvpo)
    untouched = world.kl_to_optimum(world.ref_logprobs)
    kl = world.kl_to_optimum(logprobs)
    print(f"GVPO, {sampler}, seed {seed}: KL {kl:.6f}, {kl / untouched:.1%} of {untouched:.4f}")
    result = gvpo_loss(
        log.take(logprobs),
        log.take(world.ref_logprobs),
        log.take(world.rewards),
        log.group,
        beta=BETA,
    )
    assert result.metrics["explained_variance"] > 0.99


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sampler", COVERING_SAMPLERS)
def test_control_rewards_over_their_deviation_fail_the_gate(sampler: str, seed: int) -> None:
    assert share_of_reference_kl("rewards / deviation", seed, sampler, by_deviation) > GATE


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sampler", COVERING_SAMPLERS)
def test_control_log_ratios_over_lengths_fail_the_gate(sampler: str, seed: int) -> None:
    objective = by_length(world_of(seed))
    assert share_of_reference_kl("log-ratios / length", seed, sampler, objective) > GATE


@pytest.mark.parametrize("seed", SEEDS)
def test_control_the_anchor_biases_the_optimum(seed: int) -> None:
    assert share_of_reference_kl("anchor 1 (PMD-mean)", seed, "uniform", with_anchor) > GATE
