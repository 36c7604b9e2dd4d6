"""What a page says about a run in numbers: the JSON twin of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from gvpo_offline.report.run.files import TRAINING, Checkpoint, Run, State, Warned
from gvpo_offline.report.run.words import signed_change, step_of, steps_text
from gvpo_offline.train.limits import EXPLAINED_FALL

# The figures of a run's table: name of the metric, and what it is. `{}` stands for a set of groups.
LAST = (
    "loss",
    "explained_variance",
    "best_log_ratio_mean",
    "log_ratio_mean",
    "log_ratio_std",
    "likely_log_mass_mean",
    "log_mass_mean",
    "pair_accuracy",
)
SAMPLED = (
    *("sampled_reward", "sampled_reward_se", "sampled_kl", "sampled_kl_se"),
    *("sampled_objective", "sampled_objective_se", "sampled_length", "sampled_truncated"),
    "sampled_failed",
)
_SIGMAS = 2.0


@dataclass(frozen=True)
class Extreme:
    """The best value of a metric.

    Attributes:
        value: the value.
        step: at which it was logged first.
    """

    value: float
    step: int


@dataclass(frozen=True)
class SetFacts:
    """The metrics of one set of groups.

    Attributes:
        name: "training", "held out" or "held out (dataset)".
        first, last: first and last logged value by metric; those of `LAST` and `SAMPLED`.
        best_explained_variance, least_loss: over all lines; None without a finite value.
        not_finite: number of lines with a loss that is not finite.
        first_not_finite: step of the first of them.
    """

    name: str
    first: Mapping[str, float]
    last: Mapping[str, float]
    best_explained_variance: Extreme | None
    least_loss: Extreme | None
    not_finite: int
    first_not_finite: int | None


@dataclass(frozen=True)
class RunFacts:
    """A run.

    Attributes:
        name: how the page calls it.
        path: its folder.
        state: "finished"; "stopped": it ended before its last step; "failed": an error ended it;
            "open": its files do not tell of an end: it still trains, or was killed.
        error: what ended it; "" for nothing.
        verdict: how it went, in sentences.
        model: what was trained; "" if no file says.
        datasets, held_out: what it was trained and judged on.
        objective: the loss with its settings, in words.
        regression: whether the optimum of the loss has an explained variance of 1.
        beta: reward per nat; None if no file says.
        step: the last step of which its files tell.
        steps: of the whole run; None if no file says.
        epoch: epochs done; None if no line says.
        restarts: how often training was resumed.
        seconds: wall time of training, if it is logged.
        tokens_per_second: median over the lines.
        waiting: median share of time that the device waited for data.
        sets: training and held-out groups.
        warnings: what it warned of.
        warnings_recorded: whether it said them itself; else they are this version's.
        checkpoints: in its folder.
        logged_steps: number of steps with logged metrics.
        written: when its files last changed, ISO 8601 UTC.
    """

    name: str
    path: str
    state: State
    error: str
    verdict: Sequence[str]
    model: str
    datasets: Sequence[str]
    held_out: str
    objective: str
    regression: bool
    beta: float | None
    step: int
    steps: int | None
    epoch: float | None
    restarts: int
    seconds: float | None
    tokens_per_second: float | None
    waiting: float | None
    sets: Sequence[SetFacts]
    warnings: Sequence[Warned]
    warnings_recorded: bool
    checkpoints: Sequence[Checkpoint]
    logged_steps: int
    written: str

    @property
    def training(self) -> SetFacts:
        """The training groups."""
        return self.sets[0]

    @property
    def held_out_sets(self) -> Sequence[SetFacts]:
        """The held-out groups."""
        return self.sets[1:]


def run_facts(run: Run) -> RunFacts:
    """The facts of a run."""
    sets = [_set_facts(run, prefix, name) for prefix, name in run.parts.items()]
    beta = run.training.get("beta")
    return RunFacts(
        name=run.name,
        path=str(run.path),
        state=run.state,
        error=run.error,
        verdict=verdict(run, sets),
        model=str(_of(run, "model", "model_name_or_path") or ""),
        datasets=_datasets(run, "dataset", "datasets"),
        held_out=_held_out(run),
        objective=_objective(run),
        regression=run.fits_rewards,
        beta=float(beta) if isinstance(beta, int | float) else None,
        step=run.last_step,
        steps=run.total_steps,
        epoch=run.last("epoch"),
        restarts=sum(event["kind"] == "resume" for event in run.events),
        seconds=run.last("train_runtime"),
        tokens_per_second=_median(run, "tokens_per_second"),
        waiting=_median(run, "data_wait_share"),
        sets=sets,
        warnings=run.warnings,
        warnings_recorded=run.recorded,
        checkpoints=run.checkpoints,
        logged_steps=run.metrics.height,
        written=run.written,
    )


def _set_facts(run: Run, prefix: str, name: str) -> SetFacts:
    first, last = {}, {}
    for metric in (*LAST, *(() if name == TRAINING else SAMPLED)):
        values = run.values(prefix + metric)
        if values:
            first[metric], last[metric] = values[0][1], values[-1][1]
    losses = run.values(f"{prefix}loss")
    bad = [step for step, value in losses if not math.isfinite(value)]
    return SetFacts(
        name=name,
        first=first,
        last=last,
        best_explained_variance=_extreme(run.values(f"{prefix}explained_variance"), 1.0),
        least_loss=_extreme(losses, -1.0),
        not_finite=len(bad),
        first_not_finite=bad[0] if bad else None,
    )


def _extreme(values: Sequence[tuple[int, float]], sign: float) -> Extreme | None:
    """The first of the largest finite values; of the least ones with sign -1."""
    finite = [(sign * value, -step) for step, value in values if math.isfinite(value)]
    if not finite:
        return None
    value, step = max(finite)
    return Extreme(sign * value, -step)


# ---- in words ----


def verdict(run: Run, sets: Sequence[SetFacts]) -> list[str]:
    """How a run went, in sentences: how far, whether it fits, what it warned of."""
    sentences = [_how_far(run)]
    training, *held_out = sets
    for own in sets:
        if own.not_finite:
            sentences.append(
                f"The loss ({own.name}) was not finite in {own.not_finite:,} lines, first at "
                f"{step_of(own.first_not_finite)}: lower the learning rate, and start from a "
                "checkpoint before that step."
            )
    if run.fits_rewards:
        sentences += [_fit(own) for own in held_out or [training]]
    else:
        sentences += [_loss(own) for own in held_out or [training]]
    sentences += [text for own in held_out for text in _sampled(own)]
    n = len(run.warnings)
    sentences.append(
        f"It warned {'once' if n == 1 else f'{n:,} times'}: see the warnings below."
        if n
        else "It gave no warning."
    )
    return [text for text in sentences if text]


def _how_far(run: Run) -> str:
    of = "" if run.total_steps is None else f" of {run.total_steps:,}"
    far = f"{run.last_step:,}{of} steps"
    return {
        "finished": f"Training finished: {far}.",
        "stopped": f"Training stopped before its last step: {far}.",
        "failed": f"An error ended training after {far}: {run.error}",
        "open": f"{far}. The files do not tell of an end: training goes on, or was killed. "
        f"{'They last changed at ' + run.written if run.written else 'Nothing is logged yet'}.",
    }[run.state]


def _fit(own: SetFacts) -> str:
    last, best = own.last.get("explained_variance"), own.best_explained_variance
    if last is None or best is None:
        return f"No explained variance is logged yet ({own.name})."
    text = f"Explained variance ({own.name}): {last:.3g}"
    if own.name == TRAINING:
        return f"{text}. Nothing is held out, so it does not tell what the policy learned."
    if best.value <= 0:
        return (
            f"{text}: it never rose above 0, the reference's. The policy has learned nothing that "
            "holds for held-out groups."
        )
    if not last >= best.value - EXPLAINED_FALL:
        return (
            f"{text}, after {best.value:.3g} at {step_of(best.step)}: since then the policy "
            "overfits the training groups. Take a checkpoint from about there."
        )
    return f"{text}, the best {best.value:.3g} at {step_of(best.step)}."


def _loss(own: SetFacts) -> str:
    last, least = own.last.get("loss"), own.least_loss
    if last is None or least is None:
        return f"No loss is logged yet ({own.name})."
    return f"Loss ({own.name}): {last:.4g}, the least {least.value:.4g} at {step_of(least.step)}."


def _sampled(own: SetFacts) -> list[str]:
    """How the reward of sampled answers changed, and whether that is beyond its error."""
    if "sampled_reward" not in own.last:
        return []
    first, last = own.first["sampled_reward"], own.last["sampled_reward"]
    errors = [side.get("sampled_reward_se", math.nan) for side in (own.first, own.last)]
    text = f"Reward of sampled answers: {last:.3g} ± {errors[1]:.2g}"
    if not math.isfinite(last - first) or first == last:
        return [f"{text}."]
    error = math.hypot(*errors)
    # Answers to the same prompts vary together, so that this error is an upper bound.
    if math.isfinite(error) and abs(last - first) <= _SIGMAS * error:
        return [f"{text}, {signed_change(last - first)}: within two standard errors of no change."]
    return [f"{text}, {signed_change(last - first)}."]


def _objective(run: Run) -> str:
    own = run.training
    if not own:
        return ""
    parts = [f"{own.get('loss_type', 'gvpo')}, beta {own.get('beta', '?')}"]
    for name in ("anchor", "imitation", "response_weights", "link", "reference_sampler"):
        if own.get(name) not in (None, 0, 0.0, "", "equal", "log"):
            parts.append(f"{name} {own[name]}")
    return ", ".join(parts)


def _of(run: Run, part: str, name: str) -> Any:
    own = run.settings.get(part)
    return own.get(name) if isinstance(own, dict) else None


def _datasets(run: Run, one: str, several: str) -> list[str]:
    named = _of(run, "data", several) or []
    found = [str(each.get("path")) for each in named if isinstance(each, dict)]
    single = _of(run, "data", one)
    return found or ([str(single)] if single else [])


def _held_out(run: Run) -> str:
    other = _datasets(run, "eval_dataset", "eval_datasets")
    if other:
        return ", ".join(other)
    fraction = run.training.get("eval_fraction")
    if not isinstance(fraction, int | float) or not fraction:
        return "nothing" if run.training else ""
    return f"{fraction:.3g} of the {run.training.get('held_out_by', 'group')}s"


def _median(run: Run, name: str) -> float | None:
    values = [value for _, value in run.values(name) if math.isfinite(value)]
    return median(values) if values else None


def progress(facts: RunFacts) -> str:
    """How far a run is: "20 of 20 steps"."""
    return steps_text(facts.step, facts.steps)
