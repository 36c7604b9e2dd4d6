"""Search for loss, imitation, beta and learning rate by sampled answers, without a training loop.

A log cannot choose between losses, because it has no rewards of answers that were not logged.
Here each trial's policy answers held-out prompts, the answers are scored, and trials
are ranked by reward - judge_beta KL. The caller trains and judges:

    trial(settings) -> a handle of the trained policy
    judge(handle, n) -> per-prompt estimates from n answers to each prompt

The search climbs one setting at a time, as `search.propose` does, and spends more answers where
trials are close (`racing`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

from gvpo_offline.errors import ConfigError
from gvpo_offline.sampled_eval.result import Estimate
from gvpo_offline.tune.racing import (
    Contender,
    Handle,
    PromptEstimates,
    Race,
    SampleBudget,
    difference,
)
from gvpo_offline.tune.search import HIGHEST_RUNG, grid_rate, hill_climb, lowest_rung


@dataclass(frozen=True)
class TrialSettings:
    """The settings of a trial."""

    loss_type: str
    imitation: float
    beta: float
    learning_rate: float


@dataclass(frozen=True)
class LossCandidates:
    """A loss to try, with candidates for its settings.

    Attributes:
        loss_type: name of the loss.
        imitations: candidates for `imitation`; a single one is not searched.
        betas: candidates for beta; a single one is not searched. A loss that does not use beta gets
            a single one.

    Raises:
        ConfigError: there are no candidates, or some are equal.
    """

    loss_type: str
    imitations: tuple[float, ...] = (0.0,)
    betas: tuple[float, ...] = (0.1,)

    def __post_init__(self) -> None:
        for name in ("imitations", "betas"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(
                    f"{name} has at least one candidate, all different",
                    received=values,
                    remedy="name each candidate once",
                )


@dataclass(frozen=True)
class JudgedTrial:
    """A trial after the search.

    Attributes:
        settings: its settings; None: the untouched policy.
        samples: answers per prompt that its policy gave; 0: training diverged.
        reward: mean reward over prompts.
        kl: mean KL to the reference, nats.
        objective: mean of reward - judge_beta KL.
        behind: the chosen trial's objective minus this trial's, paired by prompt; None for the
            chosen trial and for one that diverged.
        failed: number of answers without a reward, which are in no mean.
    """

    settings: TrialSettings | None
    samples: int
    reward: Estimate
    kl: Estimate
    objective: Estimate
    behind: Estimate | None
    failed: int


@dataclass(frozen=True)
class JudgedProposal:
    """Result of a search by sampled answers.

    Attributes:
        trials: the untouched policy first, then all trials in the order in which they ran.
        chosen: the trial with the largest objective; it may be the untouched policy.
        best: the best trial that trained; it differs from `chosen` if the untouched policy is best.
        next: the best of the other trials, the untouched policy included.
        judge_beta: what the KL is multiplied with in the objective.
    """

    trials: tuple[JudgedTrial, ...]
    chosen: JudgedTrial
    best: JudgedTrial
    next: JudgedTrial
    judge_beta: float

    @property
    def untouched(self) -> JudgedTrial:
        """The policy before training."""
        return self.trials[0]

    @property
    def samples(self) -> int:
        """Answers per prompt, summed over trials."""
        return sum(trial.samples for trial in self.trials)


def propose_judged(
    trial: Callable[[TrialSettings], Handle | None],
    judge: Callable[[Handle, int], PromptEstimates],
    *,
    untouched: Handle,
    losses: Sequence[LossCandidates],
    largest_rate: float,
    judge_beta: float,
    budget: SampleBudget | None = None,
    release: Callable[[Handle], None] = lambda handle: None,
) -> JudgedProposal:
    """Search loss, imitation, beta and learning rate by short trials and sampled answers.

    For each loss: the learning rate at the middle candidate for imitation and the candidate for
    beta nearest to `judge_beta`, beginning with 1/30, 1/10 and 1/3 of the largest usable rate for
    the first loss, and with the previous loss's best rate and its neighbours for each other. While
    the best is at an end, the next rate beyond it is tried. Then the neighbouring imitations at
    that rate, then the neighbouring betas, extended in the same way. If one of them changed, the
    neighbouring rates are tried again. At last trials of all losses get more answers until the best
    is significantly better than the others (`Race.finish`).

    Args:
        trial: trains from the policy's initial weights and returns a handle of the trained policy;
            None if training diverged. Called once for each setting.
        judge: as for `Race`: estimates of a handle's policy from the first n answers to each
            prompt, with the same random numbers for every policy. A larger n follows for few.
        untouched: handle of the policy before training.
        losses: the losses to try, with candidates for their settings.
        largest_rate: `largest_usable_rate` of a range test, for the first loss.
        judge_beta: what the KL is multiplied with, for all trials. Objectives at the betas of the
            trials themselves would not be comparable: a smaller beta forgives a larger KL.
        budget: the fewest and the most answers per prompt of a trial; default: 8 and 64.
        release: called with the handle of a trial that is significantly worse than the best, so
            that its weights may be deleted; never with `untouched`. `judge` is called with it again
            only if the best trial turns out worse.

    Raises:
        ConfigError: every trial diverged, or there are no losses.
        DataError: there are fewer than 2 prompts, or estimates are of different prompts.
    """
    _check_losses(losses)
    race = Race(
        judge,
        beta=judge_beta,
        budget=budget or SampleBudget(),
        release=lambda handle: None if handle is untouched else release(handle),
    )
    search = _Search(trial, race, race.enter(untouched), judge_beta, largest_rate)
    rungs = [-3, -2, -1]
    for candidates in losses:
        rung = search.climb_loss(candidates, rungs)
        rungs = [rung - 1, rung, rung + 1]
    if all(own.handle is None for own in search.entered.values()):
        raise ConfigError(
            "the policy's log-probs stay finite at some learning rate",
            received="none at which training did not diverge",
            remedy="check the data and the model: train a few steps at a very small learning rate",
        )
    race.finish()
    return search.proposal()


def _check_losses(losses: Sequence[LossCandidates]) -> None:
    if not losses:
        raise ConfigError("a search tries at least one loss", received="none")


class _Search(Generic[Handle]):
    """Runs trials once each, and climbs."""

    def __init__(
        self,
        trial: Callable[[TrialSettings], Handle | None],
        race: Race[Handle],
        untouched: Contender[Handle],
        judge_beta: float,
        largest_rate: float,
    ) -> None:
        self._trial, self._race, self._untouched = trial, race, untouched
        self._judge_beta, self._largest = judge_beta, largest_rate
        self.entered: dict[TrialSettings, Contender[Handle]] = {}

    def climb_loss(self, candidates: LossCandidates, rungs: Sequence[int]) -> int:
        """Search the settings of one loss; returns the rung of its best learning rate."""
        imitations, betas = sorted(candidates.imitations), sorted(candidates.betas)
        middle = len(imitations) // 2
        nearest = min(range(len(betas)), key=lambda i: abs(math.log(betas[i] / self._judge_beta)))

        def entered(rung: int, imitation: int, beta: int) -> Contender[Handle]:
            own = TrialSettings(
                candidates.loss_type,
                imitations[imitation],
                betas[beta],
                grid_rate(self._largest, rung),
            )
            if own not in self.entered:
                self.entered[own] = self._race.enter(self._trial(own))
            return self.entered[own]

        low = min(lowest_rung(self._largest), rungs[0])
        high = max(HIGHEST_RUNG, rungs[-1])
        rung = self._climb(lambda n: entered(n, middle, nearest), rungs, low, high)
        imitation = self._climb_from(lambda n: entered(rung, n, nearest), middle, len(imitations))
        beta = self._climb_from(lambda n: entered(rung, imitation, n), nearest, len(betas))
        if (imitation, beta) != (middle, nearest):
            near = [rung - 1, rung, rung + 1]
            rung = self._climb(lambda n: entered(n, imitation, beta), near, near[0], near[-1])
        return rung

    def _climb_from(self, of: Callable[[int], Contender[Handle]], start: int, count: int) -> int:
        """Climb over the indices below `count`, beginning with `start` and its neighbours."""
        around = [n for n in (start - 1, start, start + 1) if 0 <= n < count]
        return self._climb(of, around, 0, count - 1)

    def _climb(
        self, of: Callable[[int], Contender[Handle]], first: Sequence[int], low: int, high: int
    ) -> int:
        def best(tried: Sequence[int]) -> int:
            own = {n: of(n) for n in tried}
            found = self._race.better(list(own.values()))
            return next(n for n in tried if own[n] is found)

        return hill_climb(best, first, low, high)

    def proposal(self) -> JudgedProposal:
        """The result, from the estimates so far."""
        trained = list(self.entered.values())
        best = self._race.best(trained)
        chosen = self._race.best([self._untouched, *trained])
        second = self._race.best([own for own in self._race.contenders if own is not chosen])
        settings = {id(own): key for key, own in self.entered.items()}
        judged = {
            id(own): self._judged(own, settings.get(id(own)), chosen)
            for own in (self._untouched, *trained)
        }
        return JudgedProposal(
            tuple(judged.values()),
            judged[id(chosen)],
            judged[id(best)],
            judged[id(second)],
            self._judge_beta,
        )

    def _judged(
        self,
        own: Contender[Handle],
        settings: TrialSettings | None,
        chosen: Contender[Handle],
    ) -> JudgedTrial:
        nothing = Estimate(math.nan, math.nan, 0)
        behind = None if own is chosen else difference(chosen, own, self._judge_beta)
        if own.estimates is None:
            return JudgedTrial(settings, 0, nothing, nothing, nothing, behind, 0)
        return JudgedTrial(
            settings,
            own.samples,
            Estimate.of(own.estimates.rewards_P),
            Estimate.of(own.estimates.kls_P),
            Estimate.of(own.estimates.values(self._judge_beta)),
            behind,
            own.estimates.failed,
        )
