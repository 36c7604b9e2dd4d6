"""What to try next, and what to take: beta and learning rate from short trials, as pure functions.

    gap -> beta_candidates -> a range run at beta_to_begin -> largest_usable_rate -> propose

How a policy is trained is the caller's: he runs the range, one step per `range_rate`, and hands
`propose` a callable that trains anew from the same weights and measures held-out groups.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gvpo_offline.errors import ConfigError, DataError

Metrics = Mapping[str, float]

# Log-ratio gaps, in nats, that the optimum may ask for between a group's best and worst response:
# (max R - min R) / beta. Which are tried, and at which the search begins.
NATS_TRIED = tuple(2.0 ** (step / 2) for step in range(9))  # 1 to 16
NATS = 4.0
# Rates of a range run, and the ladder of a search: two rungs a decade.
LOWEST_RATE, HIGHEST_RATE = 1e-7, 1e-2
_RUNGS_PER_DECADE = 2
_HIGHEST_RUNG = 2  # above the largest usable rate of a range run
# A range run's figures are means of so many steps. They are usable up to this share above where
# they began, or its noise; and have diverged beyond that share, or so many times its noise.
_WINDOW = 5
_SLACK, _DIVERGED, _DIVERGED_NOISE = 0.01, 0.5, 4.0


@dataclass(frozen=True)
class Trial:
    """A short run from the policy's own weights: its settings, and its held-out metrics."""

    beta: float
    learning_rate: float
    steps: int
    metrics: Metrics


@dataclass(frozen=True)
class Proposal:
    """What to train with, and every trial in the order in which they were made."""

    beta: float
    learning_rate: float
    trials: tuple[Trial, ...]

    @property
    def chosen(self) -> Trial:
        """The trial with what is proposed."""
        wanted = (self.beta, self.learning_rate)
        return next(t for t in self.trials if (t.beta, t.learning_rate) == wanted)


@dataclass(frozen=True)
class RangePoint:
    """A step of a range run: the rate of its update, and the misfit of its groups before it."""

    learning_rate: float
    misfit: float


# ---- from the data ----


def beta_candidates(reward_gap: float) -> tuple[float, ...]:
    """Betas at which the optimum's median log-ratio gap is one of `NATS_TRIED`, ascending.

    Args:
        reward_gap: median of max R - min R over groups of unequal rewards, in units of reward.

    Raises:
        DataError: no group has unequal rewards, or the gap is not finite.
    """
    _check_gap(reward_gap)
    return tuple(sorted(_rounded(reward_gap / nats) for nats in NATS_TRIED))


def beta_to_begin(betas: Sequence[float], reward_gap: float) -> float:
    """Of `betas` the one whose optimum's median gap is nearest to `NATS`, as a ratio."""
    _check_gap(reward_gap)
    return min(betas, key=lambda beta: abs(math.log(reward_gap / beta / NATS)))


def _check_gap(reward_gap: float) -> None:
    if not (math.isfinite(reward_gap) and reward_gap > 0):
        raise DataError(
            "beta is chosen by the gap of rewards in a group",
            received=f"a median of {reward_gap}",
            remedy="train on groups of which some have unequal, finite rewards",
        )


# ---- the range run ----


def range_rate(step: int, steps: int) -> float:
    """The learning rate of step 0 <= step < steps: `LOWEST_RATE` to `HIGHEST_RATE`, as powers."""
    decades = math.log10(HIGHEST_RATE / LOWEST_RATE)
    return float(LOWEST_RATE * 10.0 ** (decades * step / max(steps - 1, 1)))


def diverged(points: Sequence[RangePoint]) -> bool:
    """Whether a range run has gone so far wrong that it may stop. Points of nan say nothing."""
    means = _means(points)
    if not means:
        return False
    start, noise = _start(points)
    limit = start + max(_DIVERGED * abs(start), _DIVERGED_NOISE * noise)
    return not (math.isfinite(means[-1][1]) and means[-1][1] <= limit)


def largest_usable_rate(points: Sequence[RangePoint]) -> float:
    """The last rate at which a range run fitted no worse than it began.

    Raises:
        ConfigError: there is no point with a number.
    """
    means = _means(points)
    if not means:
        raise ConfigError(
            "a range run measures some steps",
            received="none",
            remedy="raise groups_per_step, so that a step has groups of unequal rewards",
        )
    start, noise = _start(points)
    limit = start + max(_SLACK * abs(start), noise)
    usable = [rate for rate, mean in means if math.isfinite(mean) and mean <= limit]
    return _rounded(usable[-1] if usable else means[0][0])


def _means(points: Sequence[RangePoint]) -> list[tuple[float, float]]:
    """Rate and mean misfit of the last steps up to each; steps without a number are left out."""
    told = [point for point in points if not math.isnan(point.misfit)]
    windows = [told[max(0, end - _WINDOW) : end] for end in range(1, len(told) + 1)]
    return [(w[-1].learning_rate, statistics.fmean(p.misfit for p in w)) for w in windows]


