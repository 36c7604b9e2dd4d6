"""The other losses: worked values, properties of all losses, properties shared with GVPO."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.loss_batches import Batch, batches
from torch import Tensor

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.losses import LOSS_TYPES, GroupLoss, group_loss

examples = settings(max_examples=20, deadline=None)  # of fifteen losses each

# One group: rewards 1, 0, 0.5; log-ratios 0.4, -0.2, 0.1 on a reference of -1, -2, -3; beta 0.5.
REWARDS = [1.0, 0.0, 0.5]
RATIOS = [0.4, -0.2, 0.1]
REFERENCE = [-1.0, -2.0, -3.0]
BETA = 0.5
LOGPROBS = [-0.6, -2.2, -2.9]
SAMPLER = [-0.5, -2.0, -3.0]

# DPO: -log sigmoid(0.5 * 0.6). TOPR: A = 0.5, -0.5, 0, and the worst is tapered by exp(-0.2).
# OAPL: weights pi_ref / mu = e^-0.5, 1, 1 of e^(R / beta) = e^2, 1, e; beta l = 0.2, -0.1, 0.05.
# QRPO: quantiles 1, 1/3, 2/3; Z = 0.5 (e^2 - 1). AsymRE: A + 0.1 = 0.6, -0.4, 0.1.
V_STAR = 0.5 * math.log((math.exp(1.5) + 1 + math.e) / (math.exp(-0.5) + 2))
LEVEL = 0.5 * math.log(0.5 * (math.exp(2) - 1))
WORKED = {
    "gvpo": (0.35**2 + 0.35**2) / 4,  # residuals 0.8, 0.1, 0.45, mean 0.45
    "pmd_mean": (0.35**2 + 0.35**2 + 3 * (0.5 * 0.1) ** 2) / 4,
    "rebel": 0.7**2 / 4,
    "ipo": (0.6 - 1) ** 2,
    "dpo": math.log1p(math.exp(-0.3)),
    "rft": 0.6,
    "awr": (math.e * 0.6 + math.exp(-1) * 2.2 + 2.9) / 3,
    "oapl": ((0.8 - V_STAR) ** 2 + (0.1 - V_STAR) ** 2 + (0.45 - V_STAR) ** 2) / 4,
    "qrpo": ((0.8 - LEVEL) ** 2 + (1 / 3 + 0.1 - LEVEL) ** 2 + (2 / 3 - 0.05 - LEVEL) ** 2) / 4,
    "asymre": -(0.6 * -0.6 - 0.4 * -2.2 + 0.1 * -2.9) / 3,
    "sft": 0.6,
    "topr": -(0.5 * -0.6 - math.exp(-0.2) * 0.5 * -2.2) / 3,
}


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def inputs_of(name: str, sampler: Tensor) -> dict[str, Tensor]:
    """What a loss needs beside policy, reference and rewards; for qrpo the reference wrote all."""
    if name in ("topr", "oapl"):
        return {"sampler_logprobs": sampler}
    return {"reference_rows": torch.ones_like(sampler).bool()} if name == "qrpo" else {}


def loss_of(name: str, batch: Batch, seq: Tensor | None = None) -> GroupLoss:
    """The loss of a batch; made-up sampler log-probs are passed to the loss that uses them."""
    return group_loss(
        name,
        batch.seq if seq is None else seq,
        batch.ref,
        batch.rewards,
        batch.group,
        beta=batch.beta,
        **inputs_of(name, batch.ref - 0.3),
    )


def gradient_of(name: str, batch: Batch) -> Tensor:
    seq = batch.seq.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(name, batch, seq).loss, seq)
    return gradient


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_a_worked_group(name: str) -> None:
    result = group_loss(
        name,
        tensor(LOGPROBS),
        tensor(REFERENCE),
        tensor(REWARDS),
        torch.zeros(3, dtype=torch.long),
        beta=BETA,
        **inputs_of(name, tensor(SAMPLER)),
    )
    assert float(result.loss) == pytest.approx(WORKED.get(name) or by_hand(name), abs=1e-12)


def by_hand(name: str) -> float:
    """The listwise, GRPO and RLOO losses, written out."""
    if name == "listwise":
        q = torch.softmax(tensor(REFERENCE) + tensor(REWARDS) / BETA, 0)
        p = torch.softmax(tensor(LOGPROBS), 0)
        return float((q * (q / p).log()).sum())
    kl = [math.exp(-ratio) + ratio - 1 for ratio in RATIOS]
    if name == "grpo":
        # A = 0.5, -0.5, 0 over a deviation of 0.5 (and 1e-4); ratios exp(0.4) clipped to 1.2, and
        # exp(-0.2) = 0.819, inside.
        a = 0.5 / 0.5001
        gains = [a * 1.2, -a * math.exp(-0.2), 0.0]
        return sum(BETA * k - gain for k, gain in zip(kl, gains, strict=True)) / 3
    assert name == "rloo"
    advantages = [1 - 0.25, 0 - 0.75, 0.0]
    terms = zip(kl, advantages, LOGPROBS, strict=True)
    return sum(BETA * k - a * logprob for k, a, logprob in terms) / 3


@pytest.mark.parametrize("name", LOSS_TYPES)
@examples
@given(batch=batches(), random=st.randoms(use_true_random=False))
def test_rows_may_come_in_any_order_and_groups_in_any_number_of_calls(
    name: str, batch: Batch, random: Any
) -> None:
    whole = loss_of(name, batch)
    rows = list(range(len(batch.seq)))
    random.shuffle(rows)
    # Ties for the best are broken by position, so only rows without ties are permuted.
    untied = all(
        len(set(batch.rewards[own].tolist())) == len(own) for own in batch.rows_of_groups()
    )
    if untied or name not in ("rebel", "ipo", "dpo", "sft"):
        shuffled = loss_of(name, batch.take(torch.tensor(rows)))
        assert shuffled.group_losses.tolist() == pytest.approx(
            whole.group_losses.tolist(), rel=1e-9
        )
    parts = [loss_of(name, batch.take(own)).loss for own in batch.rows_of_groups()]
    assert [float(part) for part in parts] == pytest.approx(whole.group_losses.tolist(), rel=1e-9)


@pytest.mark.parametrize("name", LOSS_TYPES)
@examples
@given(batch=batches())
def test_weights_are_the_gradient(name: str, batch: Batch) -> None:
    result = loss_of(name, batch)
    sizes = torch.bincount(result.terms.group_N)[result.terms.group_N]
    expected = -batch.beta / (sizes - 1) * result.weights / result.n_groups
    assert torch.allclose(gradient_of(name, batch), expected.to(batch.seq), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in LOSS_TYPES if n != "topr"])
def test_gradients_against_differences(name: str) -> None:
    """TOPR treats its taper as constant, so its gradient is not the derivative of its loss."""
    generator = torch.Generator().manual_seed(3)
    seq, ref, rewards = (torch.randn(7, generator=generator).double() for _ in range(3))
    group = torch.tensor([0, 0, 0, 1, 1, 1, 1])

    def loss(values: Tensor) -> Tensor:
        more = inputs_of(name, ref - 0.3)
        return group_loss(name, values, ref, rewards, group, beta=0.7, **more).loss

    assert torch.autograd.gradcheck(loss, seq.requires_grad_())


@pytest.mark.parametrize("name", ["gvpo", "rebel", "listwise"])
@examples
@given(batch=batches())
def test_losses_with_gvpos_optimum_rest_there(name: str, batch: Batch) -> None:
    """The gradient is zero at seq = ref + R / beta + a constant per group."""
    optimum = batch.ref.double() + batch.rewards.double() / batch.beta + 0.25
    resting = Batch(optimum, batch.ref, batch.rewards, batch.group, batch.beta, 0.0, None)
    scale = 1 + float(optimum.abs().max())
    assert float(gradient_of(name, resting).abs().max()) <= 1e-9 * scale


@examples
@given(batch=batches())
def test_rebel_is_gvpo_for_groups_of_two(batch: Batch) -> None:
    pairs = batch.take(torch.cat([own[:2] for own in batch.rows_of_groups()]))
    plain = Batch(pairs.seq, pairs.ref, pairs.rewards, pairs.group, pairs.beta, 0.0, None)
    one, other = loss_of("rebel", plain), loss_of("gvpo", plain)
    assert one.group_losses.tolist() == pytest.approx(other.group_losses.tolist(), rel=1e-9)
    assert one.weights.tolist() == pytest.approx(other.weights.tolist(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", ["ipo", "dpo", "rft"])
def test_equal_rewards_prefer_nothing(name: str) -> None:
    equal = torch.ones(3, dtype=torch.float64)
    group = torch.zeros(3, dtype=torch.long)
    result = group_loss(name, tensor(LOGPROBS), tensor(REFERENCE), equal, group, beta=BETA)
    assert float(result.loss) == 0
    assert not result.weights.any()


def test_listwise_has_a_bounded_gradient() -> None:
    """p - q lies between -1 and 1 whatever the rewards; GVPO's grows with them."""
    rewards = 1e6 * tensor(REWARDS)
    group = torch.zeros(3, dtype=torch.long)
    seq = tensor(LOGPROBS).requires_grad_()
    result = group_loss("listwise", seq, tensor(REFERENCE), rewards, group, beta=BETA)
    (gradient,) = torch.autograd.grad(result.loss, seq)
    assert float(gradient.abs().max()) <= 1
    assert float(result.loss.detach()) < 10


