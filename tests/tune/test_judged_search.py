"""The search by sampled answers, on simulated policies whose best settings are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo_offline.errors import ConfigError
from gvpo_offline.tune import (
    JudgedProposal,
    LossCandidates,
    PromptEstimates,
    SampleBudget,
    TrialSettings,
    propose_judged,
)

PROMPTS, UNTOUCHED = 60, -1


@dataclass
class World:
    """Objectives that are parabolas in the logarithms of the settings.

    Attributes:
        peaks: by loss, the best rate, the best imitation (0: none is best), the best beta and the
            objective there.
        untouched: objective of the policy before training.
        noise: deviation of the reward of one answer.
        seed: of the rewards.
        largest: learning rate above which training diverges.
    """

    peaks: dict[str, tuple[float, float, float, float]]
    untouched: float = 0.0
    noise: float = 0.0
    seed: int = 0
    largest: float = math.inf
    tried: list[TrialSettings] = field(default_factory=list)
    asked: dict[int, int] = field(default_factory=dict)
    released: list[int] = field(default_factory=list)

    def value(self, own: TrialSettings) -> float:
        rate, imitation, beta, height = self.peaks[own.loss_type]
        off = math.log10(own.learning_rate / rate) ** 2
        off += math.log10((own.imitation + 0.1) / (imitation + 0.1)) ** 2
        return height - 0.3 * off - 0.1 * math.log2(own.beta / beta) ** 2

    def trial(self, own: TrialSettings) -> int | None:
        self.tried.append(own)
        return None if own.learning_rate > self.largest else len(self.tried) - 1

    def judge(self, handle: int, n: int) -> PromptEstimates:
        assert n > self.asked.get(handle, 0)
        self.asked[handle] = n
        value = self.untouched if handle == UNTOUCHED else self.value(self.tried[handle])
        generator = np.random.default_rng([self.seed, handle + 1])
        drawn_P = generator.normal(value, self.noise, (64, PROMPTS))[:n].mean(0)
        return PromptEstimates(drawn_P, np.zeros(PROMPTS))

    def search(
        self, losses: Sequence[LossCandidates], budget: SampleBudget | None = None
    ) -> JudgedProposal:
        return propose_judged(
            self.trial,
            self.judge,
            untouched=UNTOUCHED,
            losses=losses,
            largest_rate=1e-3,
            judge_beta=0.1,
            budget=budget or SampleBudget(1, 1),
            release=self.released.append,
        )


def test_the_rate_then_imitation_then_beta_then_the_rate_again_for_each_loss() -> None:
    """Without noise. gvpo: rates at imitation 1, the middle one, and beta 0.1, the nearest to the
    judge's; 1e-4 is best. Imitation 3 is better than 1, and 10 worse. Beta 0.2 is better than 0.1
    and 0.05. Both changed, so the neighbouring rates are tried. ipo, which has neither, begins
    with the best rate of gvpo and its neighbours, and continues beyond the end to 1e-5.
    """
    world = World({"gvpo": (1e-4, 3.0, 0.2, 0.5), "ipo": (1e-5, 0.0, 0.1, 0.45)})
    found = world.search(
        [LossCandidates("gvpo", (3.0, 0.0, 10.0, 1.0), (0.05, 0.1, 0.2)), LossCandidates("ipo")]
    )
    plain = [(own.loss_type, own.imitation, own.beta, own.learning_rate) for own in world.tried]
    assert plain == [
        *(("gvpo", 3.0, 0.1, rate) for rate in (3.2e-5, 1e-4, 3.2e-4)),
        ("gvpo", 1.0, 0.1, 1e-4),
        ("gvpo", 10.0, 0.1, 1e-4),
        ("gvpo", 3.0, 0.05, 1e-4),
        ("gvpo", 3.0, 0.2, 1e-4),
        ("gvpo", 3.0, 0.2, 3.2e-5),
        ("gvpo", 3.0, 0.2, 3.2e-4),
        *(("ipo", 0.0, 0.1, rate) for rate in (3.2e-5, 1e-4, 3.2e-4, 1e-5, 3.2e-6)),
    ]
    assert found.chosen.settings == TrialSettings("gvpo", 3.0, 0.2, 1e-4)
    assert [own.settings for own in found.trials] == [None, *world.tried]
    assert found.chosen is found.best
    assert found.next.settings == TrialSettings("ipo", 0.0, 0.1, 1e-5)
    assert found.next.behind is not None
    assert found.next.behind.mean == pytest.approx(0.05, abs=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    st.floats(-6.5, -2.5),
    st.sampled_from([0.0, 0.3, 1.0, 3.0, 10.0]),
    st.floats(-6.5, -2.5),
    st.booleans(),
)
def test_without_noise_the_best_is_found_wherever_it_lies(
    power: float, imitation: float, other: float, imitating: bool
) -> None:
    """The values are sums of parabolas, one for each setting, so that climbing one setting at a
    time finds the best: the rate to half a grid step, a quarter of a decade, plus rounding to two
    digits. No trial runs twice.
    """
    heights = (0.3, 0.6) if imitating else (0.6, 0.3)
    world = World(
        {"rft": (10**other, 0.0, 0.1, heights[0]), "gvpo": (10**power, imitation, 0.1, heights[1])}
    )
    found = world.search(
        [LossCandidates("rft"), LossCandidates("gvpo", (0.0, 0.3, 1.0, 3.0, 10.0))]
    )
    best = found.chosen.settings
    assert best is not None
    assert (best.loss_type, best.imitation) == (("gvpo", imitation) if imitating else ("rft", 0.0))
    wanted = power if imitating else other
    assert abs(math.log10(best.learning_rate) - wanted) < 0.25 + 0.03
    assert len(world.tried) == len(set(world.tried))


def test_with_noise_the_best_is_found_within_the_stated_probability() -> None:
    """The best of gvpo is 0.5, that of rft 0.42; a neighbouring rate loses 0.3/4 = 0.075, and a
    neighbouring imitation at least 0.3 log10(1.1/0.4)^2 = 0.058. An answer's reward has deviation
    0.3, so a difference of two trials has 0.3 sqrt(2/n/60): 0.019 at n = 8 and 0.007 at n = 64.
    A decision of the search at n = 8 errs with probability P(Z > 0.058/0.019) = 0.1%; each search
    makes fewer than 20 of them. So of 50 searches at most one or two lose more than a grid step;
    the test allows 3. They take a quarter of the answers that 64 for each trial would be.
    """
    lost, spent, equal = 0, 0, 0
    for seed in range(50):
        world = World(
            {"gvpo": (1e-4, 1.0, 0.1, 0.5), "rft": (1e-3, 0.0, 0.1, 0.42)}, noise=0.3, seed=seed
        )
        found = world.search(
            [LossCandidates("gvpo", (0.0, 0.3, 1.0, 3.0)), LossCandidates("rft")],
            SampleBudget(8, 64),
        )
        assert found.chosen.settings is not None
        lost += world.value(found.chosen.settings) < 0.5 - 0.05
        spent += found.samples
        equal += 64 * len(found.trials)
        assert found.samples == sum(world.asked.values())
        assert all(8 <= n <= 64 for n in world.asked.values())
    assert lost <= 3
    assert spent < equal / 3


def test_if_nothing_beats_the_untouched_policy_it_is_chosen() -> None:
    """It is never released, and the best trial that trained is told besides."""
    world = World({"gvpo": (1e-4, 0.0, 0.1, 0.5)}, untouched=0.6)
    found = world.search([LossCandidates("gvpo")])
    assert found.chosen is found.untouched
    assert found.chosen.settings is None
    assert found.best.settings == TrialSettings("gvpo", 0.0, 0.1, 1e-4)
    assert found.next is found.best
    assert found.best.behind is not None
    assert found.best.behind.mean == pytest.approx(0.1)
    assert UNTOUCHED not in world.released
    assert sorted(set(world.released)) == list(range(len(world.tried)))


def test_a_policy_that_equals_the_untouched_one_does_not_beat_it() -> None:
    """At equal estimates the earlier trial is chosen: nothing is proposed that changes nothing."""
    world = World({"gvpo": (1e-4, 0.0, 0.1, 0.5)}, untouched=0.5)
    assert world.search([LossCandidates("gvpo")]).chosen.settings is None


def test_diverged_trials_lose_and_the_search_goes_to_smaller_rates() -> None:
    world = World({"gvpo": (1e-3, 0.0, 0.1, 0.5)}, untouched=-5.0, largest=2e-6)
    found = world.search([LossCandidates("gvpo")])
    assert found.chosen.settings is not None
    assert found.chosen.settings.learning_rate == 1e-6
    diverged = [own for own in found.trials if own.samples == 0]
    assert len(diverged) == 5  # 3.2e-6 to 3.2e-4
    assert all(own.behind is None and math.isnan(own.objective.mean) for own in diverged)
    with pytest.raises(ConfigError, match="finite at some learning rate"):
        World({"gvpo": (1e-3, 0.0, 0.1, 0.5)}, largest=0.0).search([LossCandidates("gvpo")])


def test_no_losses_and_repeated_candidates_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one loss"):
        World({}).search([])
    for changes in ({"imitations": ()}, {"imitations": (1.0, 1.0)}, {"betas": ()}):
        with pytest.raises(ConfigError, match="at least one candidate, all different"):
            LossCandidates("gvpo", **changes)
