"""Why the proposal of a search may be wrong, as data; where trials tell nothing, none is made.

A search always ends with a best trial. That alone does not say that it is better than the policy
before training, or that other settings would not be better still.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gvpo_offline.tune.search import (
    HIGHEST_RUNG,
    Proposal,
    grid_rate,
    lowest_rung,
    misfit,
    score,
)

DoubtKind = Literal["nothing_explained", "nothing_gained", "explains_nothing", "at_end"]
# Log-mass in nats above which responses gained more than others of their group lost.
_RAISED = 0.1


@dataclass(frozen=True)
class Doubt:
    """One reason to doubt a proposal.

    Attributes:
        kind: nothing_explained: no trial has a positive held-out explained variance;
            nothing_gained: no trial has a positive score, which is that of the policy before
            training; explains_nothing: the proposed trial explains nothing, others do; at_end: a
            proposed value is the smallest or the largest that the search tries.
        text: a sentence with the remedy.
    """

    kind: DoubtKind
    text: str

    @property
    def nothing_told(self) -> bool:
        """Whether nothing should be proposed."""
        return self.kind in ("nothing_explained", "nothing_gained")

    def as_dict(self) -> dict[str, Any]:
        """The doubt as plain data."""
        return {"kind": self.kind, "text": self.text}


def doubts_of(
    found: Proposal,
    *,
    betas: Sequence[float],
    largest_rate: float,
    steps: int,
    run_steps: int,
    loss_type: str,
) -> tuple[Doubt, ...]:
    """The doubts about a proposal.

    Args:
        found: the proposal.
        betas: the candidates, ascending.
        largest_rate: the largest usable rate of the range test.
        steps: optimizer steps of each trial.
        run_steps: those of the run, which cap them.
        loss_type: the loss of the run.
    """
    doubts: list[Doubt] = []
    longer = more_steps(steps, run_steps)
    if loss_type == "gvpo":
        explained = [misfit(trial.metrics) < 1.0 for trial in found.trials]
        if not any(explained):
            doubts.append(
                Doubt(
                    "nothing_explained",
                    f"no trial of {steps} steps has a positive held-out explained variance: "
                    f"{longer}; if that does not help, these groups may not suffice to learn their "
                    "rewards",
                )
            )
        elif not misfit(found.chosen.metrics) < 1.0:
            doubts.append(
                Doubt(
                    "explains_nothing",
                    f"the proposed trial has no positive held-out explained variance after {steps} "
                    f"steps, though others have: {longer}",
                )
            )
    if not any(score(trial.metrics) > 0 for trial in found.trials):
        doubts.append(
            Doubt(
                "nothing_gained",
                f"no trial of {steps} steps has a positive score, which the policy before training "
                f"has as 0: {_remedy_of_no_gain(found, longer)}",
            )
        )
    if not any(own.nothing_told for own in doubts):
        doubts += _at_end(found, betas, largest_rate)
    return tuple(doubts)


def _remedy_of_no_gain(found: Proposal, longer: str) -> str:
    """With all log-ratios of a group above 0, the cap makes them equal, and the score is 0."""
    raised = [
        trial.metrics.get("likely_log_mass_mean", 0.0)
        for trial in found.trials
        if misfit(trial.metrics) < 1.0
    ]
    if max(raised, default=0.0) <= _RAISED:
        return f"{longer}, and look at the rewards of the held-out groups"
    return (
        "trials fit held-out rewards, but raise the log-probs of good and bad responses alike "
        f"(log-mass up to {max(raised):.2g} nats), as happens where the reference finds all logged "
        "responses unlikely. The score tells nothing then: judge trials by new answers (judge: "
        "sample), or search without imitation"
    )


def more_steps(steps: int, run_steps: int) -> str:
    """The advice to train trials longer, and what caps it."""
    if steps < run_steps:
        return f"raise tune_steps (the run has {run_steps:,} steps, which cap it)"
    return (
        f"trials are as long as the run, whose {run_steps:,} steps cap tune_steps: raise max_steps "
        "or num_train_epochs"
    )


def _at_end(found: Proposal, betas: Sequence[float], largest_rate: float) -> list[Doubt]:
    doubts = []
    if len(betas) > 1 and found.beta in (betas[0], betas[-1]):
        doubts.append(
            Doubt(
                "at_end",
                f"the best beta, {found.beta:g}, is the smallest or largest candidate: pass betas "
                "beyond it",
            )
        )
    lowest = grid_rate(largest_rate, min(lowest_rung(largest_rate), -3))
    highest = grid_rate(largest_rate, HIGHEST_RUNG)
    rate = found.learning_rate
    if math.isclose(rate, lowest) or math.isclose(rate, highest):
        which = "smallest" if math.isclose(rate, lowest) else "largest"
        doubts.append(
            Doubt(
                "at_end",
                f"the best learning rate, {rate:g}, is the {which} that the search tries: the "
                f"largest usable rate of its range test ({largest_rate:g}) caps it; with longer "
                "trials (tune_steps) or more groups_per_step the range test is less noisy",
            )
        )
    return doubts
