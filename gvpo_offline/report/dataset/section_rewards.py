"""The section "Rewards"."""

from __future__ import annotations

import math

import numpy as np

from gvpo_offline.report.dataset import candidates as kinds
from gvpo_offline.report.dataset import charts
from gvpo_offline.report.dataset.frame import ResponseNumbers
from gvpo_offline.report.dataset.numbers import cell, percent, plain
from gvpo_offline.report.dataset.rewards import ByLength, ByWriter, RewardFacts
from gvpo_offline.report.page.blocks import (
    Block,
    Column,
    Figure,
    Figures,
    Notice,
    Section,
    Table,
    Text,
)

MOST_SAMPLERS = 30
# From these on, a figure is a warning.
_MANY_EQUAL, _MANY_WRONG, _CORRELATED, _EXPLAINED = 0.5, 0.3, 0.3, 0.3
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
        *_notices(facts),
        _samplers(facts),
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
        Figure("range", f"{plain(facts.lowest)} … {plain(facts.highest)}", _distinct(facts)),
        Figure("median gap", plain(facts.median_gap), "max R - min R where they differ"),
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
            "within groups, -1 … 1",
        ),
        Figure(
            "explained by the writer",
            percent(writer.adjusted),
            "of the differences within groups, adjusted",
        ),
    ]


def _distinct(facts: RewardFacts) -> str:
    return f"{facts.distinct:,}{'+' if facts.distinct == 1000 else ''} different rewards"


def _notices(facts: RewardFacts) -> list[Block]:
    found: list[Block] = []
    equal, wrong = facts.equal_groups / facts.groups, facts.all_lowest / facts.groups
    if facts.equal_groups:
        found.append(
            Notice(
                "error" if equal == 1 else "warning" if equal >= _MANY_EQUAL else "note",
                f"{facts.equal_groups:,} of {facts.groups:,} groups ({percent(equal)}) have equal "
                "rewards: their target is the reference",
                "sample more responses to these prompts, choose harder or easier ones, or leave "
                "the groups out (drop_equal_rewards), which changes the objective",
                kinds.EQUAL,
            )
        )
    if facts.all_lowest and wrong < 1:
        found.append(
            Notice(
                "warning" if wrong >= _MANY_WRONG else "note",
                f"in {facts.all_lowest:,} groups ({percent(wrong)}) every response has the lowest "
                f"reward of the dataset, {plain(facts.lowest)}",
                "set imitation: auto, or sample a right response to these prompts",
                kinds.ALL_WRONG,
            )
        )
    constant = facts.constant_samplers
    if constant:
        names = ", ".join(f"{each.sampler} ({plain(each.mean)})" for each in constant[:5])
        more = f" and {len(constant) - 5} more" if len(constant) > 5 else ""
        found.append(
            Notice(
                "warning",
                f"all responses of a sampler have one reward: {names}{more}",
                "check how its responses were scored: such rewards say who wrote a response, and "
                "not how good it is",
            )
        )
    found += _length_notice(facts.by_length)
    if facts.by_writer.adjusted >= _EXPLAINED:
        found.append(
            Notice(
                "warning",
                f"who wrote a response explains {percent(facts.by_writer.adjusted)} of the "
                "differences of rewards within groups",
                "the policy may learn to write like the best sampler rather than to answer well: "
                "compare with training on one sampler (responses.samplers), and look at the table "
                "by sampler of each evaluation",
            )
        )
    return found


def _length_notice(found: ByLength) -> list[Block]:
    if not abs(found.correlation) >= _CORRELATED:
        return []
    longer = found.correlation > 0
    return [
        Notice(
            "warning",
            f"within groups, the reward {'rises' if longer else 'falls'} with the length of the "
            f"response (correlation {plain(found.correlation, 2)}); a longest response is a best "
            f"one in {percent(found.longest_is_best)} of the groups ({percent(found.by_chance)} by "
            "chance)",
            "read groups with a large gap: if length and not quality is rewarded, correct the "
            "reward, or add a component for brevity"
            if longer
            else "read groups with a large gap: if long responses are bad because they were cut, "
            "raise the limit of tokens or leave cut responses out",
            kinds.GAP,
        )
    ]


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
        labels = [f"{value:.6g}" for value in values]
        rows = [
            {"reward": label, "responses": int(n)} for label, n in zip(labels, counts, strict=True)
        ]
        x = charts.category("reward", "reward")
    else:
        counts, edges = np.histogram(rewards, _HISTOGRAM)
        rows = [
            {"reward": float((a + b) / 2), "responses": int(n)}
            for a, b, n in zip(edges, edges[1:], counts, strict=False)
        ]
        x = charts.quantity("reward", "reward (middle of the bin)")
    spec = charts.bar(x, charts.quantity("responses", "responses"), tooltip=("reward", "responses"))
    return [charts.chart("rewards-histogram", title, summary, spec, rows)]


def _gaps(facts: RewardFacts, frame: ResponseNumbers) -> list[Block]:
    assert frame.rewards is not None
    gaps = frame.largest(frame.rewards) - frame.smallest(frame.rewards)
    widest = float(gaps.max())
    if not (0 < widest < np.inf and widest / 20 > 0):
        return []
    counts, edges = np.histogram(gaps, 20, (0.0, widest))
    rows = [
        {"gap": float((a + b) / 2), "groups": int(n)}
        for a, b, n in zip(edges, edges[1:], counts, strict=False)
    ]
    low, _, middle, _, high = facts.gaps
    summary = (
        f"Of the groups with unequal rewards, the middle gap is {plain(middle)}; 80% lie between "
        f"{plain(low)} and {plain(high)}. {facts.equal_groups:,} groups have none."
    )
    spec = charts.bar(
        charts.quantity("gap", "max R - min R of a group (middle of the bin)"),
        charts.quantity("groups", "groups"),
        tooltip=("gap", "groups"),
    )
    return [charts.chart("rewards-gaps", "Reward gaps within groups", summary, spec, rows)]


def _length(found: ByLength) -> list[Block]:
    rows = [
        {
            "length": _ratio_text(each.low, each.high),
            "advantage": each.advantage,
            "low": each.advantage - _or_zero(each.error),
            "high": each.advantage + _or_zero(each.error),
            "responses": each.responses,
        }
        for each in found.bins
    ]
    x = charts.category("length", "length / mean length of the group")
    title = "reward - mean reward of the group"
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
    return f"{low:g} and more" if math.isinf(high) else f"{low:g}-{high:g}"


def _writer_text(found: ByWriter) -> str:
    if not math.isfinite(found.share):
        return (
            "How much of the rewards the sampler explains cannot be said: no rewards differ within "
            "groups, or the responses of each group are of one sampler."
        )
    return (
        f"Who wrote a response explains {percent(found.share)} of the differences of rewards "
        f"within groups, {percent(found.adjusted)} after adjustment: with a constant for each "
        "group and each sampler fitted by least squares, the sum of squares of the samplers' "
        "constants over the sum of squares of R - mean R of the group; "
        "adjusted = 1 - (1 - share) · (N - G) / (N - G - p) with "
        f"N - G = {found.degrees:,} and p = {found.constants} free constants. About 0 means no "
        "more than chance."
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
