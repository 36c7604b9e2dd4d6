"""The tables of a study, from its rows alone: means and standard errors over seeds."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from jobs import BETA

Row = dict[str, Any]
# (comparison, setting, row)
Labelled = tuple[str, str, Row]
FIGURES = {
    "objective": "reward - β KL",
    "reward": "reward",
    "pass_1": "pass@1",
    "pass_k": "pass@8",
    "kl": "KL",
    "explained_variance": "explained, held out",
    "trained_explained_variance": "explained, trained",
    "best_log_ratio": "best log-ratio",
    "log_mass": "log-mass",
}
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
    tuned = {found["task"]: _against_grid(found, tables) for found in searches}
    verdict = {
        "losses": {task: _standing(task, labelled) for task in frames},
        "tune": tuned,
        "judges": {task: _judges(task, labelled) for task in frames},
        "runs": len({json.dumps(row["job"], sort_keys=True) for _, _, row in labelled}),
    }
    whole = {"tables": tables, "frames": frames, "searches": list(searches), **verdict}
    (folder / "study.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    text = "\n\n".join(_markdown(name, table, frames, labelled) for name, table in tables.items())
    (folder / "tables.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n")
    cpu = sum(row["cpu_seconds"] for _, _, row in labelled)
    print(json.dumps({**verdict, "seconds": round(seconds), "cpu_seconds_of_runs": round(cpu)}))
    from draw import draw

    draw(whole, folder)


def tables_of(labelled: Sequence[Labelled]) -> dict[str, Table]:
    """Mean and standard error of each figure, by "task: comparison" and setting."""
    rows: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for sweep, label, row in labelled:
        rows[f"{row['job']['task']}: {sweep}"][label].append(row)
    tables = {
        name: {label: _cells(own) for label, own in table.items()} for name, table in rows.items()
    }
    for name, table in tables.items():
        task, sweep = name.split(": ")
        if sweep == "beta":
            table.update(_at_other_betas(rows[f"{task}: losses"][WITHOUT_BETA], list(table)))
    return tables


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
    return {name: _cell([row[name] for row in rows]) for name in FIGURES}


def _cell(values: Sequence[float]) -> Cell:
    """Mean and standard error; the error of a single value is NaN."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return mean(values), error


def _standing(task: str, labelled: Sequence[Labelled]) -> dict[str, Any]:
    """The best loss, and the difference between it and GVPO, paired by seed."""
    by_loss: dict[str, dict[int, float]] = defaultdict(dict)
    for sweep, label, row in labelled:
        if sweep == "losses" and row["job"]["task"] == task:
            by_loss[label][row["job"]["seed"]] = row["objective"]
    own = {loss: seeds for loss, seeds in by_loss.items() if not loss.startswith("gvpo,")}
    means = {loss: mean(seeds.values()) for loss, seeds in own.items()}
    best = max(means, key=means.__getitem__)
    behind = _cell([own[best][seed] - own["gvpo"][seed] for seed in own["gvpo"]])
    return {
        "best": best,
        "gvpo_behind": [round(value, 4) for value in behind] if best != "gvpo" else [0.0, 0.0],
        "gvpo_within_one_se": best == "gvpo" or behind[0] <= behind[1],
        "reward_minus_beta_kl": {loss: round(value, 4) for loss, value in means.items()},
    }


def _judges(task: str, labelled: Sequence[Labelled]) -> dict[str, float]:
    """How well metrics of held-out groups rank runs: the share of pairs of runs of the grid that a
    metric orders in the same way as the reward of new answers."""
    grid = [row for sweep, _, row in labelled if sweep == "grid" and row["job"]["task"] == task]
    pairs = [(a, b) for a, b in combinations(grid, 2) if a["reward"] != b["reward"]]
    return {
        name: mean((a[name] > b[name]) == (a["reward"] > b["reward"]) for a, b in pairs)
        for name in ("score", "reweighted_reward", "explained_variance", "best_log_ratio")
    }


def _against_grid(found: Mapping[str, Any], tables: Mapping[str, Table]) -> dict[str, Any]:
    """The proposals of `tune` compared with the best of the grid: for a given beta by
    reward - beta KL, for a searched beta by reward."""
    task = found["task"]
    grid = tables[f"{task}: grid"]
    settled = [label for label in grid if label.startswith(f"{BETA:g}, ")]
    told = {}
    for name, figure, labels in (
        ("rate", "objective", settled),
        ("both", "reward", list(grid)),
    ):
        best = max(labels, key=lambda label: grid[label][figure][0])
        own = tables[f"{task}: tune {name}"]["proposed"][figure][0]
        told[name] = {
            "beta": found[name]["beta"],
            "rate": found[name]["rate"],
            figure: round(own, 4),
            "grid_best": best,
            f"grid_{figure}": round(grid[best][figure][0], 4),
            "share_of_best": round(own / grid[best][figure][0], 3),
            "trials": len(found[name]["trials"]),
        }
    return told


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
    if sweep in ("losses", "models only"):
        items.sort(key=lambda item: -item[1]["objective"][0])
    heads = ["", *FIGURES.values(), "rate"]
    lines = [
        f"### {name}",
        "",
        "| " + " | ".join(heads) + " |",
        "| --- " * len(heads) + "|",
    ]
    if sweep == "losses":
        frame = frames[task]
        cells = [f"{frame['objective'][f'{BETA:g}']:.3f}", f"{frame['reward'][f'{BETA:g}']:.3f}"]
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
