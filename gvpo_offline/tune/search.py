"""Search for beta and learning rate, as functions that do not depend on the training loop.

    reward gap -> beta_candidates -> learning-rate range test at initial_beta
               -> largest_usable_rate -> propose

The caller trains. For the learning-rate range test (L. N. Smith, arXiv:1506.01186, section 3.3) it
takes one step at each `range_rate`. `propose` gets a function that trains from the same initial
weights each time and evaluates held-out groups.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gvpo_offline.errors import ConfigError, DataError

Metrics = Mapping[str, float]
LIKELY = "likely_log_mass_mean"  # a metric that earlier versions do not have

# Log-ratio gaps, in nats, between the best and the worst response of a group at the optimum:
# (max R - min R) / beta. The candidates, and the one at which the search starts.
CANDIDATE_GAPS = tuple(2.0 ** (step / 2) for step in range(9))  # 1 to 16
INITIAL_GAP = 4.0
# Learning rates of a range test; and the grid of a search, with two learning rates per decade.
LOWEST_RATE, HIGHEST_RATE = 1e-7, 1e-2
_RUNGS_PER_DECADE = 2
HIGHEST_RUNG = 2  # grid points above the largest usable rate
# A range test looks at the mean misfit of the last _WINDOW steps. A learning rate is usable while
# the mean exceeds its initial value by at most the share _SLACK, or by its noise if that is larger.
# The test has diverged beyond the share _DIVERGED and beyond _DIVERGED_NOISE times the noise.
_WINDOW = 5
_SLACK, _DIVERGED, _DIVERGED_NOISE = 0.01, 0.5, 4.0


@dataclass(frozen=True)
class Trial:
    """A short run from the policy's initial weights: its settings and its held-out metrics."""

    beta: float
    learning_rate: float
    steps: int
    metrics: Metrics


@dataclass(frozen=True)
class Proposal:
    """The proposed beta and learning rate, and all trials in the order in which they ran."""

    beta: float
    learning_rate: float
    trials: tuple[Trial, ...]

    @property
    def chosen(self) -> Trial:
        """The trial with the proposed beta and learning rate."""
        wanted = (self.beta, self.learning_rate)
        return next(t for t in self.trials if (t.beta, t.learning_rate) == wanted)


@dataclass(frozen=True)
class RangePoint:
    """A step of a range test: its learning rate, and the misfit of its groups before the update."""

    learning_rate: float
    misfit: float


# ---- from the data ----


def beta_candidates(reward_gap: float) -> tuple[float, ...]:
    """Betas at which the median log-ratio gap of the optimum is one of `CANDIDATE_GAPS`, ascending.

    Args:
        reward_gap: median of max R - min R over groups with unequal rewards, in units of reward.

    Raises:
        DataError: `reward_gap` is not finite and positive: no group has unequal rewards.
    """
    _check_gap(reward_gap)
    return tuple(sorted(_rounded(reward_gap / nats) for nats in CANDIDATE_GAPS))


def initial_beta(betas: Sequence[float], reward_gap: float) -> float:
    """The beta at which the median log-ratio gap of the optimum is nearest to `INITIAL_GAP`.

    Distances are those of the logarithms. Errors as `beta_candidates`.
    """
    _check_gap(reward_gap)
    return min(betas, key=lambda beta: abs(math.log(reward_gap / beta / INITIAL_GAP)))


def _check_gap(reward_gap: float) -> None:
    if not (math.isfinite(reward_gap) and reward_gap > 0):
        raise DataError(
            "candidates for beta follow from the gap between the rewards of a group",
            received=f"a median gap of {reward_gap}",
            remedy="train on groups of which some have unequal, finite rewards",
        )


# ---- the learning-rate range test ----


def range_rate(step: int, steps: int) -> float:
    """The learning rate of a step, 0 <= step < steps.

    Geometric from `LOWEST_RATE` at the first step to `HIGHEST_RATE` at the last.
    """
    decades = math.log10(HIGHEST_RATE / LOWEST_RATE)
    return float(LOWEST_RATE * 10.0 ** (decades * step / max(steps - 1, 1)))


