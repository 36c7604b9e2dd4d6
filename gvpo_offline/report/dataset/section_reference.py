"""The section "Reference"."""

from __future__ import annotations

import math
from typing import Any

from gvpo_offline.report.dataset import candidates as kinds
from gvpo_offline.report.dataset import charts
from gvpo_offline.report.dataset.numbers import MINUS, cell, counted, interval, percent, plain
from gvpo_offline.report.dataset.reference import (
    BIN,
    SLACK,
    EdgeTokens,
    ReferenceFacts,
    Truncation,
)
from gvpo_offline.report.page.blocks import (
    Block,
    Chart,
    Column,
    Figure,
    Figures,
    Section,
    Table,
    Text,
)

MOST_SAMPLERS, MOST_LINES = 30, 8
_MANY_UNLIKELY = 0.1  # of a sampler's responses, to be named
LOOK_FOR = (
    f"Answers that a model would write itself have {MINUS}3 to 0 nats per token. Far lower values "
    "of one sampler mean that the policy hardly imitates it; far lower values of all, or of first "
    "or last tokens alone, mean a wrong chat template, a wrong end token or another tokenizer: "
    "look at the groups with `gvpo-offline show` and import the log again."
)


def reference_section(
    facts: ReferenceFacts | None, cut: Truncation | None, *, has_groups: bool
) -> Section:
    """The section of a dataset; without a reference it says how to score one."""
    blocks: list[Block] = []
    if facts is None:
        blocks.append(
            Text(
                "The dataset has no reference log-probs. Score them with gvpo-offline reference."
                if has_groups
                else "There are no groups."
            )
        )
    else:
        blocks += [Figures(_figures(facts)), *_unlikely(facts), _samplers(facts), _histogram(facts)]
        blocks += _edges(facts)
        blocks += _positions(facts)
    if cut is not None:
        blocks += _truncation(cut)
    return Section("reference", "Reference", LOOK_FOR, blocks)


def _figures(facts: ReferenceFacts) -> list[Figure]:
    found = [
        Figure("log-prob per token", f"{plain(facts.per_token)} nats", "mean over responses"),
        Figure(
            "hardly said",
            percent(facts.unlikely / max(facts.scored, 1)),
            f"{facts.unlikely:,} responses, more than {SLACK:g} nats per token below the median of "
            "their group",
        ),
        Figure("scored", f"{facts.scored:,}", f"{facts.unscored:,} responses are not"),
    ]
    for name, edge in (("first token", facts.first), ("last token", facts.last)):
        if edge is not None and edge.responses:
            found.append(Figure(name, f"{plain(edge.mean)} nats", "mean"))
    return found


def _unlikely(facts: ReferenceFacts) -> list[Block]:
    """Which responses the policy can hardly reach: a comparison within groups, not a fault."""
    if not facts.unlikely:
        return []
    share = facts.unlikely / max(facts.scored, 1)
    names = [each for each in facts.samplers if each.unlikely >= max(_MANY_UNLIKELY, 2 * share)]
    by = ", mostly of " + ", ".join(each.sampler for each in names[:5]) if names else ""
    best = ""
    if facts.unlikely_best > 0:
        best = (
            f" In {percent(facts.unlikely_best)} of the groups with unequal rewards every best "
            "response is such a one."
        )
    return [
        Text(
            f"The reference would hardly say {counted(facts.unlikely, 'response')} "
            f"({percent(share)}) in {counted(facts.groups_with_unlikely, 'group')}{by}: they have "
            f"more than {SLACK:g} nats per token less than the median of their group.{best} The "
            "policy learns to prefer them but will not write them; tune and the metrics likely_* "
            "give them little weight.",
            kinds.UNLIKELY,
        )
    ]


def _samplers(facts: ReferenceFacts) -> Table:
    rows = [
        (
            each.sampler,
            each.responses,
            cell(each.per_token),
            cell(each.low),
            cell(each.median),
            cell(each.high),
            cell(each.unlikely),
            cell(each.first),
            cell(each.last),
            cell(each.truncated),
        )
        for each in facts.samplers[:MOST_SAMPLERS]
    ]
    left = len(facts.samplers) - len(rows)
    return Table(
        "reference-samplers",
        "Reference log-probs by sampler, nats per token",
        [
            Column("sampler"),
            Column("responses", "count"),
            *(Column(name, "number") for name in ("mean", "5%", "median", "95%")),
            Column(
                "hardly said",
                "share",
                explanation=f"Responses more than {SLACK:g} nats per token below the median of "
                "their group: those that the metrics likely_* give less weight.",
            ),
            Column("first token", "number", explanation="Mean, nats; stored log-probs only."),
            Column(
                "last token", "number", explanation="Mean, nats; of responses that were not cut."
            ),
            Column("cut", "share", explanation="Responses that a limit of tokens ended."),
        ],
        rows,
        f"{left:,} samplers with fewer responses are left out." if left > 0 else "",
    )


