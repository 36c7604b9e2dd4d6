"""Random batches of whole groups, and comparison of results on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from gvpo_offline.losses import GroupLoss, GroupStatistics, gvpo_loss

ATOL = 1e-10


@dataclass(frozen=True)
class Batch:
    """Inputs of one call of a loss; every tensor is (N,)."""

    seq: Tensor
    ref: Tensor
    rewards: Tensor
    group: Tensor
    beta: float
    anchor: float
    weights: Tensor | None

    def take(self, rows: Tensor) -> Batch:
        weights = None if self.weights is None else self.weights[rows]
        return replace(
            self,
            seq=self.seq[rows],
            ref=self.ref[rows],
            rewards=self.rewards[rows],
            group=self.group[rows],
            weights=weights,
        )

    def loss(self, seq: Tensor | None = None) -> GroupLoss:
        return gvpo_loss(
            self.seq if seq is None else seq,
            self.ref,
            self.rewards,
            self.group,
            beta=self.beta,
            anchor=self.anchor,
            response_weights=self.weights,
        )

    def loss_and_gradient(self) -> tuple[GroupLoss, Tensor]:
        seq = self.seq.clone().requires_grad_()
        result = self.loss(seq)
        (gradient,) = torch.autograd.grad(result.loss, seq)
        return result, gradient

    def rows_of_groups(self) -> list[Tensor]:
        return [(self.group == name).nonzero()[:, 0] for name in torch.unique(self.group)]


@st.composite
def batches(draw: st.DrawFn, anchors: tuple[float, ...] = (0.0, 0.3, 1.0)) -> Batch:
    """One to six groups of two to seven rows: any order, any ids, ties, optional weights."""
    sizes = draw(st.lists(st.integers(2, 7), min_size=1, max_size=6))
    ids = draw(
        st.lists(
            st.integers(-(2**62), 2**62), min_size=len(sizes), max_size=len(sizes), unique=True
        )
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n_rows = sum(sizes)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(n_rows, generator=generator, dtype=torch.float64)

    ref = -50 + normal(20)
    rewards = normal(draw(st.sampled_from([0.1, 1.0, 10.0])))
    if draw(st.booleans()):
        rewards = rewards.round()  # ties, and groups of equal rewards
    seq = ref + normal(draw(st.sampled_from([0.0, 0.1, 3.0])))
    weights = 0.1 + normal(1).abs() if draw(st.booleans()) else None
    group = torch.tensor(ids).repeat_interleave(torch.tensor(sizes))
    beta = draw(st.sampled_from([0.05, 0.5, 2.0]))
    batch = Batch(seq, ref, rewards, group, beta, draw(st.sampled_from(anchors)), weights)
    return batch.take(torch.randperm(n_rows, generator=generator))


def check(a: Tensor | float, b: Tensor | float) -> None:
    """Assert equality up to float64 rounding."""
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64),
        torch.as_tensor(b, dtype=torch.float64),
        rtol=1e-9,
        atol=ATOL,
        equal_nan=True,
    )


def check_metrics(a: GroupStatistics, b: GroupStatistics) -> None:
    check(a.to_tensor(), b.to_tensor())
    ours, theirs = a.metrics(), b.metrics()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        # The square root of a difference of sums: rounding of 1e-16 becomes 1e-8.
        assert value == pytest.approx(theirs[name], rel=1e-6, abs=1e-5, nan_ok=True), name


properties = settings(max_examples=60, deadline=None)
