"""The section "Rewards"."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gvpo_offline.report.dataset import charts
from gvpo_offline.report.dataset.frame import ResponseNumbers
from gvpo_offline.report.dataset.numbers import MINUS, cell, interval, percent, plain
from gvpo_offline.report.dataset.rewards import ByLength, ByWriter, RewardFacts
from gvpo_offline.report.page.blocks import (
    Block,
    Column,
    Figure,
    Figures,
    Section,
    Table,
    Text,
)

MOST_SAMPLERS = 30
_HISTOGRAM = 40
LOOK_FOR = (
    "Groups whose rewards differ teach; groups of equal rewards only hold the policy at the "
    "reference. Look for samplers whose reward never changes, for rewards that follow the length, "
    "and for rewards that say who wrote an answer and not how good it is: each of them is what the "
    "policy will learn."
)


def rewards_section(facts: RewardFacts | None, frame: ResponseNumbers) -> Section:
    """The section of a dataset; without rewards it says how to add some."""
    if facts is None or frame.rewards is None:
        text = "The dataset has no reward. " if frame.n_groups else "There are no groups. "
        remedy = "Compute one with gvpo-offline reward, or import a log that has a reward column."
        return Section("rewards", "Rewards", LOOK_FOR, [Text(text + remedy)])
    blocks: list[Block] = [
        Figures(_figures(facts)),
        _samplers(facts),
        *_constant(facts),
        *_histogram(facts, frame.rewards),
        *_gaps(facts, frame),
        *_length(facts.by_length),
        Text(_writer_text(facts.by_writer)),
    ]
    if facts.components:
        blocks.append(_components(facts))
    return Section("rewards", "Rewards", LOOK_FOR, blocks)


def _figures(facts: RewardFacts) -> list[Figure]:
    writer = facts.by_writer
    return [
        Figure("mean reward", plain(facts.mean), f"± {plain(facts.deviation)} (deviation)"),
        Figure("range", f"{plain(facts.lowest)} to {plain(facts.highest)}", _distinct(facts)),
        Figure("median gap", plain(facts.median_gap), f"max R {MINUS} min R where they differ"),
        Figure(
            "equal rewards",
            percent(facts.equal_groups / facts.groups),
            f"{facts.equal_groups:,} of {facts.groups:,} groups",
        ),
        Figure(
            "all lowest",
            percent(facts.all_lowest / facts.groups),
            f"{facts.all_lowest:,} groups; all highest: {facts.all_highest:,}",
        ),
        Figure(
            "correlation with length",
            plain(facts.by_length.correlation, 2),
            f"within groups, {MINUS}1 to 1",
        ),
        Figure(
            "explained by the writer",
            percent(writer.adjusted),
            "of the differences within groups, adjusted",
        ),
    ]


def _distinct(facts: RewardFacts) -> str:
    return f"{facts.distinct:,}{'+' if facts.distinct == 1000 else ''} different rewards"


def _constant(facts: RewardFacts) -> list[Block]:
    """Which samplers have one reward for all responses; the check says whether that is wrong."""
    constant = facts.constant_samplers
    if not constant:
        return []
    names = ", ".join(f"{each.sampler} ({plain(each.mean)})" for each in constant[:5])
    more = f" and {len(constant) - 5} more" if len(constant) > 5 else ""
    return [Text(f"All responses of a sampler have one reward: {names}{more}.")]


def _samplers(facts: RewardFacts) -> Table:
    rows = [
        (
            each.sampler,
            each.responses,
            each.mean,
            cell(each.deviation),
            cell(each.advantage),
            cell(each.share_of_responses),
            cell(each.share_of_bests),
            each.mean_tokens,
            each.truncated / each.responses,
        )
        for each in facts.samplers[:MOST_SAMPLERS]
    ]
    left = len(facts.samplers) - len(rows)
    return Table(
        "rewards-samplers",
        "Rewards by sampler",
        [
            Column("sampler"),
            Column("responses", "count"),
            Column("mean", "number"),
            Column("deviation", "number", explanation="Standard deviation, with n - 1."),
            Column(
                "above the group",
                "number",
                explanation="Mean of the reward minus the mean reward of the group.",
            ),
            Column(
                "share of responses",
                "share",
                explanation="Of the responses of groups with unequal rewards.",
            ),
            Column(
                "share of bests",
                "share",
                explanation="Of the best responses of these groups. Each group counts 1, which "
                "equally good best responses share. Compare with the share of responses.",
            ),
            Column("mean tokens", "number"),
            Column("cut", "share", explanation="Responses that a limit of tokens ended."),
        ],
        rows,
        f"{left:,} samplers with fewer responses are left out." if left > 0 else "",
    )


def _histogram(facts: RewardFacts, rewards: np.ndarray) -> list[Block]:
    values, counts = np.unique(rewards, return_counts=True)
    title = "Rewards of the responses"
    common = values[int(counts.argmax())]
    summary = (
        f"Mean {plain(facts.mean)}, from {plain(facts.lowest)} to {plain(facts.highest)}; the most "
        f"frequent reward is {plain(float(common))}, of {percent(counts.max() / len(rewards))}."
    )
    if len(values) > _HISTOGRAM and not np.isfinite(values[-1] - values[0]):
        return []  # no bins of equal width
    if len(values) <= _HISTOGRAM:
        rows: list[dict[str, Any]] = [
            {"reward": label, "responses": int(n)}
            for label, n in zip(reward_labels(values), counts, strict=True)
        ]
        x = charts.category("reward", "reward", axis=charts.UPRIGHT)
    else:
        counts, edges = np.histogram(rewards, _HISTOGRAM)
        rows = charts.bins(edges.tolist(), counts.tolist(), "reward", "responses")
        return [charts.histogram("rewards-histogram", title, summary, "reward", "reward", rows)]
    spec = charts.bar(x, charts.quantity("responses", "responses"), tooltip=("reward", "responses"))
    return [charts.chart("rewards-histogram", title, summary, spec, rows)]


def _gaps(facts: RewardFacts, frame: ResponseNumbers) -> list[Block]:
    assert frame.rewards is not None
    gaps = frame.largest(frame.rewards) - frame.smallest(frame.rewards)
    widest = float(gaps.max())
    if not (0 < widest < np.inf and widest / 20 > 0):
        return []
    counts, edges = np.histogram(gaps, 20, (0.0, widest))
    rows = charts.bins(edges.tolist(), counts.tolist(), "gap", "groups")
    low, _, middle, _, high = facts.gaps
    summary = (
        f"Of the groups with unequal rewards, the middle gap is {plain(middle)}; 80% lie between "
        f"{plain(low)} and {plain(high)}. {facts.equal_groups:,} groups have none."
    )
    title = f"max R {MINUS} min R of a group"
    name = "Reward gaps within groups"
    return [charts.histogram("rewards-gaps", name, summary, "gap", title, rows)]


def reward_labels(values: np.ndarray) -> list[str]:
    """The values with three significant digits, or as many as tell them apart."""
    for digits in (3, 6, 9, 17):
        labels = [plain(float(value), digits) for value in values]
        if len(set(labels)) == len(labels):
            break
    return labels


def _length(found: ByLength) -> list[Block]:
    rows = [
        {
            "length": _ratio_text(each.low, each.high),
            "ratio": _middle(each.low, each.high),
            "advantage": each.advantage,
            "low": each.advantage - _or_zero(each.error),
            "high": each.advantage + _or_zero(each.error),
            "responses": each.responses,
        }
        for each in found.bins
    ]
    ends = [0.25, 0.5, 0.7, 1, 1.4, 2, 4]
    x = charts.quantity(
        "ratio",
        "length / mean length of the group",
        scale={"type": "log", "domain": [0.15, 6.5], "nice": False},
        axis={"values": ends, "format": "~g", **charts.UPRIGHT},
    )
    title = f"reward {MINUS} mean reward of the group"
    spec = charts.layers(
        charts.whiskers(x, "low", "high", title),
        charts.point(x, charts.quantity("advantage", title), tooltip=("length", "responses")),
    )
    summary = (
        f"Correlation of reward and length within groups: {plain(found.correlation, 2)}. A longest "
        f"response is a best one in {percent(found.longest_is_best)} of the groups with unequal "
        f"rewards and lengths; {percent(found.by_chance)} would be chance. Lines: ± standard error."
    )
    return [charts.chart("rewards-length", "Reward against length", summary, spec, rows)]


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _ratio_text(low: float, high: float) -> str:
    if not low:
        return f"below {high:g}"
    return f"{low:g} and more" if math.isinf(high) else interval(f"{low:g}", f"{high:g}")


def _middle(low: float, high: float) -> float:
    """Where a bin stands on a logarithmic axis: its geometric middle; beyond an open end."""
    if not low:
        return high / math.sqrt(2)
    return low * math.sqrt(2) if math.isinf(high) else math.sqrt(low * high)


def _writer_text(found: ByWriter) -> str:
    if not math.isfinite(found.share):
        return (
            "How much of the rewards the sampler explains cannot be said: no rewards differ within "
            "groups, or the responses of each group are of one sampler."
        )
    return (
        f"Who wrote a response explains {percent(found.adjusted)} of the differences of rewards "
        "within groups: the adjusted R squared of a regression on the samplers' names "
        f"({percent(found.share)} unadjusted, {found.degrees:,} degrees of freedom and "
        f"{found.constants} constants). About 0 means no more than chance."
    )


def _components(facts: RewardFacts) -> Table:
    rows = [
        (
            each.name,
            each.missing,
            cell(each.mean),
            cell(each.deviation),
            cell(each.lowest),
            cell(each.highest),
            cell(each.correlation),
        )
        for each in facts.components
    ]
    idle = [each.name for each in facts.components if each.lowest == each.highest]
    note = f"Always the same, so without effect within groups: {', '.join(idle)}." if idle else ""
    return Table(
        "rewards-components",
        f"Components of {facts.label}",
        [
            Column("component"),
            Column("missing", "share"),
            *(Column(name, "number") for name in ("mean", "deviation", "lowest", "highest")),
            Column(
                "correlation",
                "number",
                explanation="With the reward, within groups: which component decides.",
            ),
        ],
        rows,
        note,
    )
