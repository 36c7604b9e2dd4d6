"""What rewards of a dataset are like: by sampler, within groups, against length and writer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gvpo_offline.group import BoolArray, FloatArray
from gvpo_offline.report.dataset.frame import ResponseNumbers
from gvpo_offline.report.dataset.numbers import correlation, quantiles, ratio

GAP_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
_TABLE_CELLS = 1 << 22  # of a table of groups by samplers
# Bounds of length / mean length of the group, for the chart of rewards against length.
LENGTH_RATIOS = (0.0, 0.25, 0.5, 0.7, 0.85, 1.0, 1.15, 1.4, 2.0, 4.0, math.inf)


@dataclass(frozen=True)
class SamplerRewards:
    """Rewards of one sampler's responses.

    Attributes:
        sampler: its name.
        responses, truncated: numbers of responses.
        mean_tokens: mean length.
        mean, deviation: of the rewards; the deviation with n - 1, NaN for one response.
        lowest, highest: reward.
        advantage: mean of reward minus the mean reward of the group.
        share_of_responses: of the responses of groups of unequal rewards.
        share_of_bests: of the best responses of these groups: each group counts 1, which the
            samplers of equally good best responses share by their number.
    """

    sampler: str
    responses: int
    truncated: int
    mean_tokens: float
    mean: float
    deviation: float
    lowest: float
    highest: float
    advantage: float
    share_of_responses: float
    share_of_bests: float

    @property
    def constant(self) -> bool:
        """Whether all of several responses have one reward."""
        return self.responses > 1 and self.lowest == self.highest


@dataclass(frozen=True)
class ByWriter:
    """How much of the rewards' differences within groups the samplers explain.

    The model is reward = constant of the group + constant of the sampler, by least squares. With
    deviations from the group's mean, SS_between is the sum of squares that the samplers' constants
    explain, SS_total = sum (R - mean R of the group)^2, and

        share = SS_between / SS_total
        adjusted = 1 - (1 - share) * (N - G) / (N - G - p)

    for N responses, G groups and p free constants (the number of samplers minus 1 where all of them
    meet in groups). `adjusted` is about 0 if the samplers explain no more than chance.

    Attributes:
        share, adjusted: NaN if no rewards differ or no samplers meet; adjusted also without degrees
            of freedom left.
        constants: p.
        degrees: N - G.
    """

    share: float
    adjusted: float
    constants: int
    degrees: int


@dataclass(frozen=True)
class LengthBin:
    """Responses by length relative to their group's mean length.

    Attributes:
        low, high: bounds of length / mean length.
        responses: how many.
        advantage: mean of reward minus the mean reward of the group.
        error: standard error of that mean; NaN for one response.
    """

    low: float
    high: float
    responses: int
    advantage: float
    error: float


@dataclass(frozen=True)
class ByLength:
    """Rewards against the number of tokens, within groups.

    Attributes:
        correlation: of reward and length, both minus the group's mean, over all responses.
        longest_is_best: of the groups with unequal rewards and unequal lengths, the share in which
            a longest response is a best one (of several longest, the part of them that is).
        by_chance: what that share is on average if length says nothing: the mean over these groups
            of the share of responses that are best.
        bins: responses by relative length.
    """

    correlation: float
    longest_is_best: float
    by_chance: float
    bins: Sequence[LengthBin]


@dataclass(frozen=True)
class ComponentFacts:
    """A component of the reward.

    Attributes:
        name: its name.
        missing: share of responses without it.
        mean, deviation: over the others; the deviation with n - 1.
        lowest, highest: over the others.
        correlation: with the reward, both minus the means over the group's responses that have the
            component.
    """

    name: str
    missing: float
    mean: float
    deviation: float
    lowest: float
    highest: float
    correlation: float


@dataclass(frozen=True)
class RewardFacts:
    """All that the report says of a reward.

    Attributes:
        label: of the reward.
        groups: number of groups that the figures are of.
        mean, deviation, lowest, highest: over all responses.
        distinct: number of different rewards, at most 1,000 are counted.
        equal_groups: groups whose responses all have one reward.
        all_lowest, all_highest: those of them whose reward is the lowest, or the highest, of all.
        gaps: quantiles GAP_QUANTILES of max R - min R over the groups of unequal rewards.
        samplers: by name of the sampler, most responses first.
        by_writer, by_length: see there.
        components: in the order of the reward family.
    """

    label: str
    groups: int
    mean: float
    deviation: float
    lowest: float
    highest: float
    distinct: int
    equal_groups: int
    all_lowest: int
    all_highest: int
    gaps: Sequence[float]
    samplers: Sequence[SamplerRewards]
    by_writer: ByWriter
    by_length: ByLength
    components: Sequence[ComponentFacts]

    @property
    def median_gap(self) -> float:
        """Median of max R - min R over the groups of unequal rewards."""
        return self.gaps[GAP_QUANTILES.index(0.5)]

    @property
    def constant_samplers(self) -> list[SamplerRewards]:
        """Samplers of constant reward, where another one's rewards differ or are others."""
        if self.lowest == self.highest:
            return []
        return [each for each in self.samplers if each.constant]


