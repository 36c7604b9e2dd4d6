"""More answers for trials that do not differ significantly; independent of any model.

Each trial's policy answers the same prompts. A trial's value is the mean over prompts of
reward - beta KL. Two trials are compared prompt by prompt: the standard error of the mean
difference is that of paired samples, in which the difficulty of a prompt cancels. Where the
difference is small against its standard error, both get more answers to every prompt (a race in
the sense of Maron and Moore, "Hoeffding Races", NIPS 1993, with doubling as in successive halving,
Jamieson and Talwalkar, arXiv:1502.07943).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.group import FloatArray
from gvpo_offline.sampled_eval.result import Estimate

Handle = TypeVar("Handle")

# A trial is beaten, that is significantly worse than the best, while its paired difference from the
# best is above this many standard errors. If both were equally good, this would happen at a given
# comparison with probability 2.3%.
APART = 2.0
# At a decision of the search, a trial is close to the best up to this many standard errors.
CLOSE = 1.0


@dataclass(frozen=True, eq=False)
class PromptEstimates:
    """Estimates of a policy from its answers to P prompts.

    Attributes:
        rewards_P: (P,) float64, mean reward of a prompt's answers; NaN if none has a reward.
        kls_P: (P,) float64, estimate of KL(policy || reference) for a prompt, in nats; NaN if
            there is none.
        failed: number of answers that have no reward.
    """

    rewards_P: FloatArray
    kls_P: FloatArray
    failed: int = 0

    def values(self, beta: float) -> FloatArray:
        """reward - beta KL of each prompt: (P,) float64."""
        return np.asarray(self.rewards_P - beta * self.kls_P, np.float64)


def is_above(own: Estimate, standard_errors: float) -> bool:
    """Whether a mean is above 0 by more than a number of its standard errors."""
    return own.mean > standard_errors * own.se


@dataclass(frozen=True)
class SampleBudget:
    """The fewest and the most answers to each prompt that a trial's policy gives.

    Raises:
        ConfigError: `most` is below `fewest`, or `fewest` is not positive.
    """

    fewest: int = 8
    most: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.fewest <= self.most:
            raise ConfigError(
                "the fewest and the most answers per prompt are whole numbers, 1 <= fewest <= most",
                received=f"{self.fewest} and {self.most}",
            )


class Contender(Generic[Handle]):
    """A trial in a race: the handle of its policy, and what is known of it.

    Attributes:
        handle: of the policy; None if training diverged.
        samples: answers to each prompt so far.
        estimates: from these answers; None before the first, and if training diverged.
    """

    def __init__(self, handle: Handle | None) -> None:
        self.handle = handle
        self.samples = 0
        self.estimates: PromptEstimates | None = None

    def mean(self, beta: float) -> float:
        """The mean of reward - beta KL; -inf if training diverged or no answer has a reward."""
        if self.estimates is None:
            return -math.inf
        found = Estimate.of(self.estimates.values(beta)).mean
        return -math.inf if math.isnan(found) else found

    def kl(self) -> float:
        """The mean KL in nats; inf if there is none."""
        if self.estimates is None:
            return math.inf
        found = Estimate.of(self.estimates.kls_P).mean
        return math.inf if math.isnan(found) else found


def difference(one: Contender[Handle], other: Contender[Handle], beta: float) -> Estimate | None:
    """The paired difference of two trials, over prompts for which both have a number.

    Returns:
        reward - beta KL of `one` minus that of `other`; None if one of them has no estimates.
    """
    if one.estimates is None or other.estimates is None:
        return None
    return Estimate.of(one.estimates.values(beta) - other.estimates.values(beta))


class Race(Generic[Handle]):
    """Trials whose policies give answers until the best is significantly better than the others.

    Args:
        judge: maps a handle and n to the estimates from the first n answers to each prompt. Answer
            number i to a prompt is drawn with the same random numbers for every policy, and the
            prompts are the same and in the same order.
        beta: what the KL is multiplied with, in units of reward per nat; the same for all trials,
            whatever beta they were trained with.
        budget: the fewest and the most answers per prompt.
        release: called with the handle of a trial that is beaten. `judge` may be called with it
            later, if more answers lower the mean of the best trial.
    """

    def __init__(
        self,
        judge: Callable[[Handle, int], PromptEstimates],
        *,
        beta: float,
        budget: SampleBudget,
        release: Callable[[Handle], None] = lambda handle: None,
    ) -> None:
        self._judge = judge
        self._beta = beta
        self._budget = budget
        self._release = release
        self.contenders: list[Contender[Handle]] = []
        self._released: set[int] = set()

    def enter(self, handle: Handle | None) -> Contender[Handle]:
        """Add a trial, with the fewest answers; None: a trial whose training diverged."""
        added = Contender(handle)
        self.contenders.append(added)
        self._sample(added, self._budget.fewest)
        self._release_beaten()
        return added

    def best(self, among: Sequence[Contender[Handle]]) -> Contender[Handle]:
        """The trial with the largest mean; of equal means that with the smallest KL, or the first.

        Where a prompt has no number for a trial, because none of its answers could be scored, the
        trial is compared with others on its other prompts: to leave out difficult prompts gains
        nothing. No answers are drawn.
        """
        leader, *others = among
        for own in others:
            if self._is_better(own, leader):
                leader = own
        return leader

    def _is_better(self, own: Contender[Handle], leader: Contender[Handle]) -> bool:
        if -math.inf in (means := (own.mean(self._beta), leader.mean(self._beta))):
            return means[0] > means[1] or (means[0] == means[1] and own.kl() < leader.kl())
        found = difference(own, leader, self._beta)
        if found is None or found.n == 0:
            return False
        return found.mean > 0 or (found.mean == 0 and own.kl() < leader.kl())

    def better(self, among: Sequence[Contender[Handle]]) -> Contender[Handle]:
        """The best of some trials, for a decision of the search.

        Trials that are `CLOSE` to the best get up to twice the fewest answers before, except those
        that a trial of the race beats. If the best of them is beaten, none gets more.
        """
        leader = self.best(among)
        close = [own for own in among if own is not leader and not self._behind(own, leader, CLOSE)]
        close = [own for own in close if not self._beaten(own)]
        if close and not self._beaten(leader):
            for own in (leader, *close):
                self._sample(own, min(2 * self._budget.fewest, self._budget.most))
            self._release_beaten()
        return self.best(among)

    def finish(self) -> Contender[Handle]:
        """Draw answers until the best trial beats all others, or the budget is spent.

        At each look the trials that the best does not beat, and the best itself, double their
        answers, those with the fewest first.

        Returns:
            The best trial.
        """
        while True:
            leader = self.best(self.contenders)
            rivals = [own for own in self.contenders if own is not leader]
            rivals = [own for own in rivals if not self._behind(own, leader, APART)]
            open_ = [own for own in (leader, *rivals) if own.samples < self._budget.most]
            self._release_beaten()
            if not rivals or not open_:
                return leader
            fewest = min(own.samples for own in open_)
            for own in open_:
                if own.samples == fewest:
                    self._sample(own, min(2 * fewest, self._budget.most))

    def _sample(self, own: Contender[Handle], samples: int) -> None:
        """Raise a trial's answers per prompt to a number, unless it has as many."""
        if own.handle is None or own.samples >= samples:
            return
        own.estimates, own.samples = self._judge(own.handle, samples), samples
        self._check(own.estimates)
        self._released.discard(id(own))

    def _check(self, found: PromptEstimates) -> None:
        shapes = {
            array.shape
            for own in (found, *(c.estimates for c in self.contenders if c.estimates))
            for array in (own.rewards_P, own.kls_P)
        }
        (prompts,) = found.rewards_P.shape
        if len(shapes) > 1 or prompts < 2:
            raise DataError(
                "trials are compared on the same prompts, at least 2",
                received=f"estimates of shape {', '.join(map(str, sorted(shapes)))}",
                remedy="hold out more prompts (eval_fraction, eval_prompts)",
            )

    def _behind(self, own: Contender[Handle], leader: Contender[Handle], errors: float) -> bool:
        """Whether a trial is worse than another by more than a number of standard errors."""
        if own.mean(self._beta) == -math.inf:
            return True
        found = difference(leader, own, self._beta)
        return found is not None and is_above(found, errors)

    def _beaten(self, own: Contender[Handle]) -> bool:
        leader = self.best(self.contenders)
        return own is not leader and self._behind(own, leader, APART)

    def _release_beaten(self) -> None:
        for own in self.contenders:
            if own.handle is not None and id(own) not in self._released and self._beaten(own):
                self._released.add(id(own))
                self._release(own.handle)
