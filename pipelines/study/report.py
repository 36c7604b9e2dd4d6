"""Tables of a study, from its lines alone."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

FIGURES = (
    *("reward", "pass_1", "pass_k", "kl", "objective"),
    *("explained_variance", "best_log_ratio"),
)
Rates = dict[tuple[str, str], float]


def finish(rows: list[dict[str, Any]], rates: Rates, folder: Path, seconds: float) -> None:
    """Print the tables, write them, and print one JSON object."""
    tables = tables_of(rows)
    text = "\n\n".join(_text(name, table, rates) for name, table in tables.items())
    (folder / "tables.txt").write_text(text + "\n")
    (folder / "tables.json").write_text(json.dumps(tables, indent=1) + "\n")
    print(f"\n{text}\n\n{seconds:.0f} seconds, {len(rows)} runs")
    verdict = {
        name: {loss: round(row["objective"][0], 4) for loss, row in table.items()}
        for name, table in tables.items()
        if name.endswith(": losses")
    }
    print(json.dumps({**verdict, "seconds": round(seconds)}))


def tables_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By task and sweep, for each loss (and setting): each figure's mean and standard error."""
    gathered: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        job = row["job"]
        setting = {
            "losses": "",
            "models only": "",
            "beta": f" beta {job['beta']:g}",
        }.get(job["sweep"], " " + " ".join(f"{n} {name}" for name, n in job["mix"].items()))
        gathered[f"{job['task']}: {job['sweep']}"][job["loss"] + setting].append(row)
    return {
        name: {label: _means(own) for label, own in table.items()}
        for name, table in gathered.items()
    }


def _means(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    found = {}
    for name in FIGURES:
        values = [row[name] for row in rows]
        error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        found[name] = (mean(values), error)
    return found


def _text(name: str, table: dict[str, Any], rates: Rates) -> str:
    width = max(map(len, table))
    lines = [name, f"{'':<{width}}  " + "".join(f"{figure:>20}" for figure in FIGURES) + "   rate"]
    task = name.split(":")[0]
    for label, row in sorted(table.items(), key=lambda item: -item[1]["objective"][0]):
        cells = "".join(f"{row[f][0]:>11.3f} ± {row[f][1]:.3f}" + " " for f in FIGURES)
        lines.append(f"{label:<{width}}  {cells} {rates[task, label.split()[0]]:g}")
    return "\n".join(lines)
