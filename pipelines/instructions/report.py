"""The results of the runs: a table in Markdown, and one JSON object.

    python pipelines/instructions/report.py --output_dir runs/instructions

shows the runs that are finished, also while others still run.

Every figure is a mean over test prompts and seeds, of prompts' means over their answers. Its
standard error covers both. Prompts and seeds are crossed: the variance of the mean is that of the
prompts' means over P, plus that of the seeds' means over S, less that of the residuals over P S,
which both contain. Gains are paired by prompt, with the untouched policy, which has one run; other
differences are between two runs of one seed on one prompt.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from jobs import LOSSES, UNTOUCHED, Job, Row, rows_of
from stages import HERE

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and seeds with its standard error."""

    mean: float
    se: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.se:.3f}"

    @property
    def unsigned(self) -> str:
        """The same without a plus sign."""
        return str(self).replace("+", "", 1)


def estimate(values_PS: Floats) -> Estimate:
    """The mean of one value for each prompt and seed, with its standard error.

    With one seed, or one prompt, the error covers the other of the two alone.
    """
    P, S = values_PS.shape
    mean = float(values_PS.mean())
    prompts_P, seeds_S = values_PS.mean(1), values_PS.mean(0)
    by_prompt = float(prompts_P.var(ddof=1)) / P if P > 1 else 0.0
    by_seed = float(seeds_S.var(ddof=1)) / S if S > 1 else 0.0
    if P == 1 or S == 1:
        return Estimate(mean, math.sqrt(by_prompt + by_seed))
    residuals_PS = values_PS - prompts_P[:, None] - seeds_S[None] + mean
    rest = float((residuals_PS**2).sum()) / ((P - 1) * (S - 1)) / (P * S)
    # Estimates of variances may be too small by chance; the error is never below one of the two.
    return Estimate(mean, math.sqrt(max(by_prompt, by_seed, by_prompt + by_seed - rest)))


@dataclass(frozen=True)
class Runs:
    """All runs of one loss, with one value for each prompt and seed: (P, S) each.

    Attributes:
        rate: the learning rate.
        alpha: what `imitation` was, for `auto` the number that it stood for; None: no training.
        seeds: their seeds, in the order of the columns.
        rewards: mean reward of the answers.
        kls: mean log-ratio to the reference, nats.
        lengths: mean number of tokens.
        cut: share of answers that the limit of tokens cut.
    """

    rate: float
    alpha: float | None
    seeds: tuple[int, ...]
    rewards: Floats
    kls: Floats
    lengths: Floats
    cut: Floats

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Runs:
        """The runs of some rows, which differ in their seed alone."""
        ordered = sorted(rows, key=lambda row: row["job"]["seed"])
        seeds = tuple(row["job"]["seed"] for row in ordered)
        keys = [[own["prompt"] for own in row["prompts"]] for row in ordered]
        if any(own != keys[0] for own in keys):
            raise ValueError("runs of one comparison have different prompts")
        values = [
            np.array([[own[name] for own in row["prompts"]] for row in ordered], float).T
            for name in ("reward", "kl", "length", "truncated")
        ]
        first = ordered[0]
        alpha = first.get("training", {}).get("alpha")
        return cls(first["job"]["rate"], alpha, seeds, *values)

    def common(self, other: Runs) -> tuple[Runs, Runs]:
        """Both with the seeds alone that both have."""
        shared = [seed for seed in self.seeds if seed in other.seeds]
        return self._of_seeds(shared), other._of_seeds(shared)

    def _of_seeds(self, seeds: Sequence[int]) -> Runs:
        columns = [self.seeds.index(seed) for seed in seeds]
        values = (self.rewards, self.kls, self.lengths, self.cut)
        kept = (own[:, columns] for own in values)
        return Runs(self.rate, self.alpha, tuple(seeds), *kept)


# (loss, whether the person's answers are trained on)
Labelled = dict[tuple[str, bool], Runs]


