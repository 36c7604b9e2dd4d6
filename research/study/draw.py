"""Pictures of a study, from `study.json` alone; the same figures give the same file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs import BETA

BLUE, ORANGE, GREY, GREEN = "#1a73e8", "#e8710a", "#9aa0a6", "#188038"
COLOURS = {"gvpo": BLUE, "rft": ORANGE, "recommended": GREEN}
SWEEPS = {
    "beta": "β",
    "sampler": "sampler of all 7 responses",
    "group size": "responses per prompt",
    "person": "responses by the person",
}


def draw(whole: Mapping[str, Any], folder: Path) -> None:
    """`study-losses.svg` and `study-moves.svg` in `folder`.

    Args:
        whole: the content of `study.json`.
        folder: an existing folder.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "study", "svg.fonttype": "none", "font.size": 9})
    import matplotlib.pyplot as plt

    tasks = list(whole["frames"])
    figure, axes = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 4.2), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        _losses(axis, task, whole)
    _save(figure, folder / "study-losses.svg")
    moved = [task for task in tasks if f"{task}: beta" in whole["tables"]]
    if not moved:
        return
    shape = (len(moved), len(SWEEPS))
    figure, axes = plt.subplots(*shape, figsize=(3.1 * shape[1], 2.7 * shape[0]), squeeze=False)
    for row, task in zip(axes, moved, strict=True):
        for axis, sweep in zip(row, SWEEPS, strict=True):
            if table := whole["tables"].get(f"{task}: {sweep}"):
                _moves(axis, task, sweep, table)
            else:
                axis.set_axis_off()
        row[0].set_ylabel(f"{task}: reward - β KL")
    _save(figure, folder / "study-moves.svg")


def _losses(axis: Any, task: str, whole: Mapping[str, Any]) -> None:
    table = whole["tables"][f"{task}: losses"]
    items = sorted(table.items(), key=lambda item: item[1]["objective"][0])
    for place, (label, cells) in enumerate(items):
        colour = COLOURS.get(label, BLUE if label.startswith("gvpo") else GREY)
        value, error = cells["objective"]
        axis.errorbar(value, place, xerr=error, color=colour, marker="o", ms=5, capsize=3)
    axis.set_yticks(range(len(items)), [label for label, _ in items])
    axis.grid(axis="y", lw=0.3)
    best = whole["frames"][task]["objective"][f"{BETA:g}"]
    for name, value in (("untouched", table["untouched"]["objective"][0]), ("optimum", best)):
        axis.axvline(value, color="black", lw=0.8, ls=":")
        axis.annotate(name, (value, 1), xycoords=("data", "axes fraction"), ha="center", fontsize=8)
    axis.set_xlabel(f"{task}: reward - {BETA:g} KL on test prompts")


def _moves(axis: Any, task: str, sweep: str, table: Mapping[str, Any]) -> None:
    lines: dict[str, list[tuple[str, float, float]]] = {}
    for label, cells in table.items():
        loss, setting = label.split(", ", 1)
        lines.setdefault(loss, []).append((setting, *cells["objective"]))
    for loss, points in lines.items():
        names, values, errors = zip(*points, strict=True)
        heights = [0.0 if math.isnan(error) else error for error in errors]
        axis.errorbar(
            range(len(names)),
            values,
            heights,
            color=COLOURS.get(loss, GREY),
            label=loss,
            marker="o",
            ms=3,
        )
        axis.set_xticks(range(len(names)), names)
    axis.set_xlabel(SWEEPS[sweep])
    if sweep in ("beta", "sampler"):
        axis.legend(frameon=False, fontsize=7)


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
