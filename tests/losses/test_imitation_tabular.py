"""What imitation does to the optimum, where it is known: the setting of `tabular`."""

from __future__ import annotations

import pytest
import torch
from tabular import BETA, Log, World, draw_log, make_world, train
from torch import Tensor

from gvpo_offline.losses import GroupLoss, group_loss


def loss_at(world: World, log: Log, logprobs: Tensor, alpha: float) -> GroupLoss:
    """GVPO with imitation of a table of log-probs."""
    return group_loss(
        "gvpo",
        log.take(logprobs),
        log.take(world.ref_logprobs),
        log.take(world.rewards),
        log.group,
        beta=BETA,
        imitation=alpha,
    )


def trained(world: World, log: Log, alpha: float, *, steps: int = 400) -> Tensor:
    def objective(seq_logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, log: Log) -> Tensor:
        how = {"beta": BETA, "imitation": alpha}
        return group_loss("gvpo", seq_logprobs, ref_logprobs, rewards, log.group, **how).loss

    return train(world, log, objective, steps=steps)


def test_the_stationary_point() -> None:
    """W(y) = alpha (s pi(y) - v(y)), the equation in `losses.imitation`, at the end of training.

    W(y) is the sum over a prompt's groups of sum_{i: y_i = y} w_i / (k - 1), v(y) the sum of the
    D q of y, and s the sum of v. Both sides are sums over the groups, here divided by s. The
    equation is the gradient in the logits divided by beta: training leaves 1e-3 of its size, the
    largest of |alpha (pi - v / s)|.
    """
    alpha, world = 1.0, make_world(0)
    log = draw_log(world, "uniform", groups_per_prompt=50)
    logprobs = trained(world, log, alpha, steps=1200)
    result = loss_at(world, log, logprobs, 0.0)
    terms = loss_at(world, log, logprobs, alpha).terms
    assert terms.imitated_N is not None
    assert terms.imitation_G is not None
    shares_N = terms.imitation_G[terms.group_N] / alpha * terms.imitated_N
    parts_N = result.weights / (terms.group_sizes_G[terms.group_N] - 1)
    left, imitated = (
        torch.zeros_like(logprobs).index_put((log.prompt, log.response), values, accumulate=True)
        for values in (parts_N, shares_N)
    )
    total = imitated.sum(1, keepdim=True)
    right = alpha * (total * logprobs.exp() - imitated)
    assert float(((left - right) / total).abs().max()) < 1e-3 * float((right / total).abs().max())


def test_more_imitation_ends_further_from_the_optimum() -> None:
    """KL to the optimum rises with alpha; at 0 the gate of 1% of the untouched KL is passed."""
    world = make_world(1)
    log = draw_log(world, "mixed", groups_per_prompt=100)
    ends = [world.kl_to_optimum(trained(world, log, alpha)) for alpha in (0.0, 0.1, 1.0)]
    assert ends == sorted(ends)
    untouched = world.kl_to_optimum(world.ref_logprobs)
    assert ends[0] < 0.01 * untouched < ends[-1]


def test_imitation_takes_probability_from_what_was_never_logged() -> None:
    """Of three responses the first is never logged. Without imitation it keeps its probability, for
    the squares say nothing of it; with any alpha > 0 it has none in the end.
    """
    ref, rewards = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 0.5]]).double()[:, None]
    world = World(0, ref.log(), rewards)
    log = Log(torch.tensor([0, 0]), torch.tensor([1, 2]), torch.tensor([0, 0]))
    plain, imitating = (trained(world, log, alpha, steps=1000).exp() for alpha in (0.0, 0.05))
    gap = 0.5 / BETA
    ratio = float((plain[0, 2] / plain[0, 1]).log())
    assert ratio == pytest.approx(gap, abs=1e-3)
    assert float(plain[0, 0]) > 0.4
    assert float(imitating[0, 0]) < 0.05
