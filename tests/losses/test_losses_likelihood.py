"""Metrics that count logged responses by what the reference finds likely."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.loss_batches import Batch, batches, properties
from torch import Tensor

from gvpo_offline.errors import DataError
from gvpo_offline.losses import GroupLoss, GroupStatistics, group_loss
from gvpo_offline.losses.likelihood import SLACK, log_likely_weights
from gvpo_offline.losses.terms import GroupTerms

LIKELY = ("likely_reward_mean", "likely_reweighted_reward_mean", "likely_log_mass_mean")
EVERY = ("group_reward_mean", "reweighted_reward_mean", "log_mass_mean")


def loss_of(
    per_token: list[float], tokens: list[int], log_ratios: list[float], rewards: list[float]
) -> GroupLoss:
    """The loss of one group, by the reference's log-probs per token."""
    counts = torch.tensor(tokens, dtype=torch.float64)
    ref = torch.tensor(per_token, dtype=torch.float64) * counts
    seq = ref + torch.tensor(log_ratios, dtype=torch.float64)
    group = torch.zeros(len(tokens)).long()
    return group_loss("gvpo", seq, ref, torch.tensor(rewards), group, beta=0.1, token_counts=counts)


def weights_of(per_token: list[float], tokens: list[int]) -> list[float]:
    result = loss_of(per_token, tokens, [0.0] * len(tokens), [0.0] * len(tokens))
    found: list[float] = log_likely_weights(result.terms).exp().tolist()
    return found


def test_the_weight_is_the_log_prob_that_is_missing_below_the_median() -> None:
    """The median of -1, -1.2, -1.4, -6 is -1.2, the more likely of the middle two; with a slack of
    2 nats per token the last lacks 6 - 3.2 = 2.8 nats in each of its 5 tokens.
    """
    assert SLACK == 2.0
    assert weights_of([-1.4, -6.0, -1.0, -1.2], [9, 5, 30, 7]) == pytest.approx(
        [1.0, math.exp(-14.0), 1.0, 1.0]
    )
    # Of two responses the median is the more likely one: 4 - 1 - 2 nats in each of 3 tokens.
    assert weights_of([-4.0, -1.0], [3, 50]) == pytest.approx([math.exp(-3.0), 1.0])
    assert weights_of([-4.0, -1.0, -9.0], [3, 50, 8]) == pytest.approx([1.0, 1.0, math.exp(-24.0)])


def test_a_response_gains_what_others_lose() -> None:
    """Ratios 8, 1/2, 1/2, 1 have the sum 10, above 4: the first is capped at 4 - 2 = 2. With the
    reward 1 for it and 0 for the others the reweighted mean is 2/4, and not 8/10.
    """
    ratios = [math.log(8.0), math.log(0.5), math.log(0.5), 0.0]
    found = loss_of([-1.0] * 4, [10] * 4, ratios, [1.0, 0.0, 0.0, 0.0]).metrics
    assert found["likely_reweighted_reward_mean"] == pytest.approx(0.5)
    assert found["reweighted_reward_mean"] == pytest.approx(0.8)
    assert found["likely_log_mass_mean"] == pytest.approx(math.log(10 / 4))  # not capped
    # Two above the cap: 8, 4, 1/2, 1/2 with the sum 13: 2 c + 1 = 4.
    ratios = [math.log(8.0), math.log(4.0), math.log(0.5), math.log(0.5)]
    found = loss_of([-1.0] * 4, [10] * 4, ratios, [1.0, 0.0, 0.0, 0.0]).metrics
    assert found["likely_reweighted_reward_mean"] == pytest.approx(1.5 / 4)


def test_a_mean_ratio_below_1_is_not_capped() -> None:
    """Ratios 2, 1/2, 1/4, 1/4 have the mean 3/4."""
    ratios = [math.log(own) for own in (2.0, 0.5, 0.25, 0.25)]
    found = loss_of([-1.0] * 4, [10] * 4, ratios, [1.0, 0.0, 0.0, 0.0]).metrics
    for weighted, plain in zip(LIKELY, EVERY, strict=True):
        assert found[weighted] == pytest.approx(found[plain])
    assert found["likely_reweighted_reward_mean"] == pytest.approx(2 / 3)
    assert found["likely_log_mass_mean"] == pytest.approx(math.log(0.75))


