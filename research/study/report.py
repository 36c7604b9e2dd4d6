"""The tables of a study, from its rows alone: means and standard errors over seeds."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from jobs import BETA

Row = dict[str, Any]
# (comparison, setting, row)
Labelled = tuple[str, str, Row]
FIGURES = {
    "objective": "reward - β KL",
    "paired": "minus gvpo's",
    "reward": "reward",
    "pass_1": "pass@1",
    "pass_k": "pass@8",
    "kl": "KL",
    "explained_variance": "explained, held out",
    "trained_explained_variance": "explained, trained",
    "best_log_ratio": "best log-ratio",
    "log_mass": "log-mass",
}
# Tables whose rows are losses on one log.
OF_LOSSES = ("losses", "models only", "own answers")
# This loss does not depend on beta, so its objective at other betas follows from reward and KL.
WITHOUT_BETA = "rft"
Cell = tuple[float, float]
Table = dict[str, dict[str, Cell]]


def finish(
    labelled: Sequence[Labelled],
    frames: Mapping[str, Any],
    searches: Sequence[Mapping[str, Any]],
    folder: Path,
    seconds: float,
) -> None:
    """Write `study.json` and `tables.md`, draw the pictures, print the tables and a JSON object."""
    tables = tables_of(labelled)
    standings = {
        name: standing(table, name.split(": ")[0], labelled)
        for name in tables
        for table in [name.split(": ")[1]]
        if table in OF_LOSSES and "recommended" in tables[name]
    }
    verdict: dict[str, Any] = {
        "objective": {task: _objectives(tables[f"{task}: losses"]) for task in frames},
        "recommended": standings,
    }
    if searches:
        verdict["tune"] = [against_grid(found, labelled) for found in searches]
        verdict["judges"] = {task: _judges(task, labelled) for task in frames}
    verdict["runs"] = len({json.dumps(row["job"], sort_keys=True) for _, _, row in labelled})
    whole = {"tables": tables, "frames": frames, "searches": list(searches), **verdict}
    (folder / "study.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    text = "\n\n".join(_markdown(name, table, frames, labelled) for name, table in tables.items())
    (folder / "tables.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n")
    from draw import draw

    draw(whole, folder)
    cpu = sum(row["cpu_seconds"] for _, _, row in labelled)
    print(json.dumps({**verdict, "seconds": round(seconds), "cpu_seconds_of_runs": round(cpu)}))


def _objectives(table: Table) -> dict[str, float]:
    return {label: round(cells["objective"][0], 4) for label, cells in table.items()}


def tables_of(labelled: Sequence[Labelled]) -> dict[str, Table]:
    """Mean and standard error of each figure, by "task: comparison" and setting.

    "paired" is the objective minus that of GVPO with the same log, over the seeds of both.
    """
    rows: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for sweep, label, row in labelled:
        rows[f"{row['job']['task']}: {sweep}"][label].append(row)
    tables = {
        name: {label: _cells(own) for label, own in table.items()} for name, table in rows.items()
    }
    for name, table in tables.items():
        task, sweep = name.split(": ")
        for label in table:
            base = rows[name].get(_base(sweep, label))
            if base and label != _base(sweep, label):
                table[label]["paired"] = paired(rows[name][label], base)
        if sweep == "beta":
            table.update(_at_other_betas(rows[f"{task}: losses"][WITHOUT_BETA], list(table)))
    return tables


def _base(sweep: str, label: str) -> str:
    """The label of GVPO with the same setting."""
    if sweep in OF_LOSSES or ", " not in label:
        return "gvpo"
    return f"gvpo, {label.split(', ', 1)[1]}"


def paired(own: Sequence[Row], base: Sequence[Row]) -> Cell:
    """Mean difference of the objectives over the seeds that both have, and its standard error."""
    one, other = ({row["job"]["seed"]: row["objective"] for row in rows} for rows in (own, base))
    return _cell([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])


def _at_other_betas(rows: Sequence[Row], labels: Sequence[str]) -> Table:
    betas = sorted({float(label.split(", ")[1]) for label in labels})
    return {
        f"{WITHOUT_BETA}, {beta:g}": {
            "objective": _cell([row["reward"] - beta * row["kl"] for row in rows]),
            "reward": _cell([row["reward"] for row in rows]),
            "kl": _cell([row["kl"] for row in rows]),
        }
        for beta in betas
    }


def _cells(rows: Sequence[Row]) -> dict[str, Cell]:
    return {name: _cell([row[name] for row in rows]) for name in FIGURES if name != "paired"}


def _cell(values: Sequence[float]) -> Cell:
    """Mean and standard error; NaN if a value is NaN, and the error of fewer than two values."""
    if not values:
        return math.nan, math.nan
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return float(np.mean(values)), error


def standing(table: str, task: str, labelled: Sequence[Labelled]) -> dict[str, Any]:
    """How the recommendation compares with the best other loss, and with `gvpo` and `rft`.

    Returns:
        The best other loss, by the mean difference over the seeds that it shares with the
        recommendation; that difference with its standard error; and the share of the gap between
        `gvpo` and `rft` that the recommendation closes, over the seeds of all three.
    """
    rows: dict[str, list[Row]] = defaultdict(list)
    for sweep, label, row in labelled:
        if sweep == table and row["job"]["task"] == task:
            rows[label].append(row)
    own = rows.pop("recommended")
    ahead = {label: paired(others, own) for label, others in rows.items()}
    best = max(ahead, key=lambda label: ahead[label][0])
    gained, gap = (paired(one, rows["gvpo"])[0] for one in (own, rows["rft"]))
    return {
        "best_other": best,
        "behind_it": [round(value, 4) for value in ahead[best]],
        "ahead_of_gvpo": [round(value, 4) for value in paired(own, rows["gvpo"])],
        "ahead_of_rft": [round(value, 4) for value in paired(own, rows["rft"])],
        "share_of_gap_closed": round(gained / gap, 3) if gap > 0 else None,
        "alpha": round(mean(row["alpha"] for row in own), 3),
    }


def _judges(task: str, labelled: Sequence[Labelled]) -> dict[str, float]:
    """How well metrics of held-out groups rank runs: the share of pairs of runs of the grid on the
    same log that a metric orders in the same way as the reward of new answers."""
    grid = [row for sweep, _, row in labelled if sweep == "grid" and row["job"]["task"] == task]
    pairs = [
        (a, b)
        for a, b in combinations(grid, 2)
        if a["job"]["seed"] == b["job"]["seed"] and a["reward"] != b["reward"]
    ]
    if not pairs:  # all runs earn the same
        return {}
    return {
        name: mean((a[name] > b[name]) == (a["reward"] > b["reward"]) for a, b in pairs)
        for name in ("score", "reweighted_reward", "explained_variance", "best_log_ratio")
    }


def against_grid(found: Mapping[str, Any], labelled: Sequence[Labelled]) -> dict[str, Any]:
    """The proposal of a search beside the best of the grid on the same log, by reward - beta KL at
    the beta of the study, on test prompts."""
    case = (found["task"], found["seed"])
    value: dict[str, dict[str, float]] = {"tune": {}, "grid": {}}
    for sweep, label, row in labelled:
        if sweep in value and (row["job"]["task"], row["job"]["seed"]) == case:
            value[sweep][label] = row["reward"] - BETA * row["kl"]
    (own,) = value["tune"].values()
    best = max(value["grid"], key=value["grid"].__getitem__)
    return {
        "task": found["task"],
        "seed": found["seed"],
        "proposed": found["chosen"]["settings"],
        "objective": round(own, 4),
        "grid_best": best,
        "grid_objective": round(value["grid"][best], 4),
        "share_of_best": round(own / value["grid"][best], 3),
        "trials": len(found["trials"]) - 1,
        "answers_per_prompt": found["samples"],
    }


def _markdown(
    name: str, table: Table, frames: Mapping[str, Any], labelled: Sequence[Labelled]
) -> str:
    """A Markdown table; if the rows are losses, the best comes first."""
    task, sweep = name.split(": ")
    rates = {
        label: row["job"]["rate"]
        for own, label, row in labelled
        if own == sweep and row["job"]["task"] == task
    }
    items = list(table.items())
    if sweep in OF_LOSSES:
        items.sort(key=lambda item: -item[1]["objective"][0])
    heads = ["", *FIGURES.values(), "rate"]
    lines = [
        f"## {name}",
        "",
        "| " + " | ".join(heads) + " |",
        "| --- " * len(heads) + "|",
    ]
    if sweep == "losses":
        frame = frames[task]
        best = f"{BETA:g}"
        cells = [f"{frame['objective'][best]:.3f}", "", f"{frame['reward'][best]:.3f}"]
        lines.append(f"| *the optimum* | {' | '.join(cells)} |" + " |" * (len(heads) - 3))
    for label, cells_of in items:
        cells = [_figure(cells_of.get(figure)) for figure in FIGURES]
        rate = f"{rates[label]:g}" if rates.get(label) else ""
        lines.append(f"| {label} | {' | '.join(cells)} | {rate} |")
    return "\n".join(lines)


def _figure(cell: Cell | None) -> str:
    if cell is None:
        return ""
    value, error = cell
    digits = 3 if abs(value) < 10 else 1
    return f"{value:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")