def diverged(points: Sequence[RangePoint]) -> bool:
    """Whether the misfit of a range test has risen so far that the test may stop.

    Points whose misfit is nan are ignored.
    """
    means = _means(points)
    if not means:
        return False
    start, noise = _start(points)
    limit = start + max(_DIVERGED * abs(start), _DIVERGED_NOISE * noise)
    return not (math.isfinite(means[-1][1]) and means[-1][1] <= limit)


def largest_usable_rate(points: Sequence[RangePoint]) -> float:
    """The largest learning rate at which the mean misfit of a range test is not above its start.

    Raises:
        ConfigError: no point has a misfit other than nan.
    """
    means = _means(points)
    if not means:
        raise ConfigError(
            "a learning-rate range test needs steps with a measured misfit",
            received="none",
            remedy="raise groups_per_step, so that a step has groups of unequal rewards",
        )
    start, noise = _start(points)
    limit = start + max(_SLACK * abs(start), noise)
    usable = [rate for rate, mean in means if math.isfinite(mean) and mean <= limit]
    return _rounded(usable[-1] if usable else means[0][0])


def _means(points: Sequence[RangePoint]) -> list[tuple[float, float]]:
    """For each point, its learning rate and the mean misfit of the last `_WINDOW` points.

    Points whose misfit is nan are left out.
    """
    measured = [point for point in points if not math.isnan(point.misfit)]
    windows = [measured[max(0, end - _WINDOW) : end] for end in range(1, len(measured) + 1)]
    return [(w[-1].learning_rate, statistics.fmean(p.misfit for p in w)) for w in windows]


def _start(points: Sequence[RangePoint]) -> tuple[float, float]:
    """Mean and standard deviation of the misfit at the first points, where the learning rate is too
    small to change it.
    """
    measured = [p.misfit for p in points if math.isfinite(p.misfit)]
    first = measured[: 2 * _WINDOW] or [math.inf]
    return statistics.fmean(first), statistics.pstdev(first) if len(first) > 1 else 0.0


# ---- the search ----


def misfit(metrics: Metrics, loss_type: str = "gvpo") -> float:
    """The number that a range test looks at; lower is better. Comparable at one beta only.

    For GVPO, a regression of rewards on log-ratios, it is the unexplained share of the variance of
    rewards within groups, 1 - explained_variance; nan if no group has unequal rewards. For other
    losses it is the loss.
    """
    return 1.0 - metrics["explained_variance"] if loss_type == "gvpo" else metrics["loss"]


def score(metrics: Metrics) -> float:
    """The score of a trial on held-out groups; larger is better. Units of reward.

    The gain in mean reward if the logged responses are reweighted by the ratio of policy to
    reference (`likely_reweighted_reward_mean` - `likely_reward_mean`), times the share of
    probability that stays on logged responses (exp of `likely_log_mass_mean`, at most 1). The rest
    of the probability went to responses without a reward and is counted as no gain. Responses count
    by how likely they are per token under the reference (`losses.likelihood`): without that,
    responses that the policy never samples, such as a person's, would decide. A constant added to
    all rewards of a group does not change the score.

    Metrics without these names, which earlier versions gave, are scored by
    `reweighted_reward_mean`, `group_reward_mean` and `log_mass_mean`, which count all responses
    alike.

    Returns:
        The score; -inf if a metric is nan.
    """
    if LIKELY in metrics:
        gain = metrics["likely_reweighted_reward_mean"] - metrics["likely_reward_mean"]
        log_mass = metrics[LIKELY]
    else:
        gain = metrics["reweighted_reward_mean"] - metrics["group_reward_mean"]
        log_mass = metrics["log_mass_mean"]
    if math.isnan(gain + log_mass):
        return -math.inf
    return gain * math.exp(min(0.0, log_mass))