def test_an_unlikely_writer_neither_gains_nor_hides_a_loss() -> None:
    """Five answers of the policy at -1 nat per token, each losing 0.4 nats, and a person's text at
    -4, of reward 1, that gains 4.3 nats: -20 + 4.3 against the others.
    """
    found = loss_of([-1.0] * 5 + [-4.0], [20] * 6, [-0.4] * 5 + [4.3], [0.2] * 5 + [1.0]).metrics
    assert found["reweighted_reward_mean"] - found["group_reward_mean"] > 0.6
    assert found["log_mass_mean"] > 2.4
    assert found["likely_reweighted_reward_mean"] == pytest.approx(0.2, abs=1e-6)
    assert found["likely_reward_mean"] == pytest.approx(0.2, abs=1e-6)
    assert found["likely_log_mass_mean"] == pytest.approx(-0.4, abs=1e-6)
    assert found["likely_share"] == pytest.approx(5 / 6, abs=1e-6)


@properties
@given(batches(), st.floats(1.0, 30.0), st.integers(0, 2**31))
def test_laws_of_the_weights(batch: Batch, tokens: float, seed: int) -> None:
    """At least half of each group counts fully; at the reference both rewards are equal and the
    log-mass is 0; a group whose log-ratios are shifted keeps its weights; the order of rows is
    free; and the reweighted reward lies between the lowest and the highest reward.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = (tokens * (1 + torch.rand(len(batch.ref), generator=generator))).double()

    def result(seq: Tensor, rows: Tensor) -> GroupLoss:
        own = batch.take(rows)
        return group_loss(
            "gvpo",
            seq[rows],
            own.ref,
            own.rewards,
            own.group,
            beta=batch.beta,
            token_counts=counts[rows],
        )

    rows = torch.arange(len(batch.ref))
    found, still = result(batch.seq, rows), result(batch.ref, rows)
    weights = log_likely_weights(found.terms).exp()
    for own in batch.rows_of_groups():
        assert int((weights[own] == 1).sum()) * 2 >= len(own)
        assert bool((weights[own] <= 1).all())
    assert torch.equal(weights, log_likely_weights(still.terms).exp())
    at_reference = still.metrics
    assert at_reference["likely_log_mass_mean"] == pytest.approx(0.0, abs=1e-9)
    assert at_reference["likely_reweighted_reward_mean"] == pytest.approx(
        at_reference["likely_reward_mean"], rel=1e-9, abs=1e-9
    )
    shuffled = result(batch.seq, torch.randperm(len(rows), generator=generator)).metrics
    lowest, highest = float(batch.rewards.min()), float(batch.rewards.max())
    for name in (*LIKELY, "likely_share"):
        assert shuffled[name] == pytest.approx(found.metrics[name], rel=1e-6, abs=1e-9)
    reweighted = found.metrics["likely_reweighted_reward_mean"]
    assert lowest - 1e-9 <= reweighted <= highest + 1e-9


def test_extreme_log_ratios_stay_finite() -> None:
    """Ratios of e^900 and e^-900, which float64 cannot hold, in one group and in all of one."""
    for ratios, reweighted in (([900.0, -900.0], 1.0), ([-900.0, -900.0], 0.5), ([900.0] * 2, 0.5)):
        found = loss_of([-1.0, -1.0], [4, 4], ratios, [1.0, 0.0]).metrics
        assert found["likely_reweighted_reward_mean"] == pytest.approx(reweighted)
        assert found["likely_log_mass_mean"] == pytest.approx(found["log_mass_mean"])


def test_sums_of_two_calls_are_those_of_one() -> None:
    one = loss_of([-1.0, -4.0], [5, 5], [0.2, 3.0], [0.0, 1.0]).statistics
    two = loss_of([-2.0, -9.0, -1.0], [5, 6, 7], [0.2, 3.0, -1.0], [0.0, 1.0, 0.5]).statistics
    both = GroupStatistics.from_tensor((one + two).to_tensor()).metrics()
    for name in LIKELY:
        assert both[name] == pytest.approx((one.metrics()[name] + two.metrics()[name]) / 2)


def test_without_token_counts_every_response_counts_alike() -> None:
    ref = torch.tensor([-1.0, -90.0])
    terms = GroupTerms.build(ref, ref, torch.tensor([0.0, 1.0]), torch.tensor([0, 0]), beta=1.0)
    assert log_likely_weights(terms).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [0.5, -1.0, math.nan])
def test_token_counts_are_at_least_1(bad: float) -> None:
    ref = torch.tensor([-1.0, -2.0, -3.0])
    with pytest.raises(DataError, match="token_counts are at least 1") as caught:
        group_loss(
            "gvpo",
            ref,
            ref,
            torch.tensor([0.0, 1.0, 2.0]),
            torch.tensor([7, 7, 7]),
            beta=1.0,
            token_counts=torch.tensor([3.0, bad, 2.0]),
        )
    assert (caught.value.row, caught.value.group) == (1, "7")
