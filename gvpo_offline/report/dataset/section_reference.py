"""The section "Reference"."""

from __future__ import annotations

import math
from typing import Any

from gvpo_offline.report.dataset import candidates as kinds
from gvpo_offline.report.dataset import charts
from gvpo_offline.report.dataset.numbers import cell, percent, plain
from gvpo_offline.report.dataset.reference import (
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
    Notice,
    Section,
    Table,
    Text,
)

MOST_SAMPLERS, MOST_LINES = 30, 8
# A model gives its own first and last tokens about -1.6 and -2.5 nats on average, and wrong ones
# about -13 (docs/howto/tokens.md).
EDGE_NATS = -6.0
_MANY_UNLIKELY, _MANY_CUT = 0.1, 0.05
LOOK_FOR = (
    "Answers that a model would write itself have -3 to 0 nats per token. Far lower values of one "
    "sampler mean that the policy hardly imitates it; far lower values of all, or of first or last "
    "tokens alone, mean a wrong chat template, a wrong end token or another tokenizer: look at the "
    "groups with gvpo-offline show and import the log again."
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
        blocks += [Figures(_figures(facts)), *_notices(facts), _samplers(facts), _histogram(facts)]
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


def _notices(facts: ReferenceFacts) -> list[Block]:
    found: list[Block] = []
    share = facts.unlikely / max(facts.scored, 1)
    if facts.unlikely:
        names = [each for each in facts.samplers if each.unlikely >= max(_MANY_UNLIKELY, 2 * share)]
        by = ", mostly of " + ", ".join(each.sampler for each in names[:5]) if names else ""
        found.append(
            Notice(
                "warning" if share >= _MANY_UNLIKELY else "note",
                f"the reference would hardly say {facts.unlikely:,} responses ({percent(share)}) "
                f"in {facts.groups_with_unlikely:,} groups{by}",
                "read some of them: the policy learns to prefer them, but will not write them; "
                "tune and the metrics likely_* give them little weight",
                kinds.UNLIKELY,
            )
        )
    if facts.unlikely_best >= _MANY_UNLIKELY:
        found.append(
            Notice(
                "warning",
                f"in {percent(facts.unlikely_best)} of the groups with unequal rewards every best "
                "response is one that the reference would hardly say",
                "add good responses that the policy can reach: sample from it, and score",
                kinds.UNLIKELY,
            )
        )
    for which, edge, cause in (
        ("first", facts.first, "the prompt does not end as the model expects: chat template"),
        ("last", facts.last, "responses end with another token than the model's: end token"),
    ):
        if edge is not None and edge.mean < EDGE_NATS:
            found.append(
                Notice(
                    "warning",
                    f"the {which} token of a response has {plain(edge.mean)} nats on average, "
                    "where a model's own answers have about -2",
                    f"probably {cause}; see docs/howto/tokens.md and import the log again",
                    kinds.LOWEST,
                )
            )
    return found


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
    rows = [
        {
            "nats": f"below {high:g}" if math.isinf(low) else f"{low:g} … {high:g}",
            "responses": count,
        }
        for low, high, count in facts.histogram
    ]
    spec = charts.bar(
        charts.category("nats", "log-prob per token, nats"),
        charts.quantity("responses", "responses"),
        tooltip=("nats", "responses"),
    )
    summary = f"Mean {plain(facts.per_token)} nats per token over {facts.scored:,} responses."
    return charts.chart(
        "reference-histogram", "Log-prob per token of the responses", summary, spec, rows
    )


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
            "A model's own answers have about -1.6 at the first token and -2.5 at the last. Values "
            "near -13 at the first token mean a wrong template, at the last a wrong end token.",
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
            "position": each.positions,
            "nats": each.mean,
            "tokens": each.tokens,
        }
        for each in sorted(held, key=lambda each: (each.first, shown.index(each.sampler)))
    ]
    if not rows:
        return []
    spec = charts.line(
        charts.category("position", "position of the token in the response"),
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
        Notice(
            "warning" if cut.share >= _MANY_CUT else "note",
            f"{cut.responses:,} responses ({percent(cut.share)}) in {cut.groups:,} groups were cut "
            f"at a limit of tokens{rewards}{best}",
            "they have no end token, and their reward is of a part of an answer: sample them again "
            "with a higher limit, or leave their groups out (where: NOT ARRAY_CONTAINS(truncated, "
            "TRUE))",
            kinds.TRUNCATED,
        )
    ]
