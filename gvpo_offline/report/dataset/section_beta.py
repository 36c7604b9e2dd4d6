"""The section "β and the loss"."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gvpo_offline.report.dataset import charts
from gvpo_offline.report.dataset.beta import (
    LEAST_NATS,
    MOST_NATS,
    BetaFacts,
    LossAdvice,
    own_answers,
)
from gvpo_offline.report.dataset.numbers import MINUS, percent, plain
from gvpo_offline.report.dataset.reference import ReferenceFacts
from gvpo_offline.report.dataset.rewards import RewardFacts
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
from gvpo_offline.train.data_rules import WIDE_GAP_NATS

LOOK_FOR = (
    "At the optimum, the log-ratios of a group's best and worst response differ by "
    f"(max R {MINUS} min R)/β nats. {LEAST_NATS:g} to {MOST_NATS:g} nats is what a policy can "
    "reach: take a β whose median lies there, about 4 nats to begin with; gvpo-offline tune can "
    "choose it."
)


def beta_section(
    facts: BetaFacts | None,
    losses: Sequence[LossAdvice],
    rewards: RewardFacts | None,
    reference: ReferenceFacts | None,
) -> Section:
    """The section of a dataset; without rewards that differ it says that nothing can be learned."""
    blocks: list[Block] = []
    if rewards is None:
        blocks.append(Text("Without rewards there is no gap to divide by β."))
    elif facts is None and rewards.equal_groups < rewards.groups:
        blocks.append(Text("The rewards' differences are too large or small to be divided by β."))
    elif facts is None:
        blocks.append(
            Text(
                "Every group has equal rewards: the optimum is the reference at any β, so nothing "
                "can be learned."
            )
        )
    else:
        blocks += [Figures(_figures(facts)), Text(first_text(facts)), _chart(facts), _table(facts)]
    if losses and facts is not None:
        blocks += _losses(losses, rewards, reference)
    return Section("beta", "β and the loss", LOOK_FOR, blocks)


def _figures(facts: BetaFacts) -> list[Figure]:
    own = next(row for row in facts.rows if row.own)
    return [
        Figure(f"median gap at β {facts.beta:g}", f"{plain(facts.median)} nats"),
        Figure(
            "groups within reach",
            percent(own.within),
            f"{LEAST_NATS:g} to {MOST_NATS:g} nats, of the groups with unequal rewards",
        ),
        Figure("β to begin with", f"{facts.first:g}", "about 4 nats; where tune begins"),
    ]


def first_text(facts: BetaFacts) -> str:
    """Which beta to begin with, and why."""
    gap = facts.median * facts.beta / facts.first
    other = ""
    if facts.first != facts.beta:
        edge = any(math.isclose(facts.median, nats) for nats in (LEAST_NATS, MOST_NATS))
        within = LEAST_NATS <= facts.median <= MOST_NATS
        where = "at the edge of" if edge else "within" if within else "outside"
        other = f"; β {facts.beta:g} would ask for {plain(facts.median)} nats, {where} that range"
    return (
        f"Begin with β {facts.first:g}: it asks for a log-ratio gap of {plain(gap)} nats in the "
        f"median group, well within the {LEAST_NATS:g} to {MOST_NATS:g} nats that a policy can "
        f"reach, and gvpo-offline tune begins there{other}."
    )


def _chart(facts: BetaFacts) -> Chart:
    rows = [
        {
            "beta": row.beta,
            "low": row.low,
            "median": row.median,
            "high": row.high,
            "reach from": LEAST_NATS,
            "reach to": MOST_NATS,
            "too far": WIDE_GAP_NATS,
            "own": row.median if row.own else None,
        }
        for row in facts.rows
    ]
    title = "(max R \N{MINUS SIGN} min R)/β, nats"
    scale = {"type": "log"}
    x = charts.quantity("beta", "β", scale={**scale, "nice": False})
    reach = charts.band(x, "reach from", "reach to", title, 0.3)
    reach["mark"]["color"] = "#4c9a5b"
    too_far = charts.line(x, charts.quantity("too far", title, scale=scale))
    too_far["mark"] = {"type": "line", "strokeDash": [4, 4]}
    own = charts.point(x, charts.quantity("own", title, scale=scale), tooltip=("beta", "own"))
    own["mark"] |= {"size": 140, "shape": "diamond"}
    spec = charts.layers(
        reach,
        charts.band(x, "low", "high", title, 0.25),
        charts.line(
            x,
            charts.quantity("median", title, scale=scale),
            tooltip=("beta", "low", "median", "high"),
        ),
        too_far,
        own,
    )
    summary = (
        f"At β {facts.beta:g}, the diamond, the median gap is {plain(facts.median)} nats. The "
        f"green band, {LEAST_NATS:g} to {MOST_NATS:g} nats, is what a policy can reach; above the "
        f"dashed line, {WIDE_GAP_NATS:g} nats, training warns. The line is the median group, the "
        "area around it 80% of the groups."
    )
    return charts.chart("beta-gaps", "What β asks of the policy", summary, spec, rows, height=300)


def _table(facts: BetaFacts) -> Table:
    rows = [
        (
            f"{row.beta:g}" + (" (set)" if row.own else ""),
            row.low,
            row.median,
            row.high,
            row.within,
            row.beyond,
        )
        for row in facts.rows
    ]
    return Table(
        "beta-rows",
        "Implied log-ratio gap by β, nats",
        [
            Column("β"),
            *(Column(name, "number") for name in ("10%", "median", "90%")),
            Column(f"{LEAST_NATS:g} to {MOST_NATS:g} nats", "share"),
            Column(f"above {WIDE_GAP_NATS:g} nats", "share"),
        ],
        rows,
        "Quantiles over the groups with unequal rewards. All rows but the one that is set are the "
        "candidates of gvpo-offline tune.",
    )


def _losses(
    losses: Sequence[LossAdvice], rewards: RewardFacts | None, reference: ReferenceFacts | None
) -> list[Block]:
    rows = [("yes" if each.applies else "no", each.log, each.take, each.why) for each in losses]
    found: list[Block] = [
        Table(
            "beta-losses",
            "Which loss suits",
            [Column("applies"), Column("a log that is"), Column("take"), Column("this dataset")],
            rows,
            "The rules of docs/evidence/results.md (which loss to take), found on small models. "
            + ("" if any(each.applies for each in losses) else "None applies: begin with gvpo and ")
            + ("" if any(each.applies for each in losses) else "imitation: auto. ")
            + "After choosing, sample a hundred answers and score them.",
        )
    ]
    if rewards is not None and own_answers(reference, len(rewards.samplers)):
        found.append(
            Text(
                "The responses look like the reference's own answers: one sampler, and hardly any "
                "response that the reference would not say. Such logs need a lower learning rate "
                "than mixed ones (in the study a tenth of it): let gvpo-offline tune search it."
            )
        )
    return found