def read(folder: Path) -> Labelled:
    """The runs of the comparison (`comparison.json`) that are finished."""
    finished = rows_of(folder / "runs.jsonl")
    grouped: dict[tuple[str, bool], list[Row]] = {}
    for settings in json.loads((folder / "comparison.json").read_text(encoding="utf-8")):
        job = Job(**settings)
        if job.key in finished:
            grouped.setdefault((job.loss, job.person), []).append(finished[job.key])
    return {label: Runs.of(rows) for label, rows in grouped.items()}


def table(runs: Labelled, beta: float) -> str:
    """The table of all losses, then that of the recommended one less each other one, paired."""
    untouched = runs[UNTOUCHED, True]
    heads = "reward", "gain", "KL", "reward - beta KL", "tokens", "cut", "seeds"
    lines = [_line("log", "loss", "rate", *heads), _line(*["---"] * (3 + len(heads)))]
    for (loss, person), own in sorted(runs.items(), key=lambda item: _order(item[0])):
        log = "" if loss == UNTOUCHED else "with the person" if person else "models alone"
        lines.append(
            _line(
                log,
                loss,
                f"{own.rate:g}" if own.rate else "",
                estimate(own.rewards).unsigned,
                "" if loss == UNTOUCHED else str(estimate(own.rewards - untouched.rewards)),
                estimate(own.kls).unsigned,
                estimate(own.rewards - beta * own.kls).unsigned,
                f"{own.lengths.mean():.0f}",
                f"{own.cut.mean():.0%}",
                str(len(own.seeds)),
            )
        )
    return "\n".join([*lines, "", *_differences(runs, beta)])


def _differences(runs: Labelled, beta: float) -> list[str]:
    heads = "log", "recommended less", "reward", "KL", "reward - beta KL"
    lines = [_line(*heads), _line(*["---"] * len(heads))]
    for (loss, person), other in sorted(runs.items(), key=lambda item: _order(item[0])):
        if loss in (UNTOUCHED, "recommended") or ("recommended", person) not in runs:
            continue
        mine, theirs = runs["recommended", person].common(other)
        if mine.seeds:
            reward, kl = mine.rewards - theirs.rewards, mine.kls - theirs.kls
            found = [str(estimate(own)) for own in (reward, kl, reward - beta * kl)]
            lines.append(_line("with the person" if person else "models alone", loss, *found))
    return lines


def _order(label: tuple[str, bool]) -> tuple[bool, int]:
    loss, person = label
    return not person, [UNTOUCHED, *LOSSES].index(loss)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def summary(runs: Labelled, beta: float) -> dict[str, Any]:
    """The figures of each loss on the log with the person, and of those without, as JSON."""
    untouched, recommended = runs[UNTOUCHED, True], runs.get(("recommended", True))

    def figures(own: Runs) -> dict[str, float]:
        estimates = {
            "reward": estimate(own.rewards),
            "kl": estimate(own.kls),
            "objective": estimate(own.rewards - beta * own.kls),
            "gain": estimate(own.rewards - untouched.rewards),
        }
        found = {name: value.mean for name, value in estimates.items()}
        found |= {f"{name}_se": value.se for name, value in estimates.items()}
        found |= {"cut": float(own.cut.mean()), "tokens": float(own.lengths.mean())}
        return {name: round(value, 4) for name, value in found.items()} | {
            "rate": own.rate,
            "seeds": len(own.seeds),
        }

    return {
        **{loss: figures(own) for (loss, person), own in runs.items() if person},
        "without_person": {
            loss: figures(own) for (loss, person), own in runs.items() if not person
        },
        "recommended_is": {**LOSSES["recommended"], "alpha": recommended and recommended.alpha},
        "beta": beta,
        "prompts": len(untouched.rewards),
    }


def beta_of_runs() -> float:
    """The beta of train.yaml."""
    settings = yaml.safe_load((HERE / "train.yaml").read_text(encoding="utf-8"))
    return float(settings["beta"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/instructions"))
    runs = read(parser.parse_args(argv).output_dir)
    print(table(runs, beta_of_runs()))
    print(json.dumps(summary(runs, beta_of_runs())))


if __name__ == "__main__":
    main()
