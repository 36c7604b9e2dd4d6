"""Whether a run goes well, in one sentence: the first thing that its page says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from gvpo_offline.report.page.blocks import Notice
from gvpo_offline.report.run.facts import RunFacts, SetFacts
from gvpo_offline.report.run.words import short, step_of
from gvpo_offline.train.limits import EXPLAINED_FALL

_SIGMAS = 2.0
_RANK = {"error": 0, "warning": 1, "note": 2}


def headline(own: RunFacts, name: str = "") -> Notice:
    """The worst of what the figures of a run say, or else that it goes well.

    Args:
        own: the facts of the run.
        name: put before the text, where a page has several runs.
    """
    found = list(_found(own))
    worst = min(found, key=lambda each: _RANK[each.severity])
    more = f" ({len(own.warnings):,} warnings below)" if len(own.warnings) > 1 else ""
    more = " (a warning below)" if len(own.warnings) == 1 else more
    text = f"{f'{name}: ' if name else ''}{_BEGINNINGS[own.state]}{worst.text}{more}"
    return Notice(worst.severity, text, worst.remedy)


_BEGINNINGS = {
    "finished": "",
    "open": "So far: ",
    "stopped": "Stopped before the last step: ",
    "failed": "",
}


def _found(own: RunFacts) -> Iterator[Notice]:
    if own.state == "failed":
        yield Notice(
            "error",
            f"Training ended with an error at {step_of(own.step)}: {short(own.error, 500)}",
            "Correct the cause, and continue with resume_from_checkpoint: auto.",
        )
    for part in own.sets:
        if part.not_finite:
            yield Notice(
                "error",
                f"The loss ({part.name}) is not finite since {step_of(part.first_not_finite)}",
                "Lower the learning rate, and start from a checkpoint before that step.",
            )
    for part in own.held_out_sets:
        yield from _fit(part) if own.regression else _loss(part)
        yield from _answers(part)
    if not own.logged_steps:
        yield Notice("note", "Nothing is logged yet")
    elif not own.held_out_sets:
        yield Notice(
            "warning",
            "No held-out figures, so this page cannot tell whether the policy learned anything",
            "Set eval_fraction or eval_dataset, and eval_strategy; or judge the policy with "
            "gvpo-offline evaluate on a dataset that it has not seen.",
        )


def _fit(part: SetFacts) -> Iterator[Notice]:
    last, best = part.last.get("explained_variance"), part.best_explained_variance
    if last is None or best is None or not math.isfinite(last):
        yield Notice("warning", f"No explained variance is known ({part.name})")
    elif last <= 0:
        yield Notice(
            "warning",
            f"The policy is no better than the reference: explained variance ({part.name}) is "
            f"{last:.3g}, not above 0",
            "Early in a run, wait. Otherwise lower the learning rate if it fell, raise it if it "
            "stays at 0.",
        )
    elif last < best.value - EXPLAINED_FALL:
        yield Notice(
            "warning",
            f"The policy overfits: explained variance ({part.name}) fell from {best.value:.3g} at "
            f"{step_of(best.step)} to {last:.3g}",
            "Take a checkpoint from about there, or set load_best_model_at_end.",
        )
    else:
        yield Notice(
            "note",
            f"The policy learns what holds for held-out groups: explained variance ({part.name}) "
            f"is {last:.3g}",
        )


def _loss(part: SetFacts) -> Iterator[Notice]:
    """For a loss whose optimum has another explained variance than 1."""
    first, last = part.first.get("loss"), part.last.get("loss")
    if first is None or last is None or not math.isfinite(last):
        return
    text = f"loss ({part.name}) was {first:.4g} at first and is {last:.4g}"
    if last > first:
        yield Notice(
            "warning",
            f"The policy gets worse on held-out groups: {text}",
            "Lower the learning rate, or take an earlier checkpoint.",
        )
    else:
        yield Notice("note", f"The held-out {text}")


def _answers(part: SetFacts) -> Iterator[Notice]:
    """Only a fall of the reward that its standard errors cannot explain."""
    first, last = (side.get("sampled_reward", math.nan) for side in (part.first, part.last))
    errors = [side.get("sampled_reward_se", math.nan) for side in (part.first, part.last)]
    if last < first - _SIGMAS * math.hypot(*errors):
        yield Notice(
            "warning",
            f"The reward of sampled answers fell from {first:.3g} to {last:.3g}",
            "Read the answers below; raise beta or lower the learning rate.",
        )


def headlines(facts: Sequence[RunFacts]) -> list[Notice]:
    """One for each run, with its name where there are several."""
    return [headline(own, own.name if len(facts) > 1 else "") for own in facts]