def test_awr_caps_its_weights_at_20() -> None:
    """The cap is 20 (arXiv 1910.00177 clips exp(A / beta) at omega_max = 20), reached at
    A / beta = ln 20 = 2.9957.

    Rewards 1 and 0 have A = 1/2 and -1/2. At beta = 0.25 the weights are exp(2) = 7.389 and
    exp(-2), below the cap; at beta = 0.1 exp(5) = 148.4 is replaced by 20 and exp(-5) stays. The
    gradient of the group's loss -(w_0 s_0 + w_1 s_1) / 2 by the log-probs is -w / 2.
    """
    group = torch.zeros(2, dtype=torch.long)
    for beta, largest in ((0.25, math.exp(2)), (0.1, 20.0)):
        seq = tensor([-3.0, -4.0]).requires_grad_()
        rewards, reference = tensor([1.0, 0.0]), tensor([-1.0, -2.0])
        result = group_loss("awr", seq, reference, rewards, group, beta=beta)
        (gradient,) = torch.autograd.grad(result.loss, seq)
        smallest = math.exp(-0.5 / beta)
        expected = (largest * 3.0 + smallest * 4.0) / 2
        assert float(result.loss.detach()) == pytest.approx(expected, rel=1e-12)
        assert gradient.tolist() == pytest.approx([-largest / 2, -smallest / 2], rel=1e-12)


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_a_policy_far_from_the_reference_stays_finite(name: str) -> None:
    seq = tensor([-900.0, 900.0, 0.0]).requires_grad_()
    group = torch.zeros(3, dtype=torch.long)
    result = group_loss(name, seq, tensor(REFERENCE), tensor(REWARDS), group, beta=BETA)
    (gradient,) = torch.autograd.grad(result.loss, seq)
    assert torch.isfinite(result.loss)
    assert torch.isfinite(gradient).all()


def call(name: str, **changes: Any) -> GroupLoss:
    group = torch.zeros(3, dtype=torch.long)
    return group_loss(
        name, tensor(LOGPROBS), tensor(REFERENCE), tensor(REWARDS), group, beta=BETA, **changes
    )


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="loss_type is one of gvpo, pmd_mean, rebel"):
        call("ppo")
    with pytest.raises(DataError, match="topr needs the log-probs of the samplers"):
        call("topr")
    for changes in ({"anchor": 0.5}, {"response_weights": torch.ones(3)}):
        with pytest.raises(ConfigError, match="only loss_type gvpo has an anchor"):
            call("dpo", **changes)
    with pytest.raises(DataError, match=r"sampler_logprobs must be finite.*nan"):
        call("topr", sampler_logprobs=tensor([0.0, math.nan, 0.0]))


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_evaluation_needs_no_graph(name: str) -> None:
    with torch.no_grad():
        result = call(name, **inputs_of(name, tensor(SAMPLER)))
    assert not result.loss.requires_grad
    assert math.isfinite(result.metrics["explained_variance"])
