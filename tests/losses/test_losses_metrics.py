"""Metrics of the loss, compared with loops over groups and pairs; dtypes and devices."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.loss_batches import Batch, batches, check, check_metrics, properties

from gvpo_offline.losses import GroupLoss, GroupStatistics, gvpo_loss


def metrics_by_loops(batch: Batch, result: GroupLoss) -> dict[str, float]:
    """The metrics computed by loops over groups and pairs."""
    log_ratio = batch.seq - batch.ref
    residual = batch.rewards - batch.beta * log_ratio
    unexplained = spread = concordant = comparable = 0.0
    best, variances, group_rewards, reweighted, conserved, masses = [], [], [], [], [], []
    for rows in batch.rows_of_groups():
        reward, ratio, rest = batch.rewards[rows], log_ratio[rows], residual[rows]
        unexplained += float(((rest - rest.mean()) ** 2).sum())
        spread += (
            float(((reward - reward.mean()) ** 2).sum()) if len(torch.unique(reward)) > 1 else 0.0
        )
        best.append(float(ratio[reward == reward.max()].mean()))
        variances.append(float(reward.var()))
        group_rewards.append(float(reward.mean()))
        reweighted.append(float((torch.softmax(ratio, 0) * reward).sum()))
        ratios = torch.minimum(ratio.exp(), torch.tensor(cap_by_bisection(ratio.exp())))
        conserved.append(float((ratios * reward).sum() / ratios.sum()))
        masses.append(float(torch.logsumexp(ratio, 0)) - math.log(len(rows)))
        for i, j in itertools.combinations(range(len(rows)), 2):
            sign = torch.sign(reward[i] - reward[j]) * torch.sign(ratio[i] - ratio[j])
            comparable += float(reward[i] != reward[j])
            concordant += float(reward[i] != reward[j]) * (1 + float(sign)) / 2
    return {
        "loss": float(result.loss),
        "explained_variance": 1 - unexplained / spread if spread else math.nan,
        "log_ratio_mean": float(log_ratio.mean()),
        "log_ratio_std": float(log_ratio.std(correction=0)),
        "best_log_ratio_mean": sum(best) / len(best),
        "weight_std": float(result.weights.std(correction=0)),
        "weight_abs_mean": float(result.weights.abs().mean()),
        "reward_mean": float(batch.rewards.mean()),
        "reward_std": math.sqrt(sum(variances) / len(variances)),
        "pair_accuracy": concordant / comparable if comparable else math.nan,
        "group_reward_mean": sum(group_rewards) / len(group_rewards),
        "reweighted_reward_mean": sum(reweighted) / len(reweighted),
        "log_mass_mean": sum(masses) / len(masses),
        # Without token counts every response has the weight 1 (test_losses_likelihood).
        "likely_reward_mean": sum(group_rewards) / len(group_rewards),
        "likely_reweighted_reward_mean": sum(conserved) / len(conserved),
        "likely_log_mass_mean": sum(masses) / len(masses),
        "likely_share": 1.0,
    }


def cap_by_bisection(ratios: torch.Tensor) -> float:
    """The cap at which the mean of min(ratio, cap) is 1; infinite if the mean is at most 1."""
    if float(ratios.mean()) <= 1:
        return math.inf
    low, high = 1.0, float(ratios.max())
    for _ in range(200):
        middle = (low + high) / 2
        if float(ratios.clamp(max=middle).mean()) > 1:
            high = middle
        else:
            low = middle
    return low


@properties
@given(batches())
def test_metrics_equal_loops_over_groups_and_pairs(batch: Batch) -> None:
    result = batch.loss()
    expected = metrics_by_loops(batch, result)
    assert result.metrics.keys() == expected.keys()
    for name, value in result.metrics.items():
        assert value == pytest.approx(expected[name], rel=1e-6, abs=1e-6, nan_ok=True), name


def test_equal_rewards_pull_back_to_the_reference_and_leave_no_variance_to_explain() -> None:
    """Weights are -beta (l - mean l). The float64 mean of three times 0.1 differs from 0.1."""
    seq, ref = torch.tensor([-1.0, -2.0, -6.0]), torch.full((3,), -3.0)
    rewards = torch.full((3,), 0.1, dtype=torch.float64)
    assert rewards.sum() / 3 != 0.1
    result = gvpo_loss(seq, ref, rewards, torch.ones(3).long(), beta=0.5)
    check(result.weights, torch.tensor([-1.0, -0.5, 1.5]))
    assert math.isnan(result.metrics["explained_variance"])
    assert math.isnan(result.metrics["pair_accuracy"])
    assert result.metrics["reward_std"] == 0.0
    # All three responses are the best; their mean log-ratio is 0.
    assert result.metrics["best_log_ratio_mean"] == 0.0


def test_a_policy_that_triples_a_response_reweighs_its_reward() -> None:
    """Rewards 1, 0 with ratios 3, 1: the reweighted mean is 3/4, the log mass log 2. At the
    reference they are 1/2 and log 1.
    """
    rewards, group = torch.tensor([1.0, 0.0]), torch.zeros(2).long()
    ref = torch.tensor([-5.0, -7.0])
    moved = ref + torch.tensor([math.log(3.0), 0.0])
    for seq, reward, mass in ((moved, 0.75, math.log(2.0)), (ref, 0.5, 0.0)):
        found = gvpo_loss(seq, ref, rewards, group, beta=1.0).metrics
        assert found["reweighted_reward_mean"] == pytest.approx(reward, rel=1e-6)
        assert found["log_mass_mean"] == pytest.approx(mass, abs=1e-6)
        assert found["group_reward_mean"] == 0.5


@properties
@given(batches(), st.floats(-900.0, 900.0))
def test_a_constant_on_a_groups_log_ratios_moves_its_mass_alone(batch: Batch, by: float) -> None:
    """If one of G groups changes by c, log_mass_mean changes by c / G. At l = 0 both metrics are
    those of the reference.
    """
    first, *others = batch.rows_of_groups()
    seq = batch.seq.clone()
    seq[first] += by
    before, after = batch.loss().metrics, batch.loss(seq).metrics
    moved = after["log_mass_mean"] - before["log_mass_mean"]
    assert moved == pytest.approx(by / (1 + len(others)), rel=1e-9, abs=1e-9)
    assert after["reweighted_reward_mean"] == pytest.approx(
        before["reweighted_reward_mean"], rel=1e-9, abs=1e-9
    )
    still = batch.loss(batch.ref).metrics
    assert still["log_mass_mean"] == 0.0
    assert still["reweighted_reward_mean"] == still["group_reward_mean"]


def test_metrics_of_nothing_are_nan() -> None:
    assert all(math.isnan(value) for value in GroupStatistics.zeros().metrics().values())


def test_a_tensor_of_another_length_is_no_statistics() -> None:
    with pytest.raises(ValueError, match="sums"):
        GroupStatistics.from_tensor(torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_in_and_out(dtype: torch.dtype) -> None:
    """Inputs are upcast before any subtraction; the gradient has the policy's dtype."""
    seq = torch.tensor([-1024.0, -1024.0], dtype=dtype, requires_grad=True)
    ref = torch.tensor([-1024.0625, -1024.0], dtype=torch.float32)  # bfloat16 would round it
    result = gvpo_loss(seq, ref, torch.tensor([1, 0]), torch.tensor([0, 0]), beta=1.0)
    assert result.loss.dtype == result.weights.dtype == torch.float64
    assert result.weights.tolist() == [(1 - 0.0625) / 2, -(1 - 0.0625) / 2]
    assert torch.autograd.grad(result.loss, seq)[0].dtype == dtype


def test_only_the_policy_gets_a_gradient() -> None:
    seq, ref, rewards, factors = [torch.rand(4, requires_grad=True) for _ in range(4)]
    group = torch.tensor([0, 0, 1, 1])
    result = gvpo_loss(seq, ref, rewards, group, beta=0.1, anchor=0.5, response_weights=factors)
    torch.autograd.backward(result.loss)
    assert seq.grad is not None
    assert [constant.grad for constant in (ref, rewards, factors)] == [None, None, None]
    assert not result.weights.requires_grad
    assert not result.statistics.sums.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_agrees_with_the_cpu_wherever_the_constants_lie() -> None:
    generator = torch.Generator().manual_seed(0)
    seq, ref, rewards = torch.randn(3, 60, generator=generator)
    group = torch.arange(60) % 13
    here = gvpo_loss(seq, ref, rewards, group, beta=0.3, anchor=0.2)
    there = gvpo_loss(seq.cuda(), ref.cuda(), rewards, group, beta=0.3, anchor=0.2)
    assert there.loss.is_cuda
    check(there.loss.cpu(), here.loss)
    check(there.weights.cpu(), here.weights)
    check_metrics(GroupStatistics.from_tensor(there.statistics.to_tensor().cpu()), here.statistics)
