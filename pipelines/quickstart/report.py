"""Reports of the quickstart: a table, a picture, and summary.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The same seed on four CPUs: rounding alone changes what the models are trained to. Mean and
# standard deviation over the CPUs.
ON_OTHER_CPUS = {
    "before": (0.480, 0.479, 0.488, 0.480),
    "after_sft": (0.638, 0.641, 0.632, 0.641),
    "after_gvpo": (0.926, 0.914, 0.898, 0.877),
}
LABELS = {"before": "before", "after_sft": "SFT on the best", "after_gvpo": "GVPO"}


@dataclass(frozen=True)
class Score:
    """Held-out reward of one policy.

    Attributes:
        mean: mean reward over prompts and answers.
        standard_error: standard error of the mean over prompts.
        right: share of answers with a reward above 0.
        perfect: share of answers with the highest possible reward.
    """

    mean: float
    standard_error: float
    right: float
    perfect: float


def score(rewards: Sequence[float], answers_per_prompt: int) -> Score:
    """The score of rewards in prompt order, `answers_per_prompt` consecutive ones per prompt."""
    n = len(rewards) // answers_per_prompt
    means = [
        sum(rewards[i * answers_per_prompt : (i + 1) * answers_per_prompt]) / answers_per_prompt
        for i in range(n)
    ]
    mean = sum(means) / n
    variance = sum((m - mean) ** 2 for m in means) / (n - 1)
    return Score(
        mean=mean,
        standard_error=math.sqrt(variance / n),
        right=sum(r > 0 for r in rewards) / len(rewards),
        perfect=sum(r == 1 for r in rewards) / len(rewards),
    )


def table(scores: dict[str, Score]) -> str:
    """A text table of the scores."""
    lines = [f"{'':<18}{'held-out reward':>17}{'right':>9}{'perfect':>10}"]
    for key, label in LABELS.items():
        s = scores[key]
        reward = f"{s.mean:.3f} ± {s.standard_error:.3f}"
        lines.append(f"{label:<18}{reward:>17}{s.right:>9.1%}{s.perfect:>10.1%}")
    return "\n".join(lines)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the standard deviation of one value."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def elsewhere() -> str:
    """What the same seed gave on other CPUs, as a sentence."""
    parts = []
    for key, label in LABELS.items():
        mean, deviation = mean_and_deviation(ON_OTHER_CPUS[key])
        parts.append(f"{label} {mean:.3f} ± {deviation:.3f}")
    return (
        "Training is rounded differently on every CPU: four of them\ngave, with the standard "
        f"deviation of one, {', '.join(parts)}."
    )


def spread(found: Sequence[dict[str, Score]]) -> str:
    """The mean of each policy over runs with several seeds, and the standard deviation of a run."""
    lines = []
    for key, label in LABELS.items():
        means = [scores[key].mean for scores in found]
        mean, deviation = mean_and_deviation(means)
        runs = ", ".join(f"{m:.3f}" for m in means)
        lines.append(f"{label:<18}{mean:.3f}, standard deviation {deviation:.3f} ({runs})")
    return "\n".join(lines)


def write_summary(path: Path, scores: dict[str, Score], details: dict[str, Any]) -> None:
    """Write `summary.json`: held-out rewards before and after training, and `details`."""
    content = {
        **{key: s.mean for key, s in scores.items()},
        "standard_errors": {key: s.standard_error for key, s in scores.items()},
        "right": {key: s.right for key, s in scores.items()},
        "perfect": {key: s.perfect for key, s in scores.items()},
        **details,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def draw(path: Path, scores: dict[str, Score], history: list[dict[str, Any]], best: float) -> None:
    """Draw three panels: held-out rewards, explained variance, log-ratios."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    grey, blue, orange = "#9aa0a6", "#1a73e8", "#e8710a"
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    colours = {"before": grey, "after_sft": orange, "after_gvpo": blue}
    for place, key in enumerate(LABELS):
        s = scores[key]
        left.bar(place, s.mean, yerr=s.standard_error, color=colours[key], width=0.62, capsize=4)
        left.text(place, s.mean - 0.07, f"{s.mean:.2f}", ha="center", color="white", weight="bold")
    left.set_xticks(range(len(LABELS)), list(LABELS.values()))
    left.axhline(best, color="black", lw=1, ls=":")
    left.text(-0.4, best + 0.015, "best logged response of each group (mean)", fontsize=8)
    left.set(
        ylim=(0, 1.08), title="reward on held-out prompts", ylabel="share of the possible saving"
    )
    for name, colour, label in (
        ("explained_variance", grey, "training groups"),
        ("eval_explained_variance", blue, "held-out groups"),
    ):
        points = [(row["step"], row[name]) for row in history if name in row]
        middle.plot(*zip(*points, strict=True), color=colour, label=label)
    middle.axhline(0, color="black", lw=0.5)
    middle.set(title="explained variance of rewards", xlabel="step", ylim=(-0.1, 1))
    middle.legend(frameon=False)
    for name, colour, label in (
        ("best_log_ratio_mean", blue, "best of each group"),
        ("log_ratio_mean", grey, "all responses"),
    ):
        points = [(row["step"], row[name]) for row in history if name in row]
        right.plot(*zip(*points, strict=True), color=colour, label=label)
    right.set(title="log-ratio to the reference (nats)", xlabel="step")
    right.legend(frameon=False)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