def reward_facts(
    frame: ResponseNumbers, label: str, components: Sequence[str]
) -> RewardFacts | None:
    """The facts of a frame with rewards; None without rewards or groups.

    Args:
        frame: the responses.
        label: of the reward.
        components: names of the frame's components.
    """
    rewards = frame.rewards
    if rewards is None or not frame.n_groups:
        return None
    best, worst = frame.largest(rewards), frame.smallest(rewards)
    low, high = float(worst.min()), float(best.max())
    unequal = best > worst
    return RewardFacts(
        label=label,
        groups=frame.n_groups,
        mean=float(rewards.mean()),
        deviation=_deviation(rewards),
        lowest=low,
        highest=high,
        distinct=min(len(np.unique(rewards)), 1000),
        equal_groups=int((~unequal).sum()),
        all_lowest=int((best == low).sum()),
        all_highest=int((worst == high).sum()),
        gaps=quantiles((best - worst)[unequal], GAP_QUANTILES),
        samplers=_by_sampler(frame, rewards, best, unequal),
        by_writer=by_writer(frame, rewards),
        by_length=by_length(frame, rewards, best, unequal),
        components=[
            _component(frame, rewards, name, values)
            for name, values in zip(components, frame.components, strict=True)
        ]
        if frame.components is not None
        else [],
    )


def _deviation(values: FloatArray) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _by_sampler(
    frame: ResponseNumbers, rewards: FloatArray, best: FloatArray, unequal: BoolArray
) -> list[SamplerRewards]:
    advantages = frame.centred(rewards)
    in_unequal = np.repeat(unequal, frame.sizes)
    is_best = in_unequal & (rewards == np.repeat(best, frame.sizes))
    parts = is_best / np.repeat(np.maximum(frame.sums(is_best), 1), frame.sizes)
    found = []
    for name, own in frame.by_sampler():
        values = rewards[own]
        found.append(
            SamplerRewards(
                sampler=name,
                responses=len(values),
                truncated=int(frame.truncated[own].sum()),
                mean_tokens=float(frame.lengths[own].mean()),
                mean=float(values.mean()),
                deviation=_deviation(values),
                lowest=float(values.min()),
                highest=float(values.max()),
                advantage=float(advantages[own].mean()),
                share_of_responses=ratio(int(in_unequal[own].sum()), int(in_unequal.sum())),
                share_of_bests=ratio(float(parts[own].sum()), int(unequal.sum())),
            )
        )
    return sorted(found, key=lambda each: (-each.responses, each.sampler))


