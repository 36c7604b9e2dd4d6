"""Policies and what knows less than they do, on the same held-out questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fit import (
    Answers,
    Bools,
    Floats,
    Prediction,
    fitted_scale,
    group_sums,
    interval,
    overall,
    resampled,
)
from logs import PERSON

from gvpo_offline.stream.selecting.conditions import held_out_mask

Row = dict[str, Any]
RESAMPLES = 2000
WHO, LENGTH, REFERENCE = "who answered", "length", "reference, a token"


@dataclass(frozen=True)
class Split:
    """The questions of a log, cut in three.

    Attributes:
        training: what runs train on; baselines are fitted on it.
        fitted: what rates and scales of policies are fitted on.
        held_out: what figures are of.
    """

    training: Answers
    fitted: Answers
    held_out: Answers

    @classmethod
    def read(cls, dataset: Path, held_out: float, not_trained: float) -> Split:
        """As `eval_fraction` cuts: the larger `not_trained` holds out the same and more."""
        ids = Answers.read(dataset).ids
        last = held_out_mask(list(ids), held_out)
        neither = held_out_mask(list(ids), not_trained)

        def of(kept: Bools) -> Answers:
            return Answers.read(dataset, [name for name, own in zip(ids, kept, strict=True) if own])

        return cls(of(~neither), of(neither & ~last), of(last))

    def models_only(self) -> Split:
        """Without the person."""
        return Split(
            *(own.only(models(own)) for own in (self.training, self.fitted, self.held_out))
        )


def models(answers: Answers) -> Bools:
    """(N,) bool: who is not the person."""
    return np.array([name != PERSON for name in answers.samplers])


def mean_by_sampler(answers: Answers, values_N: Floats) -> dict[str, float]:
    """The mean of each sampler's responses."""
    samplers = np.array(answers.samplers)
    return {name: float(values_N[samplers == name].mean()) for name in sorted(set(samplers))}


def who(split: Split, answers: Answers) -> Floats:
    """(N,) the mean reward, on the training groups, of whoever wrote each response."""
    means = mean_by_sampler(split.training, split.training.rewards_N)
    return np.array([means[name] for name in answers.samplers])


def prediction(split: Split, fitted_N: Floats, held_out_N: Floats) -> Prediction:
    """What values say of the held-out responses, with scales fitted on the `fitted` ones."""
    own = split.fitted
    left_N = own.rewards_N - who(split, own)
    return Prediction(
        held_out_N,
        fitted_scale(own, own.rewards_N, fitted_N),
        who(split, split.held_out),
        fitted_scale(own, left_N, fitted_N),
    )


def baselines(split: Split) -> dict[str, Prediction]:
    """What can be said without a policy that was trained, in units of reward.

    Each is fitted on all training groups: the mean reward of whoever answered; so much a token of
    length; so much a nat of the reference's mean log-prob a token.
    """
    knowing: dict[str, Callable[[Answers], Floats]] = {
        WHO: lambda answers: who(split, answers),
        LENGTH: lambda answers: answers.lengths_N,
        REFERENCE: lambda answers: answers.reference_N / answers.lengths_N,
    }
    found = {}
    for name, of in knowing.items():
        worth = fitted_scale(split.training, split.training.rewards_N, of(split.training))
        worth = 1.0 if name == WHO else worth
        found[name] = prediction(split, worth * of(split.fitted), worth * of(split.held_out))
    return found


def compared(answers: Answers, predicted: Mapping[str, Prediction], first: str) -> dict[str, Row]:
    """The figures of each prediction with their 95% intervals, and those of it less `first`'s."""
    found = {}
    samples = {}
    for name, own in predicted.items():
        sums = group_sums(answers, own)
        samples[name] = resampled(sums, times=RESAMPLES)
        found[name] = overall(sums)
    return {
        name: {
            "scale": rounded(predicted[name].scale),
            "figures": {
                figure: [rounded(v) for v in (value, *interval(samples[name][figure]))]
                for figure, value in own.items()
            },
            "less_first": {
                figure: [
                    rounded(v)
                    for v in (
                        found[name][figure] - found[first][figure],
                        *interval(samples[name][figure] - samples[first][figure]),
                    )
                ]
                for figure in ("fitted", "pair_accuracy")
            },
        }
        for name, own in found.items()
    }


def rounded(value: float) -> float:
    """Four digits after the point, which is more than an interval warrants."""
    return round(float(value), 4)


def table(rows: Sequence[Row]) -> str:
    """The rows of one log as a Markdown table."""
    heads = (
        *("loss", "rate", "explained variance", "c", "of c times it", "beyond who answered"),
        *("pair accuracy", "right one first", "order of the samplers", "best responses"),
    )
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    for row in rows:
        own = row["figures"]

        def cell(name: str, digits: int = 3, own: Row = own) -> str:
            value, low, high = own[name]
            return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

        label = row["loss"] + (f", seed {row['seed']}" if row.get("seed") else "")
        cells = (
            *(label, f"{row['rate']:g}" if "rate" in row else "", cell("explained_variance", 2)),
            *(f"{row['scale']:.2f}", cell("fitted"), cell("beyond_who"), cell("pair_accuracy")),
            *(f"{own['first_right'][0]:.3f}", f"{own['kendall'][0]:+.2f}"),
            f"{row['best_log_ratio']:+.2f}" if "best_log_ratio" in row else "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
