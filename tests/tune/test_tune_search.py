"""The search for beta and learning rate, on made-up worlds whose best is known."""

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
    """What was tried, and what is proposed, where the reward is best at a rate and a beta.

    The log-mass is lost at betas under 1 / `widest`. The range run said 1e-3.
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

    found = propose(trial, betas=[0.5, 0.25, 0.125, 1.0], begin=0.25, largest_rate=1e-3, steps=50)
    return asked, found


def test_the_rate_first_then_the_neighbouring_betas() -> None:
    """1/30, 1/10 and 1/3 of 1e-3 at the middle beta; 1/10 is best, and so is the middle beta."""
    asked, found = world(1e-4, 0.25)
    assert asked == [(0.25, 3.2e-5), (0.25, 1e-4), (0.25, 3.2e-4), (0.125, 1e-4), (0.5, 1e-4)]
    assert (found.beta, found.learning_rate) == (0.25, 1e-4)
    assert [(t.beta, t.learning_rate) for t in found.trials] == asked
    assert found.chosen.metrics["reweighted_reward_mean"] == pytest.approx(100)


def test_the_search_goes_on_past_an_edge() -> None:
    """Two rates below the lowest of three; two betas above, and the rates around once more."""
    asked, found = world(3.2e-6, 1.0)
    assert [rate for beta, rate in asked[:6]] == [3.2e-5, 1e-4, 3.2e-4, 1e-5, 3.2e-6, 1e-6]
    assert asked[6:] == [(0.125, 3.2e-6), (0.5, 3.2e-6), (1.0, 3.2e-6), (1.0, 1e-6), (1.0, 1e-5)]
    assert (found.beta, found.learning_rate) == (1.0, 3.2e-6)
    assert world(3e-3, 0.25)[1].learning_rate == 3.2e-3  # and above the range run's


@settings(deadline=None, max_examples=40)
@given(st.floats(-6.9, -2.1), st.sampled_from([0.125, 0.25, 0.5, 1.0]))
def test_the_best_is_found_wherever_it_lies(power: float, beta: float) -> None:
    """Within half a rung (a quarter of a decade) and the rounding of two digits; none is asked
    twice.
    """
    asked, found = world(10**power, beta)
    assert found.beta == beta
    assert abs(math.log10(found.learning_rate) - power) < 0.25 + 0.03
    assert len(asked) == len(set(asked))


def test_probability_that_leaves_the_log_is_no_gain() -> None:
    """The reward is best at 0.125, where the mass is lost; 0.25 keeps it."""
    assert world(1e-4, 0.125)[1].beta == 0.125
    assert world(1e-4, 0.125, widest=4)[1].beta == 0.25


def test_one_beta_is_settled() -> None:
    def trial(beta: float, rate: float, steps: int) -> Mapping[str, float]:
        return {"mine": -(math.log10(rate / 1e-5) ** 2)}

    found = propose(
        trial,
        betas=[0.3],
        begin=0.3,
        largest_rate=1e-4,
        steps=5,
        score=lambda metrics: metrics["mine"],
    )
    assert (found.beta, found.learning_rate) == (0.3, 1e-5)


def test_runs_that_diverge_lose_to_any_other_and_all_of_them_are_an_error() -> None:
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

    found = propose(trial, betas=[0.3], begin=0.3, largest_rate=1e-4, steps=5)
    assert found.learning_rate == 1e-6
    with pytest.raises(ConfigError, match="finite at some learning rate"):
        propose(lambda *_: nothing, betas=[0.3], begin=0.3, largest_rate=1e-4, steps=5)


def test_a_range_run_of_another_loss_watches_that_loss() -> None:
    metrics = {"loss": 3.0, "explained_variance": 0.25}
    assert misfit(metrics, "gvpo") == 0.75
    assert misfit(metrics, "dpo") == 3.0


def test_score_is_the_gain_on_the_probability_that_was_kept() -> None:
    """From 0.2: 0.3 gained with e^-0.5 kept is 0.18; 0.5 with e^-2 0.07; more than all is all."""

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
    """A gap of 2: 16 to 1 nats ask for 0.125 to 2, two for each doubling; 4 nats come first."""
    assert beta_candidates(2.0) == (0.12, 0.18, 0.25, 0.35, 0.5, 0.71, 1.0, 1.4, 2.0)
    assert initial_beta(beta_candidates(2.0), 2.0) == 0.5
    assert initial_beta([0.1, 0.7, 3.0], 2.0) == 0.7  # as ratios to 0.5: 5, 1.4, 6
    for gap in (math.nan, 0.0, math.inf):
        with pytest.raises(DataError, match="unequal"):
            beta_candidates(gap)


# ---- the range run ----


def points(misfits: list[float]) -> list[RangePoint]:
    return [RangePoint(range_rate(i, 100), own) for i, own in enumerate(misfits)]


def test_rates_rise_from_the_lowest_to_the_highest() -> None:
    assert [range_rate(step, 6) for step in range(6)] == pytest.approx(
        [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2]
    )


def test_the_largest_usable_rate_is_the_last_that_fits_as_it_began() -> None:
    """Flat at 1, down by 0.02 a step from 40 on, up by 0.1 from 60 on, past 1 at 66: the mean of
    five passes it at 68.
    """
    down = [1.0] * 40 + [1.0 - 0.02 * i for i in range(20)]
    up = [0.6 + 0.1 * i for i in range(40)]
    found = points(down + up)
    # Steps 62..66 are 0.8 .. 1.2, mean 1.0; 63..67 are above the slack.
    assert largest_usable_rate(found) == pytest.approx(range_rate(66, 100), rel=0.05)
    # Past 1.5 in the mean of five from 72 on: 68..72 are 1.4 .. 1.8.
    ends = [n for n in range(1, 101) if diverged(found[:n])]
    assert ends == list(range(73, 101))


def test_noise_is_not_divergence() -> None:
    """A loss of 0.1 in the mean, give or take 1, that nothing moves: usable to the end."""
    noisy = points([0.1 + (-1.0) ** step for step in range(100)])
    assert not any(diverged(noisy[:n]) for n in range(101))
    assert largest_usable_rate(noisy) == 1e-2


def test_steps_that_say_nothing_are_left_out_and_infinity_ends_it() -> None:
    told = points([1.0] * 30)
    assert not diverged([*told, RangePoint(1e-3, math.nan)])
    assert diverged([*told, RangePoint(1e-3, math.inf)])
    assert largest_usable_rate([*told, RangePoint(1e-3, math.inf)]) == pytest.approx(
        range_rate(29, 100), rel=0.05
    )
    assert not diverged([])
    with pytest.raises(ConfigError, match="needs steps with a measured misfit"):
        largest_usable_rate([RangePoint(1e-3, math.nan)])
