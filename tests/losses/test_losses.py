"""The GVPO loss: worked values, and properties over random batches.

A worked group, checked below. beta 0.5, k = 3, rewards 1, 0, 0.5, log-ratios 1, 0, -1 nats:

    residuals   R - beta l      0.5, 0, 1            mean 0.5
    weights     r - mean        0, -0.5, 0.5
    loss        (0 + 0.25 + 0.25) / (2 * (3 - 1))  = 0.125
    gradient    -beta / (k - 1) * weights          = 0, 0.125, -0.125
    explained   1 - 0.5 / (0.25 + 0.25)            = 0       the fit is no better than the reference
    pairs       (1 > 0.5: l 1 > -1), (1 > 0: l 1 > 0), (0.5 > 0: l -1 < 0)    2 of 3
    reweighted  e^l sums to e + 1 + 1/e; (e + 0.5 / e) over it, and the log of a third of it
"""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import replace
from functools import reduce
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.loss_batches import Batch, batches, check, check_metrics, properties
from tabular import BETA, draw_log, make_world
from torch import Tensor

from gvpo_offline.losses import GroupStatistics, gvpo_loss


def test_the_worked_group() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5])
    log_ratios = torch.tensor([1.0, 0.0, -1.0])
    batch = Batch(
        log_ratios - 2, torch.full((3,), -2.0), rewards, torch.zeros(3).long(), 0.5, 0, None
    )
    result, gradient = batch.loss_and_gradient()
    assert result.loss.item() == 0.125
    assert result.weights.tolist() == [0.0, -0.5, 0.5]
    assert gradient.tolist() == [0.0, 0.125, -0.125]
    assert result.metrics == pytest.approx(
        {
            "loss": 0.125,
            "explained_variance": 0.0,
            "log_ratio_mean": 0.0,
            "log_ratio_std": math.sqrt(2 / 3),
            "best_log_ratio_mean": 1.0,
            "weight_std": math.sqrt(0.5 / 3),
            "weight_abs_mean": 1 / 3,
            "reward_mean": 0.5,
            "reward_std": 0.5,
            "pair_accuracy": 2 / 3,
            "group_reward_mean": 0.5,
            "reweighted_reward_mean": (math.e + 0.5 / math.e) / (math.e + 1 + 1 / math.e),
            "log_mass_mean": math.log((math.e + 1 + 1 / math.e) / 3),
            "likely_reward_mean": 0.5,
            # The ratios e, 1, 1 / e have a mean above 1: the first is capped at 2 - 1 / e.
            "likely_reweighted_reward_mean": (2 - 0.5 / math.e) / 3,
            "likely_log_mass_mean": math.log((math.e + 1 + 1 / math.e) / 3),
            "likely_share": 1.0,
        }
    )


def test_worked_variants() -> None:
    """Two responses, R 1 and 0, l 0.5 and -0.5 plus an offset of 2, beta 0.5.

    Plain: r = -0.25, -0.75, w = +-0.25, loss 0.0625. Anchor 0.4 adds to the squares
    0.4 * 2 * 0.25 * 4 / 2 = 0.4 (k - 1 is 1): loss 0.4625. Weights 3 and 1 are 1.5 and 0.5 once
    scaled: r_bar = -0.375, r - r_bar = 0.125, -0.375, w = 0.1875, -0.1875, and the loss
    (1.5 * 0.015625 + 0.5 * 0.140625) / 2 = 0.046875.
    """
    seq, ref = torch.tensor([2.5, 1.5]) - 9, torch.tensor([-9.0, -9.0])
    batch = Batch(seq, ref, torch.tensor([1.0, 0.0]), torch.tensor([4, 4]), 0.5, 0.0, None)
    assert batch.loss().loss.item() == 0.0625
    assert replace(batch, anchor=0.4).loss().loss.item() == pytest.approx(0.4625)
    weighted = replace(batch, weights=torch.tensor([3.0, 1.0])).loss()
    assert weighted.loss.item() == pytest.approx(0.046875)
    assert weighted.weights.tolist() == pytest.approx([0.1875, -0.1875])


