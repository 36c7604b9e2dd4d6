"""Plots of the figures of `convergence.py`, from its JSON file; deterministic output.

    python benchmarks/convergence/pictures.py [runs/bench-convergence/convergence.json]
        [--output_dir docs/pictures]

`convergence-losses.svg`: KL by loss and sampler. `convergence-sweeps.svg`: KL by number of groups,
sampler distance, k, and anchor. Points are means over seeds; lines and bands range from the lowest
to the highest seed. Needs matplotlib (extra `report`).
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Smaller KLs (nats) are rounding error; the limit of the logarithmic axis.
FLOOR = 1e-5
TICKS = {
    FLOOR: "≤ 0.00001",
    1e-4: "0.0001",
    1e-3: "0.001",
    1e-2: "0.01",
    0.1: "0.1",
    1.0: "1",
}
COLOURS = ("#1a73e8", "#e8710a", "#188038", "#9334e6", "#d93025", "#5f6368")
MARKERS = ("o", "s", "^", "D", "v", "P")
# The variable of each sweep.
SWEEPS = {
    "groups": "groups a prompt",
    "distance": "KL of the sampler to the reference, nats",
    "group_size": "k, at 96 responses a prompt",
    "anchor": "anchor",
}
Figures = dict[str, Any]


def draw_all(figures: Figures, folder: Path) -> list[Path]:
    """Draw both pictures; returns their paths.

    Args:
        figures: the content of convergence.json.
        folder: created if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "convergence-losses.svg", folder / "convergence-sweeps.svg"]
    with _plainly() as plt:
        for path, drawn in zip(paths, (_losses, _sweeps), strict=True):
            figure = drawn(figures, plt)
            drawing = io.StringIO()
            figure.savefig(drawing, format="svg", metadata={"Date": None, "Creator": None})
            plt.close(figure)
            # Two decimals of a point suffice, and make the file a third smaller.
            short = re.sub(r"(\d\.\d\d)\d+", r"\1", drawing.getvalue())
            path.write_text(short, encoding="utf-8")
    return paths


@contextmanager
def _plainly() -> Iterator[Any]:
    """Pyplot without a display, with text as text and deterministic ids."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    settings = {
        "svg.hashsalt": "gvpo-offline",
        "svg.fonttype": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "font.sans-serif": ["DejaVu Sans"],
        "legend.frameon": False,
    }
    with plt.rc_context(settings):
        yield plt


def _losses(figures: Figures, plt: Any) -> Any:
    """One row per loss, one mark per sampler."""
    table = figures["table"]
    figure, axis = plt.subplots(figsize=(9, 6.4), layout="constrained")
    samplers = list(next(iter(table.values())))
    for number, sampler in enumerate(samplers):
        places = [row + 0.11 * (number - (len(samplers) - 1) / 2) for row in range(len(table))]
        rows = [own[sampler] for own in table.values()]
        _marks(axis, places, rows, number, label=sampler, upright=False)
    untouched = figures["untouched"]
    _rule(axis.axvline, untouched, "the untouched reference")
    _rule(axis.axvline, figures["gate"] * untouched, "the gate, 1% of it", style="--")
    axis.set(xscale="log", xlim=(FLOOR / 1.5, None), ylim=(len(table) - 0.5, -0.5))
    axis.set_xticks(list(TICKS), list(TICKS.values()))
    axis.set_xticks([], minor=True)
    axis.set(yticks=range(len(table)), yticklabels=list(table))
    axis.set(xlabel="KL(π ‖ π*), nats")
    axis.set_title("Where each loss ends, by who sampled the log")
    axis.grid(axis="x", color="#e8eaed")
    axis.set_axisbelow(True)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _sweeps(figures: Figures, plt: Any) -> Any:
    """One panel per sweep; the panels with losses share a legend."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained", sharey=True)
    for axis, (name, rows) in zip(axes.flat, figures["sweeps"].items(), strict=True):
        for number, series in enumerate(dict.fromkeys(row["series"] for row in rows)):
            own = [row for row in rows if row["series"] == series]
            xs = [row["x"] for row in own]
            _marks(axis, xs, own, number, label=series, upright=True)
        if name != "anchor":  # each beta has its own KL of the reference
            _rule(axis.axhline, figures["untouched"], "untouched")
            _rule(axis.axhline, figures["gate"] * figures["untouched"], "gate", style="--")
        if name != "distance":
            xs = sorted({row["x"] for row in rows})
            # A logarithmic axis, or symmetric logarithmic if there is a 0.
            scale = {"value": "symlog", "linthresh": xs[1]} if xs[0] == 0 else {"value": "log"}
            axis.set_xscale(**scale)
            axis.set_xticks(xs, [f"{x:g}" for x in xs])
            axis.set_xticks([], minor=True)
        axis.set(yscale="log", ylim=(FLOOR / 1.5, 4.0), xlabel=SWEEPS[name])
        axis.set_yticks(list(TICKS), list(TICKS.values()))
        axis.set_yticks([], minor=True)
        axis.grid(axis="y", color="#e8eaed")
        axis.set_axisbelow(True)
    axes[0, 0].legend(loc="lower left")
    axes[1, 1].legend(loc="upper left")
    for axis in axes[:, 0]:
        axis.set_ylabel("KL(π ‖ π*), nats")
    return figure


def _marks(
    axis: Any, places: list[float], rows: list[Figures], number: int, *, label: str, upright: bool
) -> None:
    """Plot means, and ranges over seeds; if `upright`, with a line and a band."""
    means = [max(row["kl"], FLOOR) for row in rows]
    lows = [max(min(row["by_seed"]), FLOOR) for row in rows]
    highs = [max(*row["by_seed"], FLOOR) for row in rows]
    colour, marker = COLOURS[number], MARKERS[number]
    style = {"color": colour, "marker": marker, "label": label}
    if not upright:
        axis.hlines(places, lows, highs, color=colour, lw=1)
        axis.plot(means, places, ls="", ms=4, **style)
        return
    # gvpo is drawn wide, since listwise coincides with it.
    broad = label == "gvpo"
    axis.fill_between(places, lows, highs, color=colour, alpha=0.15, lw=0)
    axis.plot(places, means, lw=3 if broad else 1.2, ms=7 if broad else 3.5, **style)


def _rule(draw: Any, value: float, label: str, *, style: str = ":") -> None:
    draw(value, color="black", lw=1, ls=style, label=label)


def main() -> None:
    """Parse arguments and draw."""
    parser = argparse.ArgumentParser(description="Plots of the convergence benchmark.")
    default = Path("runs/bench-convergence/convergence.json")
    parser.add_argument("figures", type=Path, nargs="?", default=default)
    parser.add_argument("--output_dir", type=Path, default=Path("docs/pictures"))
    given = parser.parse_args()
    for path in draw_all(json.loads(given.figures.read_text()), given.output_dir):
        print(path)


if __name__ == "__main__":
    main()
