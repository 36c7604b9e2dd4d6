"""The first section of a page of runs: what was trained, how far it came, how it went."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from gvpo_offline.report.page.blocks import (
    Block,
    Cell,
    Column,
    Figure,
    Figures,
    Notice,
    Section,
    Table,
    Text,
)
from gvpo_offline.report.run.facts import RunFacts, SetFacts, progress
from gvpo_offline.report.run.headline import headlines
from gvpo_offline.report.run.words import duration, short, step_of

_MOST_NOTICES = 5
_HELP = "What helps: "


def overview_section(facts: Sequence[RunFacts]) -> Section:
    """The overview: figures of one run, or a table of several."""
    blocks: list[Block]
    if len(facts) == 1:
        blocks = [*headlines(facts), Figures(list(_figures(facts[0])))]
        blocks += [Text(" ".join(facts[0].verdict)), Figures(list(_made_of(facts[0])))]
    else:
        blocks = [*headlines(facts), _table(facts)]
        blocks += [Text(f"{own.name}: {' '.join(own.verdict)}") for own in facts]
    return Section(
        id="overview",
        title="At a glance",
        look_for="Judge by held-out figures. Explained variance is the share of the rewards' "
        "variance that beta times the log-ratio explains: 0 is the reference, 1 the optimum.",
        blocks=[*blocks, *_notices(facts)],
    )


def _figures(own: RunFacts) -> Iterator[Figure]:
    """How far it is and how it fits: what a reader wants first."""
    yield Figure("state", own.state, progress(own))
    for part in own.held_out_sets or own.sets:
        yield from _figures_of_set(part)
    yield Figure("warnings", f"{len(own.warnings):,}")
    if own.seconds is not None:
        yield Figure("time", duration(own.seconds), "of training since its last start")
    if own.tokens_per_second is not None:
        yield Figure("tokens a second", f"{own.tokens_per_second:,.0f}", "median")
    if own.restarts:
        yield Figure("restarts", f"{own.restarts:,}")


def _made_of(own: RunFacts) -> Iterator[Figure]:
    """What was trained, on what."""
    for name, text in (
        ("model", own.model),
        ("data", ", ".join(own.datasets)),
        ("held out", own.held_out),
        ("objective", own.objective),
    ):
        if text:
            yield Figure(name, short(text, 80))


def _figures_of_set(part: SetFacts) -> Iterator[Figure]:
    best = part.best_explained_variance
    for metric, name in (
        ("explained_variance", "explained variance"),
        ("best_log_ratio_mean", "log-ratio of the best"),
        ("sampled_reward", "reward of answers"),
        ("sampled_kl", "KL of answers"),
    ):
        if metric not in part.last:
            continue
        value, note = f"{part.last[metric]:.3g}", part.name
        if metric == "explained_variance" and best is not None:
            note = f"{part.name}; best {best.value:.3g} at {step_of(best.step)}"
        error = part.last.get(f"{metric}_se", math.nan)
        value += f" ± {error:.2g}" if math.isfinite(error) else ""
        yield Figure(name, value + (" nats" if "nats" in _UNITS.get(metric, "") else ""), note)


_UNITS = {"best_log_ratio_mean": "nats", "sampled_kl": "nats"}


def _table(facts: Sequence[RunFacts]) -> Table:
    """The figures of several runs, a row each; of each run's first held-out set."""
    rows = [_row(own) for own in facts]
    kept = [n for n in range(len(_COLUMNS)) if any(row[n] is not None for row in rows)]
    return Table(
        "figures",
        "The runs' last figures",
        [_COLUMNS[n] for n in kept],
        [[row[n] for n in kept] for row in rows],
        "Held-out figures are of each run's first held-out set. Runs that hold out other groups "
        "cannot be compared by them.",
    )


def _row(own: RunFacts) -> list[Cell]:
    held_out = own.held_out_sets[0] if own.held_out_sets else None
    best = held_out.best_explained_variance if held_out else None
    last = dict(held_out.last) if held_out else {}
    return [
        own.name,
        own.state,
        own.step,
        own.training.last.get("loss"),
        own.training.last.get("explained_variance"),
        last.get("explained_variance"),
        best.value if best else None,
        best.step if best else None,
        last.get("best_log_ratio_mean"),
        last.get("likely_log_mass_mean", last.get("log_mass_mean")),
        last.get("sampled_reward"),
        last.get("sampled_reward_se"),
        last.get("sampled_kl"),
        last.get("sampled_objective"),
        len(own.warnings),
        own.tokens_per_second,
        own.seconds,
    ]


_COLUMNS = (
    Column("run"),
    Column("state"),
    Column("steps", "count", explanation="Steps done."),
    Column("loss", "number", explanation="In training."),
    Column("fit", "number", explanation="Explained variance in training."),
    Column("fit held out", "number", explanation="Explained variance of held-out groups."),
    Column("best", "number", explanation="The largest explained variance of held-out groups."),
    Column("at step", "count", explanation="At which it was reached."),
    Column("best log-ratio", "number", explanation="Of the best held-out responses, nats."),
    Column("log mass", "number", explanation="Of the held-out responses, nats."),
    Column("reward", "number", explanation="Of sampled answers."),
    Column("±", "number", 2, "Standard error over prompts."),
    Column("KL", "number", explanation="Of sampled answers to the reference, nats."),
    Column("reward - beta KL", "number", explanation="Each run with its own beta."),
    Column("warnings", "count"),
    Column("tokens/s", "count", explanation="Median over the logged lines."),
    Column("seconds", "count", explanation="Of training, since the run's last start."),
)


def _notices(facts: Sequence[RunFacts]) -> Iterator[Notice]:
    """The last warnings of the runs."""
    for own in facts:
        where = f"{own.name}: " if len(facts) > 1 else ""
        # A resumed run says again what it says at its start.
        once = list({warned.text: warned for warned in own.warnings}.values())
        for warned in once[-_MOST_NOTICES:]:
            text, _, remedy = warned.text.partition(_HELP)
            yield Notice("warning", where + short(text, 500), remedy and _HELP + short(remedy, 300))
        if not own.warnings_recorded and own.logged_steps:
            yield Notice(
                "note",
                f"{where}the run has no events.jsonl: an earlier version made it. The warnings are "
                "those that this version gives about its logged lines.",
            )
