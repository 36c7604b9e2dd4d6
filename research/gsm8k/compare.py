"""Figures of policies and of baselines without a policy, on the same held-out questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import on_path  # noqa: F401
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

from gvpo_offline.hashing import text_keys
from gvpo_offline.stream.selecting.conditions import held_out_mask

Row = dict[str, Any]
RESAMPLES = 2000
WHO, LENGTH, REFERENCE = "who answered", "length", "reference, a token"


@dataclass(frozen=True)
class Split:
    """The questions of a log, split in three.

    Attributes:
        training: for training the policies and fitting the baselines.
        fitted: for selecting learning rates and fitting the scales of policies.
        held_out: for the figures.
    """

    training: Answers
    fitted: Answers
    held_out: Answers

    @classmethod
    def read(cls, dataset: Path, held_out: float, not_trained: float) -> Split:
        """Split as `eval_fraction` does by group: `not_trained` holds out a superset of `held_out`.

        Each group has another question.
        """
        ids = Answers.read(dataset).ids
        last = held_out_mask(text_keys(ids), held_out)
        neither = held_out_mask(text_keys(ids), not_trained)

        def of(kept: Bools) -> Answers:
            return Answers.read(dataset, [name for name, own in zip(ids, kept, strict=True) if own])

        return cls(of(~neither), of(neither & ~last), of(last))

    def models_only(self) -> Split:
        """The same split without the person's responses."""
        return Split(
            *(own.only(models(own)) for own in (self.training, self.fitted, self.held_out))
        )


def models(answers: Answers) -> Bools:
    """(N,) bool: whether the sampler is a model."""
    return np.array([name != PERSON for name in answers.samplers])


def mean_by_sampler(answers: Answers, values_N: Floats) -> dict[str, float]:
    """The mean of `values_N` over the responses of each sampler."""
    samplers = np.array(answers.samplers)
    names = sorted(set(answers.samplers))
    return {name: float(values_N[samplers == name].mean()) for name in names}


def who(split: Split, answers: Answers) -> Floats:
    """(N,) the mean reward of each response's sampler on the training groups."""
    means = mean_by_sampler(split.training, split.training.rewards_N)
    return np.array([means[name] for name in answers.samplers])


def prediction(split: Split, fitted_N: Floats, held_out_N: Floats) -> Prediction:
    """Predictions for the held-out responses, with scales fitted on the `fitted` ones."""
    own = split.fitted
    left_N = own.rewards_N - who(split, own)
    return Prediction(
        held_out_N,
        fitted_scale(own, own.rewards_N, fitted_N),
        who(split, split.held_out),
        fitted_scale(own, left_N, fitted_N),
    )


def baselines(split: Split) -> dict[str, Prediction]:
    """Predictions of the reward without a trained policy, in units of reward.

    Each is fitted on all training groups: the mean reward of the sampler; a multiple of the
    length; a multiple of the reference's mean log-prob per token.
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
        own = prediction(split, worth * of(split.fitted), worth * of(split.held_out))
        found[name] = replace(own, scale=1.0)
    return found


def compared(answers: Answers, predicted: Mapping[str, Prediction], first: str) -> dict[str, Row]:
    """Figures of each prediction, and their differences to those of `first`, with 95% intervals."""
    sums = {name: group_sums(answers, own) for name, own in predicted.items()}
    found = {name: overall(own) for name, own in sums.items()}
    samples = {name: resampled(own, times=RESAMPLES) for name, own in sums.items()}

    def less_first(name: str, figure: str) -> list[float]:
        samples_B = samples[name][figure] - samples[first][figure]
        return with_interval(found[name][figure] - found[first][figure], samples_B)

    return {
        name: {
            "scale": predicted[name].scale,
            "figures": {
                figure: with_interval(value, samples[name][figure]) for figure, value in own.items()
            },
            "less_first": {
                figure: less_first(name, figure) for figure in ("fitted", "pair_accuracy")
            },
        }
        for name, own in found.items()
    }


def with_interval(value: float, samples_B: Floats) -> list[float]:
    """A figure followed by the 95% interval of its bootstrap samples."""
    return [value, *interval(samples_B)]


def rounded(found: Any) -> Any:
    """The same structure with numbers rounded to five significant digits."""
    if isinstance(found, dict):
        return {name: rounded(own) for name, own in found.items()}
    if isinstance(found, list):
        return [rounded(own) for own in found]
    return float(f"{found:.5g}") if isinstance(found, float) else found


def table(rows: Sequence[Row]) -> str:
    """The rows of one log as a Markdown table."""
    heads = (
        *("loss", "rate", "explained variance", "c", "of c times it", "beyond who answered"),
        *("pair accuracy", "less gvpo's", "order", "best responses"),
    )
    lines = [heads, ("---",) * len(heads), *map(_cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    """The cells of a row; baselines have no rate, scale or log-ratios."""
    own = row["figures"]

    def cell(figure: Sequence[float], digits: int = 3) -> str:
        value, low, high = (f"{number:.{digits}f}" for number in figure)
        return f"{value} [{low}, {high}]"

    policy = "rate" in row
    return (
        row["loss"] + (f", seed {row['seed']}" if row.get("seed") else ""),
        f"{row['rate']:g}" if policy else "",
        cell(own["explained_variance"], 2),
        f"{row['scale']:.2f}" if policy else "",
        cell(own["fitted"]),
        cell(own["beyond_who"]),
        cell(own["pair_accuracy"], 2),
        cell(row["less_first"]["pair_accuracy"], 2),
        f"{own['kendall'][0]:+.2f}",
        f"{row['best_log_ratio']:+.2f}" if policy else "",
    )