def test_the_signature_and_that_no_sampler_is_in_it() -> None:
    """The loss cannot depend on sampler labels, because a sampler is not an argument."""
    assert list(inspect.signature(gvpo_loss).parameters) == [
        "seq_logprobs",
        "ref_logprobs",
        "rewards",
        "group_index",
        "beta",
        "anchor",
        "response_weights",
    ]


@properties
@given(batches(anchors=(0.0,)), st.floats(-5, 5))
def test_no_gradient_at_the_optimum(batch: Batch, offset: float) -> None:
    """At the optimum l = R / beta - log Z, with any constant log Z per group."""
    log_z = offset * (batch.group % 7).double()
    optimum = replace(batch, seq=batch.ref + batch.rewards / batch.beta - log_z)
    result, gradient = optimum.loss_and_gradient()
    check(result.loss, 0.0)
    check(result.weights, torch.zeros_like(result.weights))
    check(gradient, torch.zeros_like(gradient))
    explained = result.metrics["explained_variance"]
    assert math.isnan(explained) or explained == pytest.approx(1.0)


def test_no_gradient_in_the_logits_at_the_optimum_but_at_the_reference() -> None:
    """Gradient in the logits of a softmax; the log comes from a sampler other than the policy."""
    world = make_world(0)
    log = draw_log(world, "older")
    norms = {}
    for name, start in (("optimum", world.optimum), ("reference", world.ref_logprobs)):
        logits = start.clone().requires_grad_()
        seq = log.take(torch.log_softmax(logits, dim=-1))
        ref, rewards = log.take(world.ref_logprobs), log.take(world.rewards)
        loss = gvpo_loss(seq, ref, rewards, log.group, beta=BETA).loss
        norms[name] = float(torch.autograd.grad(loss, logits)[0].norm())
    assert norms["optimum"] < 1e-14
    assert norms["reference"] > 1e-3


@properties
@given(batches(), st.floats(-100, 100))
def test_invariance_to_a_constant_on_one_groups_rewards(batch: Batch, constant: float) -> None:
    chosen = batch.group == batch.group[0]
    moved = replace(batch, rewards=batch.rewards + constant * chosen)
    (before, gradient), (after, moved_gradient) = (
        batch.loss_and_gradient(),
        moved.loss_and_gradient(),
    )
    check(after.loss, before.loss)
    check(after.weights, before.weights)
    check(moved_gradient, gradient)


@properties
@given(batches(), st.randoms(use_true_random=False))
def test_invariance_to_permutation(batch: Batch, random: Any) -> None:
    rows = list(range(len(batch.seq)))
    random.shuffle(rows)
    (before, gradient), permuted = batch.loss_and_gradient(), batch.take(torch.tensor(rows))
    after, permuted_gradient = permuted.loss_and_gradient()
    check(after.loss, before.loss)
    check(after.weights, before.weights[rows])
    check(permuted_gradient, gradient[rows])
    check_metrics(after.statistics, before.statistics)


@properties
@given(batches(), st.integers(-1000, 1000), st.sampled_from([torch.int32, torch.int64]))
def test_invariance_to_relabelling(batch: Batch, start: int, dtype: torch.dtype) -> None:
    """Group ids are replaced by new ones in reverse order."""
    _, number = torch.unique(batch.group, return_inverse=True)
    renamed = replace(batch, group=(start - 3 * number).to(dtype))
    before, after = batch.loss(), renamed.loss()
    check(after.loss, before.loss)
    check(after.weights, before.weights)
    check(after.group_losses, before.group_losses.flip(0))
    check_metrics(after.statistics, before.statistics)