def _start(points: Sequence[RangePoint]) -> tuple[float, float]:
    """Mean and deviation of the misfit where the rate is too small to move anything."""
    told = [p.misfit for p in points if math.isfinite(p.misfit)]
    first = told[: 2 * _WINDOW] or [math.inf]
    return statistics.fmean(first), statistics.pstdev(first) if len(first) > 1 else 0.0


# ---- the search ----


def misfit(metrics: Metrics, loss_type: str = "gvpo") -> float:
    """What tells that a range run goes wrong, at one beta; lower is better.

    GVPO regresses rewards on log-ratios: the unexplained share of the variance of rewards within
    groups, 1 - explained_variance. Other losses: the loss. nan where there was nothing to measure.
    """
    return 1.0 - metrics["explained_variance"] if loss_type == "gvpo" else metrics["loss"]


def score(metrics: Metrics) -> float:
    """What a trial is judged by, on held-out groups; larger is better. Units of reward.

    What the logged responses would earn beyond now if each were as much likelier as the policy made
    it (`reweighted_reward_mean` - `group_reward_mean`), times the share of probability that is
    still on logged responses (exp of `log_mass_mean`, 1 at most): of what went to responses that
    nobody logged, nothing better is known than that it earns what the log does. LossInputs added to
    a prompt's rewards change nothing.
    """
    gain = metrics["reweighted_reward_mean"] - metrics["group_reward_mean"]
    log_mass = metrics["log_mass_mean"]
    if math.isnan(gain + log_mass):
        return -math.inf
    return gain * math.exp(min(0.0, log_mass))


def propose(
    trial: Callable[[float, float, int], Metrics],
    *,
    betas: Sequence[float],
    begin: float,
    largest_rate: float,
    steps: int,
    score: Callable[[Metrics], float] = score,
) -> Proposal:
    """Search beta and learning rate by short trials.

    The rate first, at `begin`: 1/3, 1/10 and 1/30 of the largest usable one, and on past the end
    where the best was found. Then the neighbouring betas at that rate, on in the direction that is
    better. Where beta moved, the neighbouring rates once more.

    Args:
        trial: (beta, learning rate, steps) to held-out metrics, as `GroupStatistics.metrics` names
            them; each from the same weights. nan where the run diverged. Called once for each pair.
        betas: the candidates; one: beta is settled, and only the rate is searched.
        begin: one of them.
        largest_rate: of a range run (`largest_usable_rate`).
        steps: optimizer steps of each trial.
        score: what trials are judged by; larger is better, -inf where nothing was measured.

    Raises:
        ConfigError: no trial kept its numbers finite.
    """
    ladder = sorted(betas)
    done: dict[tuple[float, float], Trial] = {}

    def scored(beta: float, rung: int) -> float:
        rate = _rate(largest_rate, rung)
        if (beta, rate) not in done:
            done[beta, rate] = Trial(beta, rate, steps, trial(beta, rate, steps))
        return score(done[beta, rate].metrics)

    lowest = math.floor(_RUNGS_PER_DECADE * math.log10(LOWEST_RATE / largest_rate))
    first = [-3, -2, -1]
    rung = _climb(lambda n: scored(begin, n), first, min(lowest, first[0]), _HIGHEST_RUNG)
    if scored(begin, rung) == -math.inf:
        raise ConfigError(
            "a policy's log-probs stay finite at some learning rate",
            received=f"none from {_rate(largest_rate, lowest):g} up",
            remedy="look at the data and the model: train a few steps at a tiny rate",
        )
    last, at = len(ladder) - 1, ladder.index(begin)
    around = [n for n in (at - 1, at, at + 1) if 0 <= n <= last]
    beta = ladder[_climb(lambda n: scored(ladder[n], rung), around, 0, last)]
    if beta != begin:
        near = [rung - 1, rung, rung + 1]
        rung = _climb(lambda n: scored(beta, n), near, near[0], near[-1])
    return Proposal(beta, _rate(largest_rate, rung), tuple(done.values()))


def _climb(value: Callable[[int], float], first: Sequence[int], low: int, high: int) -> int:
    """The best of consecutive numbers, `first` and then past the end where the best is.

    Of equals the lowest. All lie in low..high.
    """
    values = {n: value(n) for n in first}
    while True:
        best = max(sorted(values), key=values.__getitem__)
        beyond = {min(values): best - 1, max(values): best + 1}.get(best, best)
        if beyond == best or not low <= beyond <= high:
            return best
        values[beyond] = value(beyond)


def _rate(largest: float, rung: int) -> float:
    return _rounded(largest * 10.0 ** (rung / _RUNGS_PER_DECADE))


def _rounded(value: float) -> float:
    """Two digits: what is measured here is not known better."""
    return float(f"{value:.2g}")
