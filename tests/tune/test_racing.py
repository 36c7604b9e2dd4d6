"""Answers are spent where trials are hard to tell apart, on simulated policies of known value."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.sampled_eval.result import Estimate
from gvpo_offline.tune import PromptEstimates, SampleBudget
from gvpo_offline.tune.racing import Race, difference, is_above

PROMPTS = 50
NOISE = 0.3  # deviation of one answer's reward


class Policies:
    """Policies of known values whose answers have normal rewards; counts answers per prompt."""

    def __init__(self, values: list[float], *, seed: int = 0, kls: list[float] | None = None):
        generator = np.random.default_rng(seed)
        self.difficulty_P = generator.normal(0, 1, PROMPTS)
        self.noise = generator.normal(0, NOISE, (len(values), 64, PROMPTS))
        self.values, self.kls = values, kls or [0.0] * len(values)
        self.asked: dict[int, int] = {}
        self.released: list[int] = []

    def judge(self, handle: int, n: int) -> PromptEstimates:
        assert n > self.asked.get(handle, 0)
        self.asked[handle] = n
        drawn_P = self.noise[handle, :n].mean(0)
        return PromptEstimates(
            self.difficulty_P + self.values[handle] + drawn_P, np.full(PROMPTS, self.kls[handle])
        )

    def race(self, budget: SampleBudget, beta: float = 0.1) -> Race[int]:
        race = Race(self.judge, beta=beta, budget=budget, release=self.released.append)
        for handle in range(len(self.values)):
            race.enter(handle)
        return race


def test_the_error_of_a_paired_difference_is_without_the_difficulty_of_prompts() -> None:
    """Prompts differ by far more than policies: 0, 10, 20. One policy is better by 1, 2 and 3: mean
    2, deviation 1, standard error 1/sqrt(3). A prompt for which one has no number is not counted.
    """
    base_P = np.array([0.0, 10.0, 20.0, 30.0])
    better_P = base_P + np.array([1.0, 2.0, 3.0, math.nan])
    race = Race(
        lambda rewards_P, n: PromptEstimates(rewards_P, np.zeros(4)),
        beta=0.5,
        budget=SampleBudget(1, 1),
    )
    one, other = race.enter(better_P), race.enter(base_P)
    found = difference(one, other, 0.5)
    assert found is not None
    assert (found.mean, found.n) == (2.0, 3)
    assert found.se == pytest.approx(1 / math.sqrt(3))
    assert is_above(found, 2)
    assert not is_above(found, 4)


def test_the_kl_is_charged_at_one_beta() -> None:
    """Rewards 1, 0.7 with a KL of 4 and 0 nats: 0.6 and 0.7 at beta 0.1, 0.92 and 0.7 at 0.02."""
    for beta, best in ((0.1, 1), (0.02, 0)):
        policies = Policies([1.0, 0.7], kls=[4.0, 0.0])
        race = policies.race(SampleBudget(64, 64), beta)
        assert race.finish().handle == best


def test_trials_far_apart_get_the_fewest_answers_and_near_ties_the_most() -> None:
    """The standard error of a difference from 4 answers is 0.3 sqrt(2/4/50) = 0.03, so 0.5 is seen
    at the first look. Policies of equal value are never told apart for good.
    """
    policies = Policies([0.0, 0.5, 0.0])
    assert policies.race(SampleBudget(4, 64)).finish().handle == 1
    assert policies.asked == {0: 4, 1: 4, 2: 4}
    assert sorted(policies.released) == [0, 2]

    policies = Policies([0.0, 0.5, 0.5])
    policies.noise[2] = policies.noise[1][::-1]  # the means of all 64 answers are equal
    policies.race(SampleBudget(4, 64)).finish()
    assert policies.asked[0] == 4
    assert policies.asked[1] == policies.asked[2] == 64


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0, 0.6), min_size=2, max_size=12),
    st.integers(0, 10**6),
    st.sampled_from([(1, 1), (2, 16), (8, 64), (3, 50)]),
)
def test_the_cost_is_bounded_and_what_is_left_is_said(
    values: list[float], seed: int, samples: tuple[int, int]
) -> None:
    """No trial gets fewer or more answers than the budget says. At the end the best one is apart
    from all others by two standard errors, or it and all that are not apart have the most.
    """
    fewest, most = samples
    policies = Policies(values, seed=seed)
    race = policies.race(SampleBudget(fewest, most))
    best = race.finish()
    assert all(fewest <= n <= most for n in policies.asked.values())
    for own in race.contenders:
        found = difference(best, own, 0.1)
        assert found is not None
        assert found.mean >= 0
        if own is not best and not is_above(found, 2):
            assert own.samples == best.samples == most


def test_the_best_is_found_with_the_stated_probability() -> None:
    """Six policies, the best by 0.06. The standard error of a difference is 0.3 sqrt(2/n/50), 0.06
    sqrt(1/n): 0.021 at n = 8 and 0.0075 at 64. The best is lost at a look only if it is behind
    another by 2 se where it is ahead by 0.06, at n = 8 with probability P(Z > 2 + 2.8) each, about
    1e-6; at the end, if another leads, P(Z > 8). In truth equal trials are dropped with a
    probability of 2.3% at each look: that only spares answers.
    """
    right = 0
    for seed in range(100):
        policies = Policies([0.0, 0.3, 0.36, 0.3, 0.2, 0.3], seed=seed)
        right += policies.race(SampleBudget(8, 64)).finish().handle == 2
        # 0.36 against 0.3 is apart at n = 8 with probability P(Z > 2 - 2.8), 0.8; few go on.
        assert sum(policies.asked.values()) < 6 * 64
    assert right == 100


def test_equal_estimates_are_resolved_towards_the_smaller_kl_and_then_the_earlier() -> None:
    """Rewards 0.8, 0.9, 0.8 and KL 0, 1, 0 at beta 0.1: all 0.8 (in numbers that are exact)."""
    policies = Policies([0.75, 1.0, 0.75], kls=[0.0, 0.5, 0.0])
    policies.noise[:] = 0
    policies.difficulty_P[:] = 0
    race = policies.race(SampleBudget(1, 4), beta=0.5)
    assert race.finish() is race.contenders[0]
    assert policies.asked == {0: 4, 1: 4, 2: 4}


def test_a_decision_of_the_search_doubles_the_answers_of_close_trials_only() -> None:
    """Of 0.5, 0.5 and 0.0 the first two are close. Among trials that a better one beats, no answers
    are spent.
    """
    policies = Policies([0.5, 0.5, 0.0])
    policies.noise[1] = policies.noise[0]
    race = policies.race(SampleBudget(4, 64))
    race.better(race.contenders)
    assert policies.asked == {0: 8, 1: 8, 2: 4}

    policies = Policies([0.9, 0.5, 0.5])
    policies.noise[2] = policies.noise[1]
    race = policies.race(SampleBudget(4, 64))
    race.better(race.contenders[1:])
    assert policies.asked == {0: 4, 1: 4, 2: 4}


def test_a_released_trial_is_not_asked_again_for_a_decision_between_others() -> None:
    """The first 4 answers put the trials at 0.5, 0.4 and 0.35. The second is not apart from
    the first; the third is close to the second, and the first beats it. A decision between the last
    two spends no answers on it.
    """
    policies = Policies([0.5, 0.4, 0.35])
    policies.noise[:] = 0
    policies.noise[1] = np.where(np.arange(PROMPTS) % 2, 0.4, -0.4)  # difference: 0.1, se 0.057
    policies.noise[2] = np.where(np.arange(PROMPTS) % 4 < 2, 0.4, -0.4)  # 0.05, se 0.081; 0.15
    race = policies.race(SampleBudget(4, 64))
    assert policies.released == [2]
    race.better(race.contenders[1:])
    assert policies.asked == {0: 4, 1: 4, 2: 4}


def test_a_beaten_trial_comes_back_if_the_best_was_lucky() -> None:
    """After 4 answers the first and the third policy look better by 1 than they are after 8. The
    second, which was released, then leads with 0.6 against 0.58, and both get all answers.
    """
    policies = Policies([0.58, 0.6, 0.53])
    policies.noise[:] = np.where(np.arange(PROMPTS) % 2, 0.1, -0.1)
    policies.noise[1:] *= -1
    policies.noise[0, :4] += 1.0
    policies.noise[0, 4:8] -= 1.0
    policies.noise[2, :4] += 1.0
    policies.noise[2, 4:8] -= 1.0
    race = policies.race(SampleBudget(4, 64))
    assert race.finish().handle == 1
    assert 1 in policies.released
    assert policies.asked == {0: 64, 1: 64, 2: 8}


def test_a_diverged_trial_loses_and_is_never_judged() -> None:
    policies = Policies([0.1, 0.2])
    race = policies.race(SampleBudget(2, 8))
    diverged = race.enter(None)
    assert race.finish().handle == 1
    assert (diverged.samples, diverged.mean(0.1)) == (0, -math.inf)


def test_a_trial_without_any_scored_answer_loses() -> None:
    nothing_P = np.full(3, math.nan)
    race = Race(
        lambda rewards_P, n: PromptEstimates(rewards_P, np.zeros(3), failed=3 * n),
        beta=0.1,
        budget=SampleBudget(1, 8),
    )
    race.enter(nothing_P)
    better = race.enter(np.array([0.1, 0.2, 0.1]))
    assert race.finish() is better
    assert [own.samples for own in race.contenders] == [1, 1]


def test_a_trial_gains_nothing_by_prompts_without_a_number() -> None:
    """Its answers to the difficult prompt cannot be scored. On the other two it is worse by 0.1 and
    0.2, though its mean, 0.75, is above the 0.9 * 2 / 3 = 0.6 of the trial that answers all. Both
    orders of entering give the same.
    """
    all_P, some_P = np.array([0.9, 0.9, 0.0]), np.array([0.8, 0.7, math.nan])
    for entering in ((all_P, some_P), (some_P, all_P)):
        race = Race(
            lambda rewards_P, n: PromptEstimates(rewards_P, np.zeros(3)),
            beta=0.1,
            budget=SampleBudget(1, 8),
        )
        both = [race.enter(rewards_P) for rewards_P in entering]
        assert race.best(both).handle is all_P
        assert race.finish().handle is all_P


def test_bad_budgets_and_estimates_are_refused() -> None:
    for fewest, most in ((0, 4), (8, 4)):
        with pytest.raises(ConfigError, match="1 <= fewest <= most"):
            SampleBudget(fewest, most)
    race = Race(
        lambda count, n: PromptEstimates(np.zeros(count), np.zeros(count)),
        beta=0.1,
        budget=SampleBudget(1, 1),
    )
    race.enter(3)
    with pytest.raises(DataError, match="the same prompts"):
        race.enter(4)
    alone = Race(
        lambda count, n: PromptEstimates(np.zeros(count), np.zeros(count)),
        beta=0.1,
        budget=SampleBudget(1, 1),
    )
    with pytest.raises(DataError, match="at least 2"):
        alone.enter(1)
    found = Estimate.of(np.array([math.nan]))
    assert (found.n, math.isnan(found.mean)) == (0, True)
