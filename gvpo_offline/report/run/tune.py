"""The folder of a search by `gvpo-offline tune`: its trials and its proposal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gvpo_offline.errors import IntegrityError
from gvpo_offline.report.page.blocks import (
    Block,
    Cell,
    Chart,
    Column,
    Figure,
    Figures,
    Notice,
    Section,
    Table,
    Text,
)
from gvpo_offline.train.run_folder import TUNE_FOLDER, json_object
from gvpo_offline.tune.trial_files import checked_content

RESULT_FILE = "tune.json"
_PROPOSAL = "proposed.yaml"
_RULE = "a file of a search is a JSON object as it was written"
_REMEDY = "remove the file and run `gvpo-offline tune` again; a trial is then repeated"
_METRICS = (
    ("explained_variance", "explained variance"),
    ("loss", "loss"),
    ("likely_reweighted_reward_mean", "reweighted reward"),
    ("likely_log_mass_mean", "log mass (nats)"),
    ("best_log_ratio_mean", "best log-ratio (nats)"),
    ("pair_accuracy", "pair accuracy"),
)
_SETTINGS = ("loss_type", "imitation", "beta", "learning_rate")


def tune_folder(path: Path) -> Path | None:
    """The folder of a search: `path` itself, or the folder `tune` in it; None if there is none."""
    for folder in (path, path / TUNE_FOLDER):
        if (folder / RESULT_FILE).is_file() or any((folder / "trials").glob("*.json")):
            return folder
    return None


def read_tune(folder: Path) -> dict[str, Any]:
    """A search as values of JSON: the content of tune.json, or the trials that are done so far.

    A search that has not ended has `finished` false, and `trials` from the files of its trials.

    Raises:
        IntegrityError: a file is not a JSON object.
    """
    if (folder / RESULT_FILE).is_file():
        found = _object(folder / RESULT_FILE)
        proposal = (folder / _PROPOSAL).is_file()
        return {"path": str(folder), "finished": True, "proposes": proposal, **found}
    trials = [
        {
            "beta": content.get("beta"),
            "learning_rate": content.get("learning_rate"),
            "metrics": content.get("figures"),
        }
        for content in map(_object, sorted((folder / "trials").glob("*.json")))
        if content.get("kind") == "trial"
    ]
    return {"path": str(folder), "finished": False, "proposes": False, "trials": trials}


def tune_section(found: Mapping[str, Any], number: int, name: str) -> Section:
    """The section of a search.

    Args:
        found: as `read_tune`.
        number: of the search in the page, for ids.
        name: how the page calls the folder.
    """
    judged = found.get("judge") == "sample"
    blocks: list[Block] = [Figures(list(_figures(found)))]
    for text in found.get("statements") or []:
        blocks.append(Text(str(text)))
    if not found["finished"]:
        blocks.append(
            Notice(
                "warning",
                f"The search has not ended: there is no {RESULT_FILE}.",
                "Run the same `gvpo-offline tune` again: it goes on after the trials that are "
                "done.",
            )
        )
    trials = [own for own in found.get("trials") or [] if isinstance(own, Mapping)]
    table = _judged_table(trials, number) if judged else _table(found, trials, number)
    blocks.append(table)
    chart = None if judged else _chart(trials, number)
    return Section(
        id=f"tune-{number}",
        title=f"Search of {name}",
        look_for="The proposal is as good as its lead over the next trial, against the error where "
        "one is given. A proposal at the edge of the candidates asks for candidates beyond it; one "
        "whose explained variance is not above 0 has learned nothing that holds for held-out "
        "groups.",
        blocks=[*blocks, *([chart] if chart else [])],
    )


def _figures(found: Mapping[str, Any]) -> Iterator[Figure]:
    chosen = found.get("proposed") if found.get("judge") == "sample" else found
    if found["finished"] and isinstance(chosen, Mapping):
        for name in _SETTINGS:
            if chosen.get(name) is not None:
                yield Figure(name, _text(chosen[name]), "proposed" if found["proposes"] else "")
    elif found["finished"]:
        yield Figure("proposal", "none", "no trial beats the untouched policy")
    for name, title in (
        ("steps", "steps of a trial"),
        ("held_out_groups", "held-out groups"),
        ("held_out_prompts", "held-out prompts"),
        ("reward_gap", "median reward gap"),
        ("largest_rate", "largest usable learning rate"),
    ):
        if found.get(name) is not None:
            yield Figure(title, _text(found[name]))
    yield Figure("trials", _text(len(found.get("trials") or [])))


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _table(found: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], number: int) -> Table:
    chosen = (found.get("beta"), found.get("learning_rate")) if found["finished"] else None
    rows: list[list[Cell]] = []
    for trial in trials:
        key = (trial.get("beta"), trial.get("learning_rate"))
        metrics = trial.get("metrics") or {}
        figures = [_number(metrics.get(name)) for name, _ in _METRICS]
        mark = "proposed" if key == chosen else ""
        rows.append([mark, *map(_number, key), *figures])
    columns = [
        Column(""),
        Column("beta", "number"),
        Column("learning rate", "number"),
        *(Column(title, "number", digits=4) for _, title in _METRICS),
    ]
    return Table(
        f"trials-{number}",
        "Trials, on held-out groups",
        columns,
        rows,
        "A dash: the trial diverged, or the figure was not computed.",
    )


def _judged_table(trials: Sequence[Mapping[str, Any]], number: int) -> Table:
    rows: list[list[Cell]] = []
    for trial in trials:
        own = trial.get("settings") or {}
        rows.append(
            [
                "untouched policy" if not own else str(own.get("loss_type")),
                *(_number(own.get(name)) for name in _SETTINGS[1:]),
                *(
                    _number((trial.get(name) or {}).get(part))
                    for name in ("objective", "reward", "kl", "behind")
                    for part in ("mean", "se")
                ),
                _number(trial.get("length")),
                _number(trial.get("truncated")),
            ]
        )
    return Table(f"trials-{number}", "Trials, judged by sampled answers", _JUDGED, rows)


_JUDGED = (
    Column("loss"),
    Column("imitation", "number"),
    Column("beta", "number"),
    Column("learning rate", "number"),
    Column("objective", "number", explanation="Mean reward - judge_beta KL of sampled answers."),
    Column("±", "number", 2, "Standard error over prompts."),
    Column("reward", "number"),
    Column("± reward", "number", 2),
    Column("KL (nats)", "number"),
    Column("± KL", "number", 2),
    Column("behind", "number", explanation="The chosen trial's objective minus this one's."),
    Column("± behind", "number", 2, "Standard error of the paired difference."),
    Column("length (tokens)", "number"),
    Column("cut", "share", explanation="Share of answers that the limit of tokens cut."),
)


def _chart(trials: Sequence[Mapping[str, Any]], number: int) -> Chart | None:
    rows: list[dict[str, Cell]] = []
    for trial in trials:
        explained = _number((trial.get("metrics") or {}).get("explained_variance"))
        rate, beta = _number(trial.get("learning_rate")), _number(trial.get("beta"))
        if explained is not None and rate is not None and beta is not None:
            rows.append({"learning rate": rate, "beta": str(beta), "explained variance": explained})
    if not rows:
        return None
    best = max(rows, key=lambda row: float(row["explained variance"] or 0.0))
    encoding = {
        "x": {"field": "learning rate", "type": "quantitative", "scale": {"type": "log"}},
        "y": {"field": "explained variance", "type": "quantitative"},
        "color": {"field": "beta", "type": "nominal"},
        "tooltip": [{"field": name} for name in rows[0]],
    }
    return Chart(
        f"trials-chart-{number}",
        "Held-out explained variance of the trials",
        f"{len(rows):,} trials; the largest explained variance is "
        f"{best['explained variance']:.3g} at learning rate {best['learning rate']:g}, beta "
        f"{best['beta']}.",
        {"mark": {"type": "line", "point": True}, "encoding": encoding},
        rows,
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _object(path: Path) -> dict[str, Any]:
    found = json_object(path, _RULE, _REMEDY)
    try:
        return checked_content(path, path.read_bytes().decode("utf-8"), found)
    except ValueError as error:
        raise IntegrityError(_RULE, received=str(error), remedy=_REMEDY, file=path) from error
