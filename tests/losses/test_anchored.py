"""OAPL, QRPO, AsymRE, SFT on the best, and the link of chi-squared: worked values and laws."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from support.loss_batches import Batch, batches
from torch import Tensor

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.losses import LOSS_TYPES, GroupLoss, GroupTerms, group_loss
from gvpo_offline.losses.anchored import (
    log_partition,
    oapl,
    quantile_rewards,
    reference_values,
)
from gvpo_offline.settings import LINKED

examples = settings(max_examples=20, deadline=None)
BETA = 0.5


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def terms_of(
    rewards: list[float], *, beta: float = BETA, ratios: list[float] | None = None, **more: Any
) -> GroupTerms:
    """One group whose reference log-probs are all -3."""
    ref = torch.full((len(rewards),), -3.0, dtype=torch.float64)
    seq = ref if ratios is None else ref + tensor(ratios)
    group = torch.zeros(len(rewards), dtype=torch.int64)
    return GroupTerms.build(seq, ref, tensor(rewards), group, beta=beta, **more)


# ---- the value of a prompt ----


def test_the_value_is_that_of_the_references_responses() -> None:
    """beta log mean e^(R / beta) of the rewards 1 and 0: 0.5 log((e^2 + 1) / 2); 0.25 is left out.

    A single response of the reference is its own value.
    """
    rows = torch.tensor([True, False, True])
    found = reference_values(terms_of([1.0, 0.25, 0.0], reference_rows=rows))
    assert found.tolist() == pytest.approx([0.5 * math.log((math.e**2 + 1) / 2)])
    alone = torch.tensor([False, True, False])
    assert reference_values(terms_of([1.0, 0.25, 0.0], reference_rows=alone)).tolist() == [0.25]


def test_the_value_from_weights() -> None:
    """pi_ref / mu = 1, 2, 4 on the rewards 0, 0.5, 1 at beta 0.5: weights 1/7, 2/7, 4/7."""
    sampler = -3.0 - tensor([0.0, math.log(2), math.log(4)])
    found = reference_values(terms_of([0.0, 0.5, 1.0], sampler_logprobs=sampler))
    expected = 0.5 * math.log((1 + 2 * math.e + 4 * math.e**2) / 7)
    assert found.tolist() == pytest.approx([expected])


def test_samplers_that_are_the_reference_have_equal_weights() -> None:
    rewards = [0.0, 0.5, 1.0, 1.0]
    rows = torch.ones(4, dtype=torch.bool)
    sampler = torch.full((4,), -3.0, dtype=torch.float64)
    one = reference_values(terms_of(rewards, reference_rows=rows))
    other = reference_values(terms_of(rewards, sampler_logprobs=sampler))
    assert one.tolist() == pytest.approx(other.tolist(), rel=1e-15)


@pytest.mark.parametrize("beta", [1e-4, 1.0])
def test_values_stay_finite(beta: float) -> None:
    """Rewards of 1000 at beta 1e-4; the reference's responses are far below the best one."""
    rows = torch.tensor([False, True, True])
    found = reference_values(terms_of([1000.0, 1.0, 0.0], beta=beta, reference_rows=rows))
    expected = 1 + beta * (math.log1p(math.exp(-1 / beta)) - math.log(2))
    assert found.tolist() == pytest.approx([expected], rel=1e-12)


# ---- oapl ----


def given_values(batch: Batch) -> dict[str, Any]:
    return {"sampler_logprobs": batch.ref.double() - 0.3}


@examples
@given(batch=batches())
def test_oapl_is_gvpo_and_a_square_of_the_mean(batch: Batch) -> None:
    """OAPL = GVPO + k (beta mean l - (mean R - V*))^2 / (2 (k - 1)), group by group."""
    args = batch.seq, batch.ref, batch.rewards, batch.group
    plain = group_loss("gvpo", *args, beta=batch.beta)
    whole = group_loss("oapl", *args, beta=batch.beta, **given_values(batch))
    terms = whole.terms
    gap_G = batch.beta * terms.mean(terms.log_ratios_N)
    gap_G = gap_G - (terms.mean(terms.rewards_N) - reference_values(terms))
    sizes_G = terms.group_sizes_G
    expected = plain.group_losses + sizes_G * gap_G.square() / (2 * (sizes_G - 1))
    # Squares of residuals of size s lose s^2 eps; the sums of both sides have at most k + 2 terms.
    scale = 1 + float(whole.group_losses.abs().max())
    assert torch.allclose(whole.group_losses, expected, rtol=1e-9, atol=1e-12 * scale)