def by_writer(frame: ResponseNumbers, rewards: FloatArray) -> ByWriter:
    """How much of the differences within groups the samplers explain; see `ByWriter`."""
    deviations = frame.centred(rewards)
    total = float(np.dot(deviations, deviations))
    used, sampler = np.unique(frame.sampler, return_inverse=True)
    n = len(used)
    # Normal equations of the samplers' constants, after the groups' constants are eliminated:
    # A = sum over groups of (diag(n_g) - n_g n_g^T / k_g), c = sum of deviations by sampler.
    normal = np.zeros((n, n))
    at_once = max(1, _TABLE_CELLS // n)
    edges = np.append(frame.starts, len(rewards))
    for first in range(0, frame.n_groups, at_once):
        sizes = frame.sizes[first : first + at_once]
        own = sampler[edges[first] : edges[first + len(sizes)]]
        rows = np.repeat(np.arange(len(sizes)), sizes)
        table = np.bincount(rows * n + own, minlength=len(sizes) * n).reshape(len(sizes), n)
        normal += np.diag(table.sum(0)) - table.T @ (table / sizes[:, None])
    sums = np.bincount(sampler, deviations, n)
    if not (np.isfinite(sums).all() and math.isfinite(total)):
        return ByWriter(math.nan, math.nan, 0, len(rewards) - frame.n_groups)
    constants, _, rank, _ = np.linalg.lstsq(normal, sums, rcond=1e-10)
    degrees = len(rewards) - frame.n_groups
    share = float(constants @ sums) / total if total > 0 and rank else math.nan
    share = min(max(share, 0.0), 1.0) if math.isfinite(share) else share
    left = degrees - int(rank)
    adjusted = 1 - (1 - share) * degrees / left if left > 0 else math.nan
    return ByWriter(share, adjusted, int(rank), degrees)


def by_length(
    frame: ResponseNumbers, rewards: FloatArray, best: FloatArray, unequal: BoolArray
) -> ByLength:
    """Rewards against length within groups; see `ByLength`."""
    lengths = frame.lengths.astype(np.float64)
    advantages, centred = frame.centred(rewards), frame.centred(lengths)
    longest = frame.largest(lengths)
    differing = unequal & (longest > frame.smallest(lengths))
    is_best = rewards == np.repeat(best, frame.sizes)
    is_longest = lengths == np.repeat(longest, frame.sizes)
    hits = frame.sums(is_best & is_longest) / frame.sums(is_longest)
    chance = frame.sums(is_best) / frame.sizes
    means = np.repeat(frame.sums(lengths) / frame.sizes, frame.sizes)
    relative = lengths / means
    place = np.searchsorted(LENGTH_RATIOS, relative, side="right") - 1
    bins = []
    for number in range(len(LENGTH_RATIOS) - 1):
        own = advantages[place == number]
        if len(own):
            error = _deviation(own) / math.sqrt(len(own))
            low, high = LENGTH_RATIOS[number : number + 2]
            bins.append(LengthBin(low, high, len(own), float(own.mean()), error))
    return ByLength(
        correlation(advantages, centred),
        float(hits[differing].mean()) if differing.any() else math.nan,
        float(chance[differing].mean()) if differing.any() else math.nan,
        bins,
    )


def _component(
    frame: ResponseNumbers, rewards: FloatArray, name: str, values: npt.NDArray[np.float64]
) -> ComponentFacts:
    held = ~np.isnan(values)
    own = values[held]
    nothing = math.nan
    if not len(own):
        return ComponentFacts(name, 1.0, nothing, nothing, nothing, nothing, nothing)
    groups = frame.group[held]
    counts = np.bincount(groups, minlength=frame.n_groups)

    def centred(of: FloatArray) -> FloatArray:
        means = np.bincount(groups, of, frame.n_groups) / np.maximum(counts, 1)
        return of - means[groups]

    # Differences that are rounding alone must not look like a correlation.
    one, other = (_without_rounding(centred(of), of) for of in (own, rewards[held]))
    return ComponentFacts(
        name,
        1 - len(own) / len(values),
        float(own.mean()),
        _deviation(own),
        float(own.min()),
        float(own.max()),
        correlation(one, other),
    )


def _without_rounding(centred: FloatArray, values: FloatArray) -> FloatArray:
    """Centred values, 0 where they are within rounding of it."""
    bound = 64 * np.finfo(np.float64).eps * np.abs(values).max(initial=0.0)
    return np.where(np.abs(centred) <= bound, 0.0, centred)