def in_pieces(batch: Batch, pieces: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and reduced sums of a batch computed in pieces; empty pieces are skipped."""
    n_groups = len(torch.unique(batch.group))
    loss, gradient = torch.zeros((), dtype=torch.float64), torch.zeros_like(batch.seq)
    reduced = GroupStatistics.zeros().to_tensor()
    for rows in pieces:
        if len(rows) == 0:
            reduced += GroupStatistics.zeros().to_tensor()
            continue
        seq = batch.seq[rows].clone().requires_grad_()
        result = batch.take(rows).loss(seq)
        share = result.group_losses.sum() / n_groups
        gradient[rows] += torch.autograd.grad(share, seq)[0]
        loss += share.detach()
        reduced += result.statistics.to_tensor()
    return loss, gradient, reduced


def check_pieces(batch: Batch, pieces: list[Tensor]) -> None:
    whole, gradient = batch.loss_and_gradient()
    loss, gradient_of_pieces, reduced = in_pieces(batch, pieces)
    check(loss, whole.loss)
    check(gradient_of_pieces, gradient)
    check_metrics(GroupStatistics.from_tensor(reduced), whole.statistics)


@properties
@given(batches(), st.lists(st.booleans(), min_size=6, max_size=6))
def test_invariance_to_micro_batching(batch: Batch, cuts: list[bool]) -> None:
    """Groups are split at any boundaries; each micro-batch adds the sum of its group losses."""
    pieces: list[Tensor] = []
    for cut, rows in zip(cuts, batch.rows_of_groups(), strict=False):
        if cut or not pieces:
            pieces.append(rows)
        else:
            pieces[-1] = torch.cat([pieces[-1], rows])
    check_pieces(batch, pieces)


@properties
@given(batches(), st.sampled_from([1, 2, 3, 4, 8]))
def test_invariance_to_the_number_of_ranks(batch: Batch, world_size: int) -> None:
    """Groups are distributed to ranks, some of which may get none; sums are all-reduced."""
    groups = batch.rows_of_groups()
    nothing = torch.zeros(0, dtype=torch.long)
    shares = [torch.cat([nothing, *groups[rank::world_size]]) for rank in range(world_size)]
    check_pieces(batch, shares)


@properties
@given(st.lists(batches(), min_size=1, max_size=4))
def test_statistics_add_like_their_tensors(several: list[Batch]) -> None:
    parts = [batch.loss().statistics for batch in several]
    added = reduce(GroupStatistics.__add__, parts, GroupStatistics.zeros())
    check(added.to_tensor(), torch.stack([part.to_tensor() for part in parts]).sum(0))
    assert added.as_dict()["n_responses"] == sum(len(batch.seq) for batch in several)


def padded_loss(batch: Batch, width: int) -> Tensor:
    """(G,) group losses, computed on a padded (G, K) grid with a mask."""
    groups = batch.rows_of_groups()
    grid = torch.zeros(len(groups), width, dtype=torch.long)
    mask = torch.zeros(len(groups), width, dtype=torch.float64)
    for index, rows in enumerate(groups):
        grid[index, : len(rows)] = rows
        mask[index, : len(rows)] = 1.0
    k = mask.sum(1)
    f = mask if batch.weights is None else mask * batch.weights[grid]
    f = f * (k / f.sum(1))[:, None]
    log_ratio = (batch.seq - batch.ref)[grid]
    residual = batch.rewards[grid] - batch.beta * log_ratio
    mean = (f * residual).sum(1) / f.sum(1)
    squares = (f * (residual - mean[:, None]) ** 2).sum(1)
    mean_ratio = (f * log_ratio).sum(1) / f.sum(1)
    anchor = batch.anchor * k * batch.beta**2 / 2 * mean_ratio**2
    return (squares / 2 + anchor) / (k - 1)


@properties
@given(batches(), st.integers(0, 9))
def test_invariance_to_padding_of_k(batch: Batch, padding: int) -> None:
    widest = max(len(rows) for rows in batch.rows_of_groups())
    result = batch.loss()
    check(result.group_losses, padded_loss(batch, widest + padding))
    check(result.loss, result.group_losses.mean())


@properties
@given(batches(anchors=(0.0,)))
def test_weights_sum_to_zero_in_each_group(batch: Batch) -> None:
    result = batch.loss()
    for rows in batch.rows_of_groups():
        check(result.weights[rows].sum(), 0.0)


@properties
@given(batches())
def test_autograd_equals_the_closed_form(batch: Batch) -> None:
    result, gradient = batch.loss_and_gradient()
    k = (batch.group[:, None] == batch.group).double().sum(1)
    check(gradient, -batch.beta / (k - 1) * result.weights / result.n_groups)


def test_gradcheck() -> None:
    group = torch.tensor([3, 1, 3, 1, 1])
    generator = torch.Generator().manual_seed(0)
    seq, ref, rewards = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1])
    seq.requires_grad_()
    for anchor, factors in itertools.product((0.0, 0.7), (None, weights)):

        def loss(
            values: Tensor, anchor: float = anchor, factors: Tensor | None = factors
        ) -> Tensor:
            return gvpo_loss(
                values, ref, rewards, group, beta=0.5, anchor=anchor, response_weights=factors
            ).loss

        assert torch.autograd.gradcheck(loss, (seq,))
        assert torch.autograd.gradgradcheck(loss, (seq,))


@properties
@given(batches(anchors=(1.0,)))
def test_anchor_one_is_the_pmd_mean_loss(batch: Batch) -> None:
    """The loss is sum (R - mean R - beta l)^2 / (2 (k - 1)): only the rewards are centred."""
    batch = replace(batch, weights=None)
    result = batch.loss()
    for index, rows in enumerate(batch.rows_of_groups()):
        reward, log_ratio = batch.rewards[rows], batch.seq[rows] - batch.ref[rows]
        error = reward - reward.mean() - batch.beta * log_ratio
        check(result.group_losses[index], (error**2).sum() / (2 * (len(rows) - 1)))
        check(result.weights[rows], error)


@properties
@given(batches(), st.sampled_from([0.25, 1.0, 8.0]))
def test_equal_response_weights_are_none_exactly(batch: Batch, weight: float) -> None:
    plain, gradient = replace(batch, weights=None).loss_and_gradient()
    equal = replace(batch, weights=torch.full_like(batch.seq, weight))
    weighted, weighted_gradient = equal.loss_and_gradient()
    assert torch.equal(weighted.group_losses, plain.group_losses)
    assert torch.equal(weighted.weights, plain.weights)
    assert torch.equal(weighted_gradient, gradient)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_k_minus_one_makes_it_unbiased(k: int) -> None:
    """The expectation over all |Y|^k groups of a sampler is half the variance of the residual.

    It is the same for every k, so groups of different k estimate the same objective. With 1 / k it
    would be smaller by the factor (k - 1) / k, which this test would notice.
    """
    probs = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.2, -0.4], dtype=torch.float64)
    ref = torch.tensor([-1.0, -0.7, -1.9], dtype=torch.float64)
    seq = torch.tensor([-0.4, -1.7, -1.5], dtype=torch.float64, requires_grad=True)
    tuples = torch.tensor(list(itertools.product(range(3), repeat=k)))
    group = torch.arange(len(tuples)).repeat_interleave(k)
    flat = tuples.flatten()
    losses = gvpo_loss(seq[flat], ref[flat], rewards[flat], group, beta=0.5).group_losses
    expected = (probs[tuples].prod(1) * losses).sum()
    residual = rewards - 0.5 * (seq - ref)
    half_variance = (probs * (residual - (probs * residual).sum()) ** 2).sum() / 2
    check(expected.detach(), half_variance.detach())
    gradients = [torch.autograd.grad(value, seq)[0] for value in (expected, half_variance)]
    check(*gradients)