def test_oapl_rests_at_the_optimum_where_the_value_is_exact() -> None:
    """All responses of a prompt, each once, weighted by pi_ref: l = (R - V*) / beta has loss 0."""
    ref = torch.log(tensor([0.5, 0.3, 0.2]))
    rewards = tensor([0.0, 1.0, 0.25])
    group = torch.zeros(3, dtype=torch.int64)
    uniform = torch.full((3,), -math.log(3), dtype=torch.float64)
    value = BETA * float(torch.logsumexp(ref + rewards / BETA, 0))
    optimum = ref + (rewards - value) / BETA
    assert float(optimum.exp().sum()) == pytest.approx(1.0)
    how = {"beta": BETA, "sampler_logprobs": uniform}
    result = group_loss("oapl", optimum, ref, rewards, group, **how)
    assert float(result.loss) == pytest.approx(0.0, abs=1e-30)
    lower = group_loss("oapl", optimum - 1, ref, rewards, group, **how)
    # All log-ratios lower by 1: 3 (0.5)^2 / (2 * 2); GVPO sees no difference.
    assert float(lower.loss) == pytest.approx(3 * 0.25 / 4)
    assert float(group_loss("gvpo", optimum - 1, ref, rewards, group, beta=BETA).loss) < 1e-30


def test_a_constant_added_to_rewards_changes_nothing_for_oapl() -> None:
    rows = torch.tensor([True, True, False])
    losses = [
        oapl(terms_of([1.0 + c, c, 0.5 + c], ratios=[0.4, -0.2, 0.1], reference_rows=rows))
        for c in (0.0, 8.0)
    ]
    assert losses[0].tolist() == pytest.approx(losses[1].tolist(), rel=1e-12)


# ---- qrpo ----


def test_quantiles() -> None:
    """Reference rewards 0.1, 0.4, 0.7; ties count as reached."""
    rows = torch.tensor([True, True, True, False, False, False])
    found = quantile_rewards(terms_of([0.1, 0.4, 0.7, 0.0, 0.4, 0.9], reference_rows=rows))
    assert found.tolist() == pytest.approx([1 / 3, 2 / 3, 1.0, 0.0, 2 / 3, 1.0])


@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
def test_the_partition_function_of_a_uniform_reward(beta: float) -> None:
    """log of the integral of e^(u / beta) over [0, 1], by the midpoint rule with 200,000 points.

    Its error is at most e^(1 / beta) / (24 beta^2 n^2) (second derivative), under 1e-7 of Z here.
    """
    points = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    integral = float(torch.logsumexp(points / beta, 0)) - math.log(200_000)
    assert log_partition(beta) == pytest.approx(integral, abs=1e-7)
    assert math.isfinite(log_partition(1e-5))


@pytest.mark.parametrize("beta", [10.0, 1e3, 1e6])
def test_the_level_at_a_large_beta_is_the_mean_quantile(beta: float) -> None:
    """log Z = 1 / (2 beta) + 1 / (24 beta^2) - 1 / (2880 beta^4) ..., so that beta log Z goes to
    1/2. log Z is the log of a number near 1, which is rounded to some epsilons."""
    rounding = 4 * sys.float_info.epsilon * beta
    expected = 0.5 + 1 / (24 * beta)
    assert beta * log_partition(beta) == pytest.approx(expected, abs=1e-3 / beta**3 + rounding)


def test_qrpo_rests_at_the_optimum_of_the_quantile_reward() -> None:
    """At beta l = R_q - beta log Z the loss is 0. Only the order of the rewards counts."""
    rewards, rows = [0.1, 0.4, 0.7, 0.2], torch.tensor([True, True, True, False])
    quantiles = tensor([1 / 3, 2 / 3, 1.0, 1 / 3])
    ratios = ((quantiles - BETA * log_partition(BETA)) / BETA).tolist()
    for values in (rewards, [math.exp(9 * value) for value in rewards]):
        terms = terms_of(values, ratios=ratios, reference_rows=rows)
        group = torch.zeros(4, dtype=torch.int64)
        loss = group_loss(
            "qrpo",
            terms.seq_logprobs_N,
            terms.ref_logprobs_N,
            terms.rewards_N,
            group,
            beta=BETA,
            reference_rows=rows,
        ).loss
        assert float(loss) == pytest.approx(0.0, abs=1e-28)


# ---- asymre, sft ----


@examples
@given(batch=batches())
def test_asymre_is_reinforce_and_a_mean_log_prob(batch: Batch) -> None:
    """-(R - mean R) log pi + delta log pi: linear in delta, with slope mean log pi."""
    args = batch.seq, batch.ref, batch.rewards, batch.group
    low = group_loss("asymre", *args, beta=1.0, asymre_delta=-0.5)
    high = group_loss("asymre", *args, beta=1.0, asymre_delta=-0.25)
    means = low.terms.mean(low.terms.seq_logprobs_N)
    difference = low.group_losses - high.group_losses
    scale = 1 + float(low.group_losses.abs().max())
    assert torch.allclose(difference, -0.25 * means, rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize("delta", [0.0, 0.1, -math.inf, math.nan])
def test_the_shift_of_asymre_is_below_0(delta: float) -> None:
    values = tensor([-1.0, -2.0])
    group = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ConfigError, match="asymre_delta is a finite number below 0"):
        group_loss("asymre", values, values, values, group, beta=1.0, asymre_delta=delta)


