"""What a beta asks of the policy, and which loss suits a dataset.

At the optimum the log-ratios of a group's best and worst response differ by (max R - min R) / beta
nats. The bounds are those of docs/start/your-logs.md and docs/howto/tuning.md: 1 to 10 nats is what
a policy can reach; the search of `tune` tries 1 to 16 and begins at 4; from 40 on training warns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gvpo_offline.report.dataset.frame import ResponseNumbers
from gvpo_offline.report.dataset.numbers import percent, quantiles
from gvpo_offline.report.dataset.reference import ReferenceFacts
from gvpo_offline.report.dataset.rewards import RewardFacts
from gvpo_offline.train.data_rules import WIDE_GAP_NATS, alpha_of
from gvpo_offline.tune.search import beta_candidates, initial_beta

LEAST_NATS, MOST_NATS = 1.0, 10.0
_SMALLEST = 1e-300  # gap of which betas are numbers
# A log is nearly all wrong if at most this share of responses is better than the lowest reward, or
# if half of the groups have no better one: the log of task "carry" in docs/evidence/results.md has
# 9% and 55%.
FEW_RIGHT, MANY_ALL_WRONG = 0.15, 0.5
# One writer or one habit is much of a log above this share of the responses; that writer is
# nearly always wrong if at most this share of its responses is above the lowest reward.
NARROW, NEARLY_ALWAYS = 0.5, 0.05


@dataclass(frozen=True)
class BetaRow:
    """The implied log-ratio gaps of one beta, over the groups of unequal rewards.

    Attributes:
        beta: in reward per nat.
        low, median, high: quantiles 10%, 50%, 90% of (max R - min R) / beta, nats.
        within: share of groups with 1 to 10 nats.
        beyond: share of groups with more than 40 nats.
        own: whether it is the beta of the settings.
    """

    beta: float
    low: float
    median: float
    high: float
    within: float
    beyond: float
    own: bool


@dataclass(frozen=True)
class BetaFacts:
    """What betas ask for.

    Attributes:
        beta: of the settings.
        median: implied gap of the median group at it, nats.
        first: the beta at which the search of `tune` begins: 4 nats.
        rows: those of tune's candidates and the settings' own, ascending.
    """

    beta: float
    median: float
    first: float
    rows: Sequence[BetaRow]


def beta_facts(frame: ResponseNumbers, beta: float) -> BetaFacts | None:
    """The facts of a frame; None without groups of unequal rewards of a usual size."""
    if frame.rewards is None or not frame.n_groups:
        return None
    gaps = frame.largest(frame.rewards) - frame.smallest(frame.rewards)
    gaps = gaps[(gaps > 0) & np.isfinite(gaps)]
    if not len(gaps):
        return None
    low, median, high = quantiles(gaps, (0.1, 0.5, 0.9))
    if not _SMALLEST < median < 1 / _SMALLEST:
        return None
    candidates = beta_candidates(median)
    rows = []
    for each in sorted({*candidates, beta}):
        nats = gaps / each
        within = (nats >= LEAST_NATS) & (nats <= MOST_NATS)
        rows.append(
            BetaRow(
                each,
                low / each,
                median / each,
                high / each,
                float(within.mean()),
                float((nats > WIDE_GAP_NATS).mean()),
                each == beta,
            )
        )
    return BetaFacts(beta, median / beta, initial_beta(candidates, median), rows)


@dataclass(frozen=True)
class LossAdvice:
    """A row of docs/evidence/results.md#which-loss-to-take, applied to a dataset.

    Attributes:
        applies: whether the figures of the dataset fit the row.
        log: what kind of log it is about.
        take: loss and settings.
        why: the figures of this dataset.
    """

    applies: bool
    log: str
    take: str
    why: str


def loss_advice(rewards: RewardFacts, frame: ResponseNumbers) -> list[LossAdvice]:
    """Which losses suit a dataset, by the rules of docs/evidence/results.md."""
    assert frame.rewards is not None
    above = float((frame.rewards > rewards.lowest).mean())
    all_wrong = rewards.all_lowest / rewards.groups
    two_values = rewards.distinct <= 2
    nearly_all_wrong = two_values and (above <= FEW_RIGHT or all_wrong >= MANY_ALL_WRONG)
    alpha = alpha_of(rewards.all_lowest, rewards.groups)
    few = f"{percent(above)} of the responses have more than the lowest reward, and in "
    few += f"{percent(all_wrong)} of the groups no response has"
    largest = rewards.samplers[0]
    share = largest.responses / len(frame.rewards)
    narrow = share > NARROW and len(rewards.samplers) > 1
    own = frame.rewards[frame.sampler == list(frame.samplers).index(largest.sampler)]
    right = float((own > rewards.lowest).mean())
    said = f"{largest.sampler} wrote {percent(share)} of the responses"
    median_k = float(np.median(frame.sizes))
    graded = not two_values and len(rewards.samplers) > 1 and median_k >= 4
    return [
        LossAdvice(
            graded and not nearly_all_wrong,
            "rewards of several values, several samplers, 4 or more responses to a prompt",
            "gvpo with imitation: auto",
            f"{rewards.distinct:,} different rewards, {len(rewards.samplers):,} samplers, "
            f"{median_k:g} responses in the median group",
        ),
        LossAdvice(
            nearly_all_wrong,
            "right or wrong, and nearly all wrong",
            f"gvpo with imitation: auto (here alpha {alpha:.2g}), or rft",
            few,
        ),
        LossAdvice(nearly_all_wrong, "the same, and the KL must stay small", "awr", few),
        LossAdvice(
            narrow and right > NEARLY_ALWAYS,
            "much of the log by one person or one narrow habit",
            "gvpo with imitation: auto, without imitation of that writer",
            said,
        ),
        LossAdvice(
            narrow and right <= NEARLY_ALWAYS,
            "that person or habit is nearly always wrong",
            "the same, or rft",
            f"{said}, {percent(right)} of them above the lowest reward",
        ),
    ]


def own_answers(reference: ReferenceFacts | None, samplers: int) -> bool:
    """Whether a log seems to be the reference's own answers: one sampler, hardly any unlikely."""
    if reference is None or samplers != 1 or not math.isfinite(reference.per_token):
        return False
    return reference.unlikely <= 0.01 * reference.scored and reference.per_token > -LEAST_NATS
