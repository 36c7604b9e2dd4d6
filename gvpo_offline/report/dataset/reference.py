"""What the reference says of the responses: log-probs, coverage, first and last tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gvpo_offline.group import BoolArray, FloatArray
from gvpo_offline.report.dataset.frame import ResponseNumbers
from gvpo_offline.report.dataset.numbers import quantiles, ratio
from gvpo_offline.report.dataset.positions import EDGES, PositionSums, range_text

# The rule of the metrics that begin with likely_ (`losses.likelihood`): a response is unlikely if
# its log-prob per token is this many nats below the median of its group.
SLACK = 2.0
QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class SamplerReference:
    """One sampler's responses under the reference; of those that are scored.

    Attributes:
        sampler: its name.
        responses: scored ones.
        per_token: mean over responses of log-prob / tokens that count, nats.
        low, median, high: quantiles 5%, 50%, 95% of it.
        unlikely: share of responses that are unlikely; see `SLACK`.
        first, last: mean log-prob of the first token, and of the last of responses that were not
            cut, nats; NaN where log-probs of tokens are not stored.
        truncated: share of all its responses that were cut.
    """

    sampler: str
    responses: int
    per_token: float
    low: float
    median: float
    high: float
    unlikely: float
    first: float
    last: float
    truncated: float


@dataclass(frozen=True)
class PositionBin:
    """Tokens of a sampler in a range of positions.

    Attributes:
        sampler: its name.
        positions: the range, as text, counted from 0.
        first: its first position.
        tokens: how many count.
        mean: their mean log-prob, nats.
    """

    sampler: str
    positions: str
    first: int
    tokens: int
    mean: float


@dataclass(frozen=True)
class EdgeTokens:
    """Log-probs of first or last tokens, nats.

    Attributes:
        responses: how many.
        mean: of their log-probs.
        low, median, high: quantiles 5%, 50%, 95%.
    """

    responses: int
    mean: float
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Truncation:
    """Responses that were cut.

    Attributes:
        responses: how many.
        share: of all responses.
        groups: groups with at least one.
        mean_reward, mean_reward_of_others: NaN without a reward.
        best: share of the groups of unequal rewards with a cut response among their best ones.
    """

    responses: int
    share: float
    groups: int
    mean_reward: float
    mean_reward_of_others: float
    best: float


@dataclass(frozen=True)
class ReferenceFacts:
    """All that the report says of a reference.

    Attributes:
        scored, unscored: numbers of responses with and without a log-prob.
        per_token: mean over responses of log-prob / tokens that count, nats.
        unlikely: number of responses that the reference would hardly say; see `SLACK`.
        groups_with_unlikely: groups with at least one.
        unlikely_best: of the groups of unequal rewards, the share whose best responses are all
            unlikely.
        histogram: (low, high, responses) of log-prob per token by bins of half a nat; the first one
            has no lower bound.
        samplers: most responses first.
        positions: by sampler and range; empty where log-probs of tokens are not stored.
        first, last, last_of_cut: None where they are not stored. `last`: of responses that were
            not cut.
    """

    scored: int
    unscored: int
    per_token: float
    unlikely: int
    groups_with_unlikely: int
    unlikely_best: float
    histogram: Sequence[tuple[float, float, int]]
    samplers: Sequence[SamplerReference]
    positions: Sequence[PositionBin]
    first: EdgeTokens | None
    last: EdgeTokens | None
    last_of_cut: EdgeTokens | None


def unlikely_responses(frame: ResponseNumbers, per_token: FloatArray) -> BoolArray:
    """(N,) whether a response's log-prob per token is more than SLACK below its group's median.

    Of an even number of responses the median is the more likely of the middle two. Responses that
    are not scored (NaN) are not unlikely, and not part of the median.
    """
    return unlikely_of(per_token, frame.group, frame.n_groups)


def unlikely_of(per_token: FloatArray, group: np.ndarray, n_groups: int) -> BoolArray:
    """As `unlikely_responses`; `group`: (N,) the group of each response, ascending."""
    scored = np.flatnonzero(~np.isnan(per_token))
    order = scored[np.lexsort((per_token[scored], group[scored]))]
    sizes = np.bincount(group[scored], minlength=n_groups)
    ends = np.cumsum(sizes)
    held = sizes > 0
    median = np.full(n_groups, math.nan)
    median[held] = per_token[order[(ends - 1 - (sizes - 1) // 2)[held]]]
    with np.errstate(invalid="ignore"):
        return np.asarray(per_token < median[group] - SLACK)


def reference_facts(frame: ResponseNumbers, positions: PositionSums) -> ReferenceFacts | None:
    """The facts of a frame with a reference; None without one or without groups."""
    if frame.ref is None or not frame.n_groups:
        return None
    per_token = frame.ref / frame.counted
    scored = ~np.isnan(per_token)
    unlikely = unlikely_responses(frame, per_token)
    first, last = frame.first, frame.last
    return ReferenceFacts(
        scored=int(scored.sum()),
        unscored=int((~scored).sum()),
        per_token=float(per_token[scored].mean()) if scored.any() else math.nan,
        unlikely=int(unlikely.sum()),
        groups_with_unlikely=int((frame.sums(unlikely) > 0).sum()),
        unlikely_best=_unlikely_best(frame, unlikely),
        histogram=_histogram(per_token[scored]),
        samplers=_by_sampler(frame, per_token, unlikely),
        positions=_positions(frame, positions),
        first=None if first is None else _edge(first),
        last=None if last is None else _edge(last[~frame.truncated]),
        last_of_cut=None if last is None else _edge(last[frame.truncated]),
    )


def _unlikely_best(frame: ResponseNumbers, unlikely: BoolArray) -> float:
    if frame.rewards is None:
        return math.nan
    best = frame.largest(frame.rewards)
    unequal = best > frame.smallest(frame.rewards)
    is_best = frame.rewards == np.repeat(best, frame.sizes)
    all_unlikely = frame.sums(is_best & ~unlikely) == 0
    return ratio(int((all_unlikely & unequal).sum()), int(unequal.sum()))


BIN, _BINS = 0.5, 24  # nats, and bins from 0 downwards


def _histogram(per_token: FloatArray) -> list[tuple[float, float, int]]:
    place = np.clip(np.floor(-per_token / BIN), 0, _BINS).astype(int)
    counts = np.bincount(place, minlength=_BINS + 1)
    used = np.flatnonzero(counts)
    if not len(used):
        return []
    found = [
        (-BIN * (n + 1) if n < _BINS else -math.inf, -BIN * n + 0.0, int(counts[n]))
        for n in range(int(used[0]), int(used[-1]) + 1)
    ]
    return found[::-1]


def _mean(values: npt.NDArray[Any]) -> float:
    held = values[~np.isnan(values)]
    return float(held.astype(np.float64).mean()) if len(held) else math.nan


def _edge(values: npt.NDArray[Any]) -> EdgeTokens:
    held = values[~np.isnan(values)].astype(np.float64)
    return EdgeTokens(len(held), _mean(held), *quantiles(held, QUANTILES))


def _by_sampler(
    frame: ResponseNumbers, per_token: FloatArray, unlikely: BoolArray
) -> list[SamplerReference]:
    found = []
    for name, own in frame.by_sampler():
        values = per_token[own]
        values = values[~np.isnan(values)]
        first = math.nan if frame.first is None else _mean(frame.first[own])
        last = math.nan if frame.last is None else _mean(frame.last[own[~frame.truncated[own]]])
        low, median, high = quantiles(values, QUANTILES)
        found.append(
            SamplerReference(
                sampler=name,
                responses=len(values),
                per_token=_mean(values),
                low=low,
                median=median,
                high=high,
                unlikely=ratio(int(unlikely[own].sum()), len(values)),
                first=first,
                last=last,
                truncated=float(frame.truncated[own].mean()),
            )
        )
    return sorted(found, key=lambda each: (-each.responses, each.sampler))


def _positions(frame: ResponseNumbers, held: PositionSums) -> list[PositionBin]:
    found = []
    for code, name in enumerate(frame.samplers):
        for number in range(len(EDGES)):
            tokens = int(held.counts[code, number])
            if tokens:
                mean = float(held.sums[code, number]) / tokens
                found.append(
                    PositionBin(name, range_text(number), int(EDGES[number]), tokens, mean)
                )
    return found


def truncation(frame: ResponseNumbers) -> Truncation:
    """Responses that were cut."""
    cut = frame.truncated
    rewards = frame.rewards
    kept_mean = cut_mean = best_share = math.nan
    if rewards is not None and frame.n_groups:
        cut_mean, kept_mean = _mean(rewards[cut]), _mean(rewards[~cut])
        best = frame.largest(rewards)
        unequal = best > frame.smallest(rewards)
        among = frame.sums(cut & (rewards == np.repeat(best, frame.sizes))) > 0
        best_share = ratio(int((among & unequal).sum()), int(unequal.sum()))
    return Truncation(
        int(cut.sum()),
        ratio(int(cut.sum()), len(cut)),
        int((frame.sums(cut) > 0).sum()),
        cut_mean,
        kept_mean,
        best_share,
    )
