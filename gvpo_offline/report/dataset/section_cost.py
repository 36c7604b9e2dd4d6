"""The section "Cost"."""

from __future__ import annotations

from gvpo_offline.report.dataset import charts
from gvpo_offline.report.dataset.cost import LENGTH_QUANTILES, CostFacts
from gvpo_offline.report.dataset.estimate import TrainingEstimate
from gvpo_offline.report.dataset.numbers import cell, plain
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
from gvpo_offline.report.settings import ReportSettings

LOOK_FOR = (
    "The time of a step follows the tokens that the model reads. Compare the shared layout, which "
    "reads each prompt once, with padded rows: where they differ much, layout: auto saves as much. "
    "Lower max_tokens_per_micro_batch if memory is short; the result does not change."
)
_LAYOUT_TEXTS = {
    "shared": "shared: each prompt once",
    "packed": "packed: a prompt for each response",
    "continued": "continued: padded responses after one prompt",
    "padded": "padded: a padded row for each response",
}


def cost_section(
    facts: CostFacts | None, found: TrainingEstimate | None, settings: ReportSettings
) -> Section:
    """The section of a dataset."""
    if facts is None:
        return Section("cost", "Cost", LOOK_FOR, [Text("There are no groups.")])
    blocks: list[Block] = [Figures(_figures(facts, settings))]
    blocks += [_chart(facts), _layouts(facts), _lengths(facts), *_estimate(found)]
    return Section("cost", "Cost", LOOK_FOR, blocks)


def _figures(facts: CostFacts, settings: ReportSettings) -> list[Figure]:
    shared, padded = facts.layout_tokens["shared"], facts.layout_tokens["padded"]
    held = f"{facts.held_out_groups:,} held out" if facts.held_out_groups else "none held out"
    return [
        Figure(
            "steps",
            f"{facts.steps:,}",
            f"{settings.num_train_epochs:g} epochs of {plain(facts.steps_per_epoch)} steps, "
            f"{settings.groups_per_step} groups each",
        ),
        Figure("training groups", f"{facts.training_groups:,}", held),
        Figure("unique tokens", f"{shared:,}", "of an epoch: each prompt once"),
        Figure(
            "padded tokens",
            f"{padded:,}",
            f"{plain(padded / shared)} times as many" if shared else "",
        ),
        Figure("longest row", f"{facts.longest_row:,} tokens", "a prompt with one response"),
        Figure("largest group", f"{facts.largest_group:,} tokens", "its prompt counted once"),
    ]


def _chart(facts: CostFacts) -> Chart:
    rows = [{"layout": name, "tokens": tokens} for name, tokens in facts.layout_tokens.items()]
    spec = charts.bar(
        charts.quantity("tokens", "input tokens of an epoch"),
        charts.category("layout", "layout"),
        tooltip=("layout", "tokens"),
    )
    shared, padded = facts.layout_tokens["shared"], facts.layout_tokens["padded"]
    summary = f"{shared:,} tokens in the shared layout, {padded:,} in padded rows."
    return charts.chart("cost-tokens", "Tokens of an epoch by layout", summary, spec, rows, 160)


def _layouts(facts: CostFacts) -> Table:
    rows = [
        (_LAYOUT_TEXTS[name], tokens, cell(facts.passes_per_step[name]))
        for name, tokens in facts.layout_tokens.items()
    ]
    return Table(
        "cost-layouts",
        "Input tokens by layout",
        [
            Column("layout"),
            Column("tokens of an epoch", "count"),
            Column(
                "forward passes of a step",
                "number",
                explanation="Mean over 20 steps of groups chosen at random, on one rank.",
            ),
        ],
        rows,
        "The model decides which layouts are exact: train says at its start which it takes.",
    )


def _lengths(facts: CostFacts) -> Table:
    titles = ["shortest", *(f"{q:.0%}" for q in LENGTH_QUANTILES[1:-1]), "longest"]
    return Table(
        "cost-lengths",
        "Lengths in tokens",
        [Column(""), *(Column(title, "count") for title in titles)],
        [
            ("prompts", *map(round, facts.prompt_quantiles)),
            ("responses", *map(round, facts.response_quantiles)),
        ],
    )


def _estimate(found: TrainingEstimate | None) -> list[Block]:
    if found is None:
        return [Text("With --model_name_or_path the page estimates time and memory of training.")]
    rows = [(name, gigabytes) for name, gigabytes in found.memory_gb.items()]
    return [
        Figures(
            [
                Figure("estimated time", _hours(found.hours), "an estimate, not a measurement"),
                Figure("estimated memory", f"{plain(found.total_gb)} GB", "an estimate"),
                Figure("weights", f"{plain(found.parameters / 1e6)} million", found.model),
                Figure("operations", f"{plain(found.operations / 1e15)} · 10¹⁵", "of all steps"),
            ]
        ),
        Table(
            "cost-memory",
            "Estimated memory of a step, GB of 10⁹ bytes",
            [Column("part"), Column("GB", "number")],
            rows,
            f"Arithmetic from the model's configuration, not a measurement: {found.assumptions}. "
            "The formula is explained in docs/howto/report.md.",
        ),
    ]


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{plain(3600 * hours)} seconds"
    return f"{plain(60 * hours)} minutes" if hours < 1 else f"{plain(hours)} hours"
