"""The search for beta and learning rate, on simulated trials whose optimum is known."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.tune import (
    Proposal,
    RangePoint,
    beta_candidates,
    diverged,
    initial_beta,
    largest_usable_rate,
    misfit,
    propose,
    range_rate,
    score,
)


def world(
    best_rate: float, best_beta: float, *, widest: float = math.inf
) -> tuple[list[tuple[float, float]], Proposal]:
    """The trials and the proposal of a search whose score is best at `best_rate` and `best_beta`.

    Betas below 1 / `widest` lose log-mass. The largest usable learning rate is 1e-3.
    """
    asked: list[tuple[float, float]] = []

    def trial(beta: float, rate: float, steps: int) -> Mapping[str, float]:
        assert steps == 50
        asked.append((beta, rate))
        return {
            "reweighted_reward_mean": 100
            - math.log2(beta / best_beta) ** 2
            - math.log10(rate / best_rate) ** 2,
            "group_reward_mean": 0.0,
            "log_mass_mean": -3.0 if beta * widest < 1 else 0.0,
        }

    found = propose(
        trial, betas=[0.5, 0.25, 0.125, 1.0], initial_beta=0.25, largest_rate=1e-3, steps=50
    )
    return asked, found


def test_the_rate_first_then_the_neighbouring_betas() -> None:
    """1/30, 1/10 and 1/3 of 1e-3 at beta 0.25: 1/10 is best. Of the neighbouring betas, 0.25 is
    best.
    """
    asked, found = world(1e-4, 0.25)
    assert asked == [(0.25, 3.2e-5), (0.25, 1e-4), (0.25, 3.2e-4), (0.125, 1e-4), (0.5, 1e-4)]
    assert (found.beta, found.learning_rate) == (0.25, 1e-4)
    assert [(t.beta, t.learning_rate) for t in found.trials] == asked
    assert found.chosen.metrics["reweighted_reward_mean"] == pytest.approx(100)


def test_the_search_continues_beyond_an_end() -> None:
    """The best learning rate is two grid points below the first three, and the best beta two above
    the initial one; then the neighbouring learning rates are tried at that beta.
    """
    asked, found = world(3.2e-6, 1.0)
    assert [rate for beta, rate in asked[:6]] == [3.2e-5, 1e-4, 3.2e-4, 1e-5, 3.2e-6, 1e-6]
    assert asked[6:] == [(0.125, 3.2e-6), (0.5, 3.2e-6), (1.0, 3.2e-6), (1.0, 1e-6), (1.0, 1e-5)]
    assert (found.beta, found.learning_rate) == (1.0, 3.2e-6)
    assert world(3e-3, 0.25)[1].learning_rate == 3.2e-3  # above the largest usable rate


@settings(deadline=None, max_examples=40)
@given(st.floats(-6.9, -2.1), st.sampled_from([0.125, 0.25, 0.5, 1.0]))
def test_the_best_is_found_wherever_it_lies(power: float, beta: float) -> None:
    """The error is at most half a grid step, a quarter of a decade, plus rounding to two digits. No
    trial runs twice.
    """
    asked, found = world(10**power, beta)
    assert found.beta == beta
    assert abs(math.log10(found.learning_rate) - power) < 0.25 + 0.03
    assert len(asked) == len(set(asked))


def test_a_gain_with_lost_log_mass_is_not_proposed() -> None:
    """The reward is best at beta 0.125, where log-mass is lost; beta 0.25 keeps it."""
    assert world(1e-4, 0.125)[1].beta == 0.125
    assert world(1e-4, 0.125, widest=4)[1].beta == 0.25


def test_with_one_beta_only_the_rate_is_searched() -> None:
    def trial(beta: float, rate: float, steps: int) -> Mapping[str, float]:
        return {"mine": -(math.log10(rate / 1e-5) ** 2)}

    found = propose(
        trial,
        betas=[0.3],
        initial_beta=0.3,
        largest_rate=1e-4,
        steps=5,
        score=lambda metrics: metrics["mine"],
    )
    assert (found.beta, found.learning_rate) == (0.3, 1e-5)


def test_diverged_trials_have_the_lowest_score_and_raise_if_there_are_no_others() -> None:
    nothing = dict.fromkeys(
        ("reweighted_reward_mean", "group_reward_mean", "log_mass_mean"), math.nan
    )

    def trial(beta: float, rate: float, steps: int) -> Mapping[str, float]:
        if rate > 2e-6:
            return nothing
        return {
            "reweighted_reward_mean": -5e-6 / rate,
            "group_reward_mean": 0.0,
            "log_mass_mean": 0.0,
        }

    found = propose(trial, betas=[0.3], initial_beta=0.3, largest_rate=1e-4, steps=5)
    assert found.learning_rate == 1e-6
    with pytest.raises(ConfigError, match="finite at some learning rate"):
        propose(lambda *_: nothing, betas=[0.3], initial_beta=0.3, largest_rate=1e-4, steps=5)


def test_the_misfit_of_other_losses_is_the_loss() -> None:
    metrics = {"loss": 3.0, "explained_variance": 0.25}
    assert misfit(metrics, "gvpo") == 0.75
    assert misfit(metrics, "dpo") == 3.0


def test_score_is_the_gain_times_the_share_of_kept_probability() -> None:
    """The reference has 0.2. A gain of 0.3 with a share of e^-0.5 scores 0.18; a gain of 0.5 with
    e^-2 scores 0.07. A share above 1 counts as 1.
    """

    def scored(reward: float, mass: float, shift: float = 0.0) -> float:
        metrics = {
            "reweighted_reward_mean": reward + shift,
            "group_reward_mean": 0.2 + shift,
            "log_mass_mean": mass,
        }
        return score(metrics)

    assert scored(0.5, -0.5) == pytest.approx(0.3 * math.exp(-0.5))
    assert scored(0.5, -0.5) > scored(0.7, -2.0)
    assert scored(0.5, 2.0) == scored(0.5, 0.0) == pytest.approx(0.3)
    assert scored(0.5, -0.5, shift=7.0) == pytest.approx(scored(0.5, -0.5))
    assert scored(0.5, math.nan) == -math.inf


# ---- from the data ----


def test_candidates_are_the_gap_over_nats() -> None:
    """With a reward gap of 2, gaps of 16 to 1 nats give betas of 0.125 to 2, with a ratio of
    sqrt(2). The search starts at 4 nats.
    """
    assert beta_candidates(2.0) == (0.12, 0.18, 0.25, 0.35, 0.5, 0.71, 1.0, 1.4, 2.0)
    assert initial_beta(beta_candidates(2.0), 2.0) == 0.5
    assert initial_beta([0.1, 0.7, 3.0], 2.0) == 0.7  # ratios to 0.5: 5, 1.4, 6
    for gap in (math.nan, 0.0, math.inf):
        with pytest.raises(DataError, match="unequal"):
            beta_candidates(gap)


# ---- the learning-rate range test ----


def points(misfits: list[float]) -> list[RangePoint]:
    return [RangePoint(range_rate(i, 100), own) for i, own in enumerate(misfits)]


def test_rates_rise_from_the_lowest_to_the_highest() -> None:
    assert [range_rate(step, 6) for step in range(6)] == pytest.approx(
        [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2]
    )


def test_the_largest_usable_rate_is_the_last_with_the_initial_misfit() -> None:
    """The misfit is 1 up to step 40, falls by 0.02 per step up to step 60, then rises by 0.1 per
    step from 0.6 and reaches 1 at step 64. The mean of the last five steps is 1 at step 66.
    """
    down = [1.0] * 40 + [1.0 - 0.02 * i for i in range(20)]
    up = [0.6 + 0.1 * i for i in range(40)]
    found = points(down + up)
    # Steps 62..66 are 0.8 .. 1.2 with mean 1.0; the mean of 63..67 is above 1.01.
    assert largest_usable_rate(found) == pytest.approx(range_rate(66, 100), rel=0.05)
    # The mean exceeds 1.5 from step 72 on: steps 68..72 are 1.4 .. 1.8 with mean 1.6.
    ends = [n for n in range(1, 101) if diverged(found[:n])]
    assert ends == list(range(73, 101))


def test_noise_is_not_divergence() -> None:
    """A loss that alternates between -0.9 and 1.1 at every learning rate: all are usable."""
    noisy = points([0.1 + (-1.0) ** step for step in range(100)])
    assert not any(diverged(noisy[:n]) for n in range(101))
    assert largest_usable_rate(noisy) == 1e-2


def test_nan_is_ignored_and_infinity_is_divergence() -> None:
    told = points([1.0] * 30)
    assert not diverged([*told, RangePoint(1e-3, math.nan)])
    assert diverged([*told, RangePoint(1e-3, math.inf)])
    assert largest_usable_rate([*told, RangePoint(1e-3, math.inf)]) == pytest.approx(
        range_rate(29, 100), rel=0.05
    )
    assert not diverged([])
    with pytest.raises(ConfigError, match="needs steps with a measured misfit"):
        largest_usable_rate([RangePoint(1e-3, math.nan)])