def _histogram(facts: ReferenceFacts) -> Chart:
    # The first bin may have no lower bound: its bar is as wide as the next one.
    lows = [high - BIN if math.isinf(low) else low for low, high, _ in facts.histogram]
    rows = [
        {
            "nats": f"below {plain(high)}"
            if math.isinf(low)
            else interval(plain(low), plain(high)),
            "low": left,
            "high": high,
            "responses": count,
        }
        for left, (low, high, count) in zip(lows, facts.histogram, strict=True)
    ]
    summary = f"Mean {plain(facts.per_token)} nats per token over {facts.scored:,} responses."
    if facts.histogram and math.isinf(facts.histogram[0][0]):
        summary += f" The first bar also holds all {facts.histogram[0][2]:,} lower values."
    title = "Log-prob per token of the responses"
    axis = "log-prob per token, nats"
    return charts.histogram("reference-histogram", title, summary, "nats", axis, rows)


def _range(low: float, high: float) -> str:
    return f"below {plain(high)}" if math.isinf(low) else interval(plain(low), plain(high))


def _edges(facts: ReferenceFacts) -> list[Block]:
    held = [
        ("first token", facts.first),
        ("last token of responses that were not cut", facts.last),
        ("last token of cut responses", facts.last_of_cut),
    ]
    rows = [_edge_row(name, edge) for name, edge in held if edge is not None and edge.responses]
    if not rows:
        return [
            Text(
                "Log-probs of single tokens are not stored, so nothing can be said of first and "
                "last tokens. gvpo-offline reference stores them."
            )
        ]
    return [
        Table(
            "reference-edges",
            "First and last tokens, nats",
            [
                Column("token"),
                Column("responses", "count"),
                *(Column(name, "number") for name in ("mean", "5%", "median", "95%")),
            ],
            rows,
            f"A model's own answers have about {MINUS}1.6 at the first token and {MINUS}2.5 at the "
            f"last. Values near {MINUS}13 at the first token mean a wrong template, at the last a "
            "wrong end token.",
        )
    ]


def _edge_row(name: str, edge: EdgeTokens) -> tuple[str | int | float | None, ...]:
    numbers = (edge.mean, edge.low, edge.median, edge.high)
    return (name, edge.responses, *map(cell, numbers))


def _positions(facts: ReferenceFacts) -> list[Block]:
    shown = [each.sampler for each in facts.samplers[:MOST_LINES]]
    held = [each for each in facts.positions if each.sampler in shown]
    rows: list[dict[str, Any]] = [
        {
            "sampler": each.sampler,
            "position": each.positions.replace("-", "\N{EN DASH}"),
            "nats": each.mean,
            "tokens": each.tokens,
        }
        for each in sorted(held, key=lambda each: (each.first, shown.index(each.sampler)))
    ]
    if not rows:
        return []
    spec = charts.line(
        charts.category("position", "position of the token in the response", axis=charts.UPRIGHT),
        charts.quantity("nats", "mean log-prob, nats"),
        color=charts.category("sampler", "sampler"),
        tooltip=("sampler", "position", "nats", "tokens"),
    )
    lowest = min(rows, key=lambda row: float(row["nats"]))
    left = len(facts.samplers) - len(shown)
    summary = (
        f"The lowest mean is {plain(float(lowest['nats']))} nats, of {lowest['sampler']} at "
        f"position {lowest['position']}."
        + (f" {left} samplers with fewer responses are left out." if left > 0 else "")
    )
    title = "Log-prob of a token by its position"
    return [charts.chart("reference-positions", title, summary, spec, rows, height=280)]


def _truncation(cut: Truncation) -> list[Block]:
    if not cut.responses:
        return [Text("No response is marked as cut at a limit of tokens.")]
    rewards = ""
    if math.isfinite(cut.mean_reward) and math.isfinite(cut.mean_reward_of_others):
        rewards = (
            f"; their mean reward is {plain(cut.mean_reward)}, that of the others "
            f"{plain(cut.mean_reward_of_others)}"
        )
    best = ""
    if cut.best > 0:
        best = f"; in {percent(cut.best)} of the groups with unequal rewards one is a best response"
    return [
        Text(
            f"{counted(cut.responses, 'response')} ({percent(cut.share)}) in "
            f"{counted(cut.groups, 'group')} were cut at a limit of tokens{rewards}{best}. They "
            "have no end token, and their reward is of a part of an answer.",
            kinds.TRUNCATED,
        )
    ]
