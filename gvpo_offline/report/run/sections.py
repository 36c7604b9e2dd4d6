"""The sections of a page of runs after the overview."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from gvpo_offline.report.page.blocks import Block, Cell, Column, Notice, Section, Table, Text
from gvpo_offline.report.run.curves import Band, Curve, curve_chart, curves_of
from gvpo_offline.report.run.facts import RunFacts
from gvpo_offline.report.run.files import TRAINING, Run
from gvpo_offline.report.run.residuals import residual_tables
from gvpo_offline.report.run.samplers import sampler_tables
from gvpo_offline.report.run.settings import settings_table
from gvpo_offline.report.run.words import short, size_text
from gvpo_offline.train.limits import (
    HIGH_LOG_MASS,
    LOW_BEST_LOG_RATIO,
    LOW_EXPLAINED_VARIANCE,
    LOW_LOG_MASS,
)

_MEMORY = {"peak_memory_gb": "Peak memory of a rank (GB)"}
_MOST_ROWS = 500  # of a table of events or warnings


def run_sections(runs: Sequence[Run], facts: Sequence[RunFacts]) -> list[Section]:
    """The sections that the runs have figures for, in reading order."""
    found = [
        _fit(runs),
        _log_ratios(runs),
        _answers(runs),
        _optimisation(runs),
        _speed(runs),
        _samplers(runs),
        _residuals(runs),
        _warnings(runs),
        _events(runs, facts),
        _settings(runs),
    ]
    return [section for section in found if section.blocks]


def _pins(runs: Sequence[Run]) -> list[tuple[str, int, str]]:
    return [(run.name, warned.step, warned.text) for run in runs for warned in run.warnings]


def _charts(runs: Sequence[Run], *wanted: tuple[str, str, str, Band | None]) -> Iterator[Block]:
    """Charts of metrics (name, title, unit, band), with the warnings; absent ones are left out."""
    pins = _pins(runs)
    for metric, title, unit, band in wanted:
        chart = curve_chart(
            f"chart-{metric.replace('_', '-')}",
            title,
            curves_of(runs, metric),
            unit=unit,
            band=band,
            pins=pins,
        )
        if chart:
            yield chart


def _fit(runs: Sequence[Run]) -> Section:
    regression = all(run.fits_rewards for run in runs)
    band = Band(low=LOW_EXPLAINED_VARIANCE) if regression else None
    more = (
        ""
        if regression
        else " The optimum of some of these losses has an explained variance other than 1: compare "
        "it only between runs with the same loss."
    )
    return Section(
        "fit",
        "Loss and explained variance",
        "Held-out loss that falls with that of training is what to hope for. If the held-out curve "
        "turns while training goes on, take a checkpoint from the turn, and use fewer epochs, a "
        "lower learning rate or more groups. Vertical lines are warnings, at the step where they "
        f"were given.{more}",
        list(
            _charts(
                runs,
                ("loss", "Loss", "loss", None),
                ("explained_variance", "Explained variance", "explained variance", band),
                ("squares_loss", "Loss without imitation", "loss", None),
                ("imitation_loss", "Imitation", "negative log-prob (nats)", None),
                ("pair_accuracy", "Pairs ordered as their rewards", "share", None),
            )
        ),
    )


def _log_ratios(runs: Sequence[Run]) -> Section:
    every = {name for run in runs for name in run.metrics.columns}
    mass = "likely_log_mass_mean"
    mass = mass if any(name.endswith(mass) for name in every) else "log_mass_mean"
    return Section(
        "log-ratios",
        "Log-ratios of policy to reference",
        "The best responses should become likelier (above 0) and the spread grow without the log "
        "mass falling: a log mass far below 0 says that the policy moves to responses that nobody "
        "logged. What helps: a larger beta, a lower learning rate, fewer epochs, a small anchor.",
        list(
            _charts(
                runs,
                (
                    "best_log_ratio_mean",
                    "Log-ratio of the best responses",
                    "nats",
                    Band(low=LOW_BEST_LOG_RATIO),
                ),
                ("log_ratio_mean", "Mean log-ratio", "nats", None),
                ("log_ratio_std", "Spread of log-ratios", "nats (standard deviation)", None),
                (
                    mass,
                    "Log mass of the logged responses",
                    "nats",
                    Band(LOW_LOG_MASS, HIGH_LOG_MASS),
                ),
            )
        ),
    )


def _answers(runs: Sequence[Run]) -> Section:
    """Metrics of sampled answers, with bands of one standard error."""
    blocks: list[Block] = []
    for metric, title, unit in (
        ("sampled_reward", "Reward of sampled answers", "reward"),
        ("sampled_kl", "KL of sampled answers to the reference", "nats"),
        ("sampled_objective", "Reward - beta KL of sampled answers", "reward"),
    ):
        curves = [_with_errors(runs, curve, metric) for curve in _sampled_curves(runs, metric)]
        chart = curve_chart(f"chart-{metric.replace('_', '-')}", title, curves, unit=unit)
        if chart:
            blocks.append(chart)
    for metric, title, unit in (
        ("sampled_length", "Length of sampled answers", "tokens"),
        ("sampled_truncated", "Answers cut at the limit of tokens", "share"),
        ("sampled_failed", "Answers without a reward", "answers"),
    ):
        chart = curve_chart(
            f"chart-{metric.replace('_', '-')}", title, _sampled_curves(runs, metric), unit=unit
        )
        if chart:
            blocks.append(chart)
    if blocks and any(run.samples for run in runs):
        blocks.append(Text("The answers themselves are below, beside the best logged responses."))
    return Section(
        "answers",
        "Sampled answers",
        "The only figures of answers that the policy itself gives. Bands and bars are one standard "
        "error over prompts: a change within two of them may be chance. Watch for rewards that "
        "rise with the length, and for answers that are cut.",
        blocks,
    )


def _sampled_curves(runs: Sequence[Run], metric: str) -> list[Curve]:
    values = [(run, run.values(f"eval_{metric}")) for run in runs]
    return [Curve(run.name, "sampled answers", own) for run, own in values if own]


def _with_errors(runs: Sequence[Run], curve: Curve, metric: str) -> Curve:
    run = next(own for own in runs if own.name == curve.run)
    errors = dict(run.values(f"eval_{metric}_se"))
    own = [errors.get(step, math.nan) for step, _ in curve.values]
    return Curve(curve.run, curve.groups, curve.values, own)


def _optimisation(runs: Sequence[Run]) -> Section:
    return Section(
        "optimisation",
        "Learning rate and gradient",
        "Peaks of the gradient norm that come with peaks of the loss ask for a lower learning rate "
        "or a longer warm-up.",
        list(
            _charts(
                runs,
                ("learning_rate", "Learning rate", "learning rate", None),
                ("grad_norm", "Gradient norm before clipping", "norm", None),
                ("entropy", "Entropy of the policy", "nats per token", None),
            )
        ),
    )


def _speed(runs: Sequence[Run]) -> Section:
    blocks = list(
        _charts(
            runs,
            ("tokens_per_second", "Tokens a second, over all ranks", "tokens/s", None),
            ("data_wait_share", "Share of time waiting for data", "share", None),
        )
    )
    names = dict.fromkeys(
        name
        for run in runs
        for name in run.metrics.columns
        if ("memory" in name or "_mem_" in name) and "/" not in name
    )
    for number, name in enumerate(names, 1):
        curves = [Curve(run.name, TRAINING, run.values(name)) for run in runs if run.values(name)]
        title = _MEMORY.get(name, f"Memory: {name}")
        chart = curve_chart(f"chart-memory-{number}", title, curves, unit=name.rpartition("_")[2])
        if chart:
            blocks.append(chart)
    return Section(
        "speed",
        "Speed, waiting and memory",
        "More than a few percent of waiting: raise read_ahead, or copy the dataset to a local "
        "disk. Memory to spare: raise max_tokens_per_micro_batch.",
        blocks,
    )


def _samplers(runs: Sequence[Run]) -> Section:
    return Section(
        "samplers",
        "By sampler",
        "Samplers with a high reward should gain log-ratio, those with a low one lose it. One that "
        "gains alone, whatever its reward, is imitated for its style.",
        sampler_tables(runs),
    )


def _residuals(runs: Sequence[Run]) -> Section:
    return Section(
        "residuals",
        "Groups with the largest residuals",
        "A residual is what beta times the log-ratio leaves unexplained of a reward, centred "
        "within its group. Groups that stay at the top have rewards that the policy cannot learn: "
        "read them for wrong rewards, with gvpo-offline show DATASET --group ID.",
        residual_tables(runs),
    )


def _warnings(runs: Sequence[Run]) -> Section:
    rows: list[list[Cell]] = [
        [run.name, warned.step, short(warned.text, 600)] for run in runs for warned in run.warnings
    ]
    table = Table(
        "warnings-table",
        "Warnings",
        [Column("run"), Column("step", "count"), Column("warning")],
        rows[:_MOST_ROWS],
        f"The first {_MOST_ROWS:,} of {len(rows):,}." if len(rows) > _MOST_ROWS else "",
    )
    return Section(
        "warnings",
        "Warnings",
        "What the runs said while they trained. A warning is repeated if its figure gets twice as "
        "bad.",
        [table] if rows else [],
    )


def _events(runs: Sequence[Run], facts: Sequence[RunFacts]) -> Section:
    rows = [
        [run.name, str(event.get("time", "")), event["step"], event["kind"], _details(event)]
        for run in runs
        for event in run.events
        if event["kind"] in ("start", "resume", "checkpoint", "end")
    ]
    blocks: list[Block] = []
    if rows:
        columns = [Column("run"), Column("time (UTC)"), Column("step", "count"), Column("event")]
        note = f"The last {_MOST_ROWS:,} of {len(rows):,}." if len(rows) > _MOST_ROWS else ""
        shown = rows[-_MOST_ROWS:]
        blocks.append(
            Table(
                "events-table",
                "Starts, restarts, checkpoints",
                [*columns, Column("details")],
                shown,
                note,
            )
        )
    held: list[list[Cell]] = [
        [
            *(run.name, own.step, "complete" if own.sealed else "incomplete"),
            *(size_text(own.size), own.written or None),
        ]
        for run in runs
        for own in run.checkpoints
    ]
    if held:
        columns = [Column("run"), Column("step", "count"), Column("state"), Column("size")]
        blocks.append(
            Table(
                "checkpoints",
                "Checkpoints in the folders",
                [*columns, Column("written (UTC)")],
                held,
            )
        )
    for own in facts:
        if own.state in ("open", "failed") and own.checkpoints:
            sealed = [checkpoint.step for checkpoint in own.checkpoints if checkpoint.sealed]
            if sealed:
                blocks.append(
                    Notice(
                        "note",
                        f"{own.name}: unless it still trains, it goes on from step "
                        f"{max(sealed):,}.",
                        "Run its command again with resume_from_checkpoint: auto.",
                    )
                )
    return Section(
        "events",
        "Checkpoints and restarts",
        "A resumed run goes on exactly from its checkpoint: its curves have no gap and no second "
        "branch. An incomplete checkpoint is an interrupted save, which resuming passes over.",
        blocks,
    )


def _details(event: dict[str, object]) -> str:
    kept = (
        f"{name} {value}"
        for name, value in event.items()
        if name in ("action", "folder", "checkpoint", "steps", "world_size", "device", "error")
        and value not in (None, "")
    )
    return short(", ".join(kept), 300)


def _settings(runs: Sequence[Run]) -> Section:
    table = settings_table(runs)
    return Section(
        "settings-section",
        "Settings",
        "As the runs were started; auto is what it stood for.",
        [table] if table else [],
    )
