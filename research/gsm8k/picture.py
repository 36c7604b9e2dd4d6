"""Plot losses.json: explained variance, pair accuracy, and log-ratios by sampler.

    python research/gsm8k/picture.py --figures research/gsm8k/losses.json --output gsm8k.svg

Needs matplotlib: the extra gvpo-offline[report].
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

LEFTMOST = -0.1  # crosses further to the left are not drawn
GREY, BLUE, ORANGE = "#9aa0a6", "#1a73e8", "#e8710a"
SAMPLERS = {  # from the worst to the best
    "6b_finetuning": ("#fbbc04", "6B"),
    "175b_finetuning": ("#34a853", "175B"),
    "6b_verification": ("#e8710a", "6B, verified"),
    "175b_verification": ("#1a73e8", "175B, verified"),
}


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw three panels with one line per loss, for the answers of the four models."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "gsm8k", "svg.fonttype": "none", "font.size": 9})
    import matplotlib.pyplot as plt

    rows = [row for row in found["four models"] if not row.get("seed")]
    lines = range(len(rows), 0, -1)
    figure, (fit, pairs, samplers) = plt.subplots(
        1, 3, figsize=(11, 4.4), layout="constrained", sharey=True
    )
    for line, row in zip(lines, rows, strict=True):
        colour = BLUE if row["loss"] == "gvpo" else ORANGE if "rate" in row else GREY
        for axis, name in ((fit, "fitted"), (pairs, "pair_accuracy")):
            value, low, high = row["figures"][name]
            axis.plot([low, high], [line, line], color=colour, lw=1.5)
            axis.plot(value, line, "o", color=colour, ms=5)
        if "rate" in row:
            unscaled = row["figures"]["explained_variance"][0]
            if unscaled > LEFTMOST:
                fit.plot(unscaled, line, "x", color="black", ms=5, zorder=3)
            largest = max(abs(value) for value in row["order"].values())
            for name, (own, _) in SAMPLERS.items():
                samplers.plot(row["order"][name] / largest, line, "o", color=own, ms=5)
    for own, label in SAMPLERS.values():
        samplers.plot([], [], "o", color=own, ms=5, label=label)
    samplers.legend(frameon=False, fontsize=8, loc="lower right", title="sampler")
    for axis, zero in ((fit, 0.0), (pairs, 0.5), (samplers, 0.0)):
        axis.axvline(zero, color="black", lw=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    fit.set_yticks(list(lines), [row["loss"] for row in rows])
    fit.set_xlim(left=LEFTMOST)
    samplers.set_xticks([-1, 0, 1], ["-1", "0", "1"])
    fit.set(title="explained variance (x: not rescaled)")
    pairs.set(title="pair accuracy")
    samplers.set(title="log-ratio by sampler, relative to the largest")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--figures", type=Path, default=Path(__file__).parent / "losses.json")
    parser.add_argument("--output", type=Path, required=True, help="an SVG file")
    given = parser.parse_args()
    draw(json.loads(given.figures.read_text()), given.output)


if __name__ == "__main__":
    main()