def propose(
    trial: Callable[[float, float, int], Metrics],
    *,
    betas: Sequence[float],
    initial_beta: float,
    largest_rate: float,
    steps: int,
    score: Callable[[Metrics], float] = score,
) -> Proposal:
    """Search beta and learning rate by short trials.

    First the learning rate at `initial_beta`: 1/30, 1/10 and 1/3 of the largest usable one. While
    the best is at an end, the next learning rate beyond that end is tried. Then the neighbouring
    betas at the best learning rate, extended in the same way. If another beta is better, the
    neighbouring learning rates are tried at that beta.

    Args:
        trial: maps (beta, learning rate, steps) to held-out metrics with the names of
            `GroupStatistics.metrics`. Each trial starts from the same weights. Metrics are nan if
            training diverged. Called once for each (beta, learning rate).
        betas: the candidates. With a single one, only the learning rate is searched.
        initial_beta: one of the candidates.
        largest_rate: `largest_usable_rate` of a range test.
        steps: optimizer steps of each trial.
        score: score of a trial's metrics; larger is better, -inf if a metric is nan.

    Raises:
        ConfigError: every trial diverged.
    """
    ladder = sorted(betas)
    done: dict[tuple[float, float], Trial] = {}

    def scored(beta: float, rung: int) -> float:
        rate = grid_rate(largest_rate, rung)
        if (beta, rate) not in done:
            done[beta, rate] = Trial(beta, rate, steps, trial(beta, rate, steps))
        return score(done[beta, rate].metrics)

    lowest = lowest_rung(largest_rate)
    first = [-3, -2, -1]
    rung = _hill_climb(
        lambda n: scored(initial_beta, n), first, min(lowest, first[0]), HIGHEST_RUNG
    )
    if scored(initial_beta, rung) == -math.inf:
        raise ConfigError(
            "the policy's log-probs stay finite at some learning rate",
            received=f"none from {grid_rate(largest_rate, lowest):g} up",
            remedy="check the data and the model: train a few steps at a very small learning rate",
        )
    last, at = len(ladder) - 1, ladder.index(initial_beta)
    around = [n for n in (at - 1, at, at + 1) if 0 <= n <= last]
    beta = ladder[_hill_climb(lambda n: scored(ladder[n], rung), around, 0, last)]
    if beta != initial_beta:
        near = [rung - 1, rung, rung + 1]
        rung = _hill_climb(lambda n: scored(beta, n), near, near[0], near[-1])
    return Proposal(beta, grid_rate(largest_rate, rung), tuple(done.values()))


def _hill_climb(value: Callable[[int], float], first: Sequence[int], low: int, high: int) -> int:
    """`hill_climb` by a value; of equal values the lowest integer wins."""
    values: dict[int, float] = {}

    def best(tried: Sequence[int]) -> int:
        values.update({n: value(n) for n in tried if n not in values})
        return max(tried, key=values.__getitem__)

    return hill_climb(best, first, low, high)


def hill_climb(
    best: Callable[[Sequence[int]], int], first: Sequence[int], low: int, high: int
) -> int:
    """The best integer in low..high, by hill climbing from `first`.

    While the best is at an end of the tried range, the next integer beyond is tried.

    Args:
        best: the best of some integers, which it gets in ascending order.
        first: the integers to begin with.
        low: the smallest integer that may be tried beyond them.
        high: the largest integer that may be tried beyond them.
    """
    tried = sorted(first)
    while True:
        found = best(tried)
        beyond = {tried[0]: found - 1, tried[-1]: found + 1}.get(found, found)
        if beyond == found or not low <= beyond <= high:
            return found
        tried = sorted([*tried, beyond])


def grid_rate(largest: float, rung: int) -> float:
    """The learning rate of a grid point: two per decade, 0 being the largest usable rate."""
    return _rounded(largest * 10.0 ** (rung / _RUNGS_PER_DECADE))


def lowest_rung(largest: float) -> int:
    """The grid point at or below `LOWEST_RATE`."""
    return math.floor(_RUNGS_PER_DECADE * math.log10(LOWEST_RATE / largest))


def _rounded(value: float) -> float:
    """`value` with two significant digits, which is as precise as a search is."""
    return float(f"{value:.2g}")