def test_sft_imitates_the_first_best_of_every_group() -> None:
    """Also where all rewards are equal; -log pi of rows 1 and 2."""
    seq, rewards = tensor([-1.0, -2.0, -3.0, -4.0]), tensor([0.0, 1.0, 0.5, 0.5])
    group = torch.tensor([0, 0, 1, 1])
    result = group_loss("sft", seq, seq, rewards, group, beta=BETA)
    assert result.group_losses.tolist() == [2.0, 3.0]


# ---- the link ----


def linked(ratios: Tensor) -> Tensor:
    return ratios + ratios.exp() - 1


def test_the_link_is_l_plus_e_to_the_l() -> None:
    """0 at the reference; beyond 20 nats it grows by l alone, without overflow."""
    terms = replace(terms_of([0.0] * 4, ratios=[0.0, 1.0, -900.0, 900.0]), link="chi_squared")
    expected = [0.0, math.e, -901.0, 899 + math.exp(20)]
    assert terms.linked_N.tolist() == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("name", LINKED)
@examples
@given(batch=batches())
def test_a_linked_loss_is_the_plain_loss_of_linked_log_ratios(name: str, batch: Batch) -> None:
    args = batch.ref, batch.rewards, batch.group
    seq, ref = batch.seq.double(), batch.ref.double()
    ratios = (seq - ref).clamp(-5, 5)
    plain = group_loss(name, ref + linked(ratios), *args, beta=batch.beta)
    own = group_loss(name, ref + ratios, *args, beta=batch.beta, link="chi_squared")
    scale = 1 + float(plain.group_losses.abs().max())
    assert torch.allclose(own.group_losses, plain.group_losses, rtol=1e-9, atol=1e-9 * scale)


@pytest.mark.parametrize("name", ["gvpo", "rebel"])
def test_a_linked_loss_rests_where_linked_log_ratios_are_rewards(name: str) -> None:
    """The optimum of the mixed chi-squared and KL penalty: l + e^l = R / beta + a constant."""
    ratios = tensor([0.3, -0.4, 0.9])
    rewards, ref = BETA * (linked(ratios) + 2.0), tensor([-1.0, -2.0, -3.0])
    seq = (ref + ratios).requires_grad_()
    group = torch.zeros(3, dtype=torch.int64)
    result = group_loss(name, seq, ref, rewards, group, beta=BETA, link="chi_squared")
    (gradient,) = torch.autograd.grad(result.loss, seq)
    assert gradient.abs().max() < 1e-15
    assert result.metrics["explained_variance"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", LINKED)
def test_weights_of_a_linked_loss_are_those_of_the_gradient(name: str) -> None:
    seq = tensor([-0.6, -2.2, -2.9]).requires_grad_()
    ref, rewards = tensor([-1.0, -2.0, -3.0]), tensor([1.0, 0.0, 0.5])
    group = torch.zeros(3, dtype=torch.int64)
    result = group_loss(name, seq, ref, rewards, group, beta=BETA, link="chi_squared")
    (gradient,) = torch.autograd.grad(result.loss, seq)
    assert torch.allclose(gradient, -BETA / 2 * result.weights, rtol=1e-12, atol=1e-15)


# ---- what is refused ----


def call(name: str, **changes: Any) -> GroupLoss:
    values, group = tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([7, 7, 9, 9])
    return group_loss(name, values, values, tensor([1.0, 0, 0.5, 0]), group, beta=BETA, **changes)


@pytest.mark.parametrize("name", [n for n in LOSS_TYPES if n not in LINKED])
def test_the_link_is_for_losses_of_differences(name: str) -> None:
    with pytest.raises(ConfigError, match="link chi_squared is for losses of differences"):
        call(name, link="chi_squared")


def test_an_unknown_link() -> None:
    with pytest.raises(ConfigError, match="link is log or chi_squared"):
        call("gvpo", link="square")


def test_losses_say_what_they_need() -> None:
    with pytest.raises(DataError, match="oapl needs responses of the reference, or") as error:
        call("oapl")
    assert "reference_sampler" in str(error.value)
    with pytest.raises(DataError, match="qrpo needs the rewards of responses of the reference"):
        call("qrpo", sampler_logprobs=tensor([-1.0, -2.0, -3.0, -4.0]))


@pytest.mark.parametrize("name", ["oapl", "qrpo"])
def test_a_group_without_the_reference_is_named(name: str) -> None:
    with pytest.raises(DataError, match="each group has a response of the reference") as error:
        call(name, reference_rows=torch.tensor([True, False, False, False]))
    assert (error.value.group, error.value.row) == ("9", 2)
    with pytest.raises(DataError, match="reference_rows must have one entry"):
        call(name, reference_rows=torch.tensor([True, False]))
