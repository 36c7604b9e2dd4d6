"""Callbacks of a run: warnings about bad metrics, and epochs counted in groups.

`metric_warnings` checks the metrics of one set of groups (the training groups, or one held-out
dataset). `MetricMonitor` separates the sets and gives each warning once, and again if its value has
become twice as bad. transformers would count one pass of the data loader, which yields all steps of
a run, as one epoch; `EpochCallback` counts epochs in groups drawn.
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from gvpo_offline.stream.mix import MixedOrder
from gvpo_offline.train.limits import (
    EXPLAINED_FALL,
    HIGH_LOG_MASS,
    LOSS_RISE,
    LOW_BEST_LOG_RATIO,
    LOW_EXPLAINED_VARIANCE,
    LOW_LOG_MASS,
    REGRESSIONS,
)

logger = logging.getLogger(__name__)
_WORSE = 2.0  # a warning is repeated when it is this many times as bad
_EVAL = "eval"
_MARK = "_explained_variance"  # suffix of a key that every line of held-out metrics has
_OF_SAMPLER = re.compile(r"_(log_ratio|reward|weight)/")

Line = tuple[int, Mapping[str, float]]


@dataclass(frozen=True)
class MetricWarning:
    """A warning about one metric.

    Attributes:
        name: the metric.
        badness: positive, and larger if the metric is worse.
        text: what is wrong and what helps.
    """

    name: str
    badness: float
    text: str


def metric_warnings(
    lines: Sequence[Line], *, held_out: bool, regression: bool = True
) -> Iterator[MetricWarning]:
    """The warnings about the last line, given the lines before it.

    Args:
        lines: (optimizer step, metrics) of each line, oldest first. In training the last two are
            enough.
        held_out: whether the groups are held out.
        regression: whether the optimum of the loss has an explained variance of 1.
    """
    before, (_, now) = (lines[-2][1] if len(lines) > 1 else {}), lines[-1]
    best = now.get("best_log_ratio_mean", math.nan)
    if best < LOW_BEST_LOG_RATIO and best < before.get("best_log_ratio_mean", -math.inf):
        yield MetricWarning(
            "best_log_ratio",
            -best,
            f"the best responses' mean log-ratio falls: {best:.3g} nats. The loss constrains only "
            "differences within a group, so all responses of a group can become unlikely together. "
            "What helps: a small anchor (gvpo), a larger beta, a lower learning rate, fewer epochs",
        )
    yield from _mass_warnings(now, held_out=held_out)
    explained = now.get("explained_variance", math.nan)
    if regression and not held_out and explained < LOW_EXPLAINED_VARIANCE:
        yield MetricWarning(
            "explained_variance",
            -explained,
            f"explained variance in training is {explained:.3g}, far below the reference's 0: the "
            "learning rate is too high, unless the policy started far from the reference",
        )
    if held_out:
        yield from _held_out_warnings(lines, regression=regression)


def _mass_warnings(now: Mapping[str, float], *, held_out: bool) -> Iterator[MetricWarning]:
    """Warnings about the probability of the logged responses in total.

    The metrics that begin with likely_ leave out writers whom the policy never imitates. They are
    missing in the history of a run that an earlier version began.
    """
    every = now.get("log_mass_mean", math.nan)
    mass = now.get("likely_log_mass_mean", every)
    if mass < LOW_LOG_MASS:
        name = "likely_log_mass_mean" if "likely_log_mass_mean" in now else "log_mass_mean"
        yield MetricWarning(
            "log_mass",
            -mass,
            f"the logged responses lose probability in total: {name} is {mass:.3g} nats, "
            "so the policy moves to responses that were not logged and have no reward. What helps: "
            "a larger beta, a lower learning rate, fewer epochs, a small anchor (gvpo)",
        )
    if held_out and every > HIGH_LOG_MASS:
        yield MetricWarning(
            "high_log_mass",
            every,
            f"log_mass_mean of held-out responses is {every:.3g} nats. For responses of the "
            "reference it is at most 0 on average. So the policy raises the probability of "
            "responses of another sampler, such as a person, and reweighted_reward_mean is no "
            "estimate of the reward of the policy's own answers; likely_reweighted_reward_mean is "
            "a better one. The table by sampler shows which sampler it is. What helps: a larger "
            "beta, less imitation, or leaving that sampler out",
        )


def _held_out_warnings(lines: Sequence[Line], *, regression: bool) -> Iterator[MetricWarning]:
    """Warnings about held-out metrics that are worse than their best value in two consecutive
    evaluations.
    """
    explained = _finite_values(lines, "explained_variance")
    if regression and explained:
        step, best = max(explained, key=lambda line: line[1])
        falls = [best - value for _, value in explained[-2:]]
        if min(falls) > EXPLAINED_FALL:
            yield MetricWarning(
                "explained_variance",
                falls[-1],
                f"held-out explained variance fell to {explained[-1][1]:.3g} from {best:.3g} at "
                f"step {step}: the policy overfits the training groups. What helps: fewer epochs, "
                "a lower learning rate, a larger beta, more groups",
            )
    losses = _finite_values(lines, "loss")
    if losses:
        step, least = min(losses, key=lambda line: line[1])
        rises = [(value - least) / max(abs(least), 1e-12) for _, value in losses[-2:]]
        if min(rises) > LOSS_RISE:
            yield MetricWarning(
                "loss",
                rises[-1],
                f"held-out loss rises: {losses[-1][1]:.4g}; the least was {least:.4g} at step "
                f"{step}. Stop there, or set load_best_model_at_end and save_strategy best",
            )


def _finite_values(lines: Sequence[Line], name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric in each line in which it is finite."""
    found = [(step, metrics.get(name, math.nan)) for step, metrics in lines]
    return [(step, value) for step, value in found if math.isfinite(value)]


class MetricMonitor:
    """Reads the logged lines of a run in order, and gives the warnings about each.

    Args:
        loss_type: the loss of the run.
        imitation: alpha; above 0, the optimum's explained variance is below 1.
    """

    def __init__(self, loss_type: str = "gvpo", imitation: float = 0.0) -> None:
        self._regression = loss_type in REGRESSIONS and not imitation
        self._lines: dict[str, list[Line]] = defaultdict(list)
        self._said: dict[tuple[str, str], float] = {}

    def read(self, step: int, logs: Mapping[str, Any]) -> list[str]:
        """The warnings about the next line: texts that name the step and the set of groups."""
        texts = []
        for part, metrics in metric_sets(logs).items():
            lines, held_out = self._lines[part], part.startswith(_EVAL)
            lines.append((step, metrics))
            if not held_out:
                del lines[:-2]
            for warning in metric_warnings(lines, held_out=held_out, regression=self._regression):
                if warning.badness >= _WORSE * self._said.get((part, warning.name), 0.0):
                    self._said[part, warning.name] = warning.badness
                    texts.append(f"step {step}, {_label(part)}: {warning.text}")
        return texts


def metric_sets(logs: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The metrics of a logged line, by prefix: "" (training), eval, or eval_<dataset>."""
    if "explained_variance" in logs:
        return {"": dict(logs)}
    # A figure of a sampler, FIGURE/SAMPLER, may end in anything.
    keys = [key for key in logs if key.endswith(_MARK) and not _OF_SAMPLER.search(key)]
    prefixes = [key.removesuffix(_MARK) for key in keys]
    return {
        prefix: {
            key.removeprefix(f"{prefix}_"): value
            for key, value in logs.items()
            if key.startswith(f"{prefix}_")
        }
        for prefix in prefixes
        if prefix == _EVAL or prefix.startswith(f"{_EVAL}_")
    }


def _label(part: str) -> str:
    name = part.removeprefix(_EVAL).removeprefix("_")
    return "in training" if not part else f"held out ({name})" if name else "held out"


class MetricWarningCallback(TrainerCallback):
    """Logs the warnings of `MetricMonitor` on the main process.

    A resumed run does not repeat the warnings of the run before it.
    """

    def __init__(self) -> None:
        self._watch = MetricMonitor()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watch = MetricMonitor(args.loss_type, args.imitation)
        for line in state.log_history:
            self._watch.read(line["step"], line)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        texts = self._watch.read(state.global_step, logs or {})
        for text in texts if state.is_world_process_zero else ():
            logger.warning(text)


class EpochCallback(TrainerCallback):
    """Counts epochs in groups drawn.

    Args:
        groups_per_step: groups of a step.
        order: the draws of the run. An epoch has as many draws as its datasets have groups.
        n_draws: number of draws of the run.
    """

    def __init__(self, groups_per_step: int, order: MixedOrder, n_draws: int) -> None:
        self._groups_per_step = groups_per_step
        self.set_draws(order, n_draws)

    def set_draws(self, order: MixedOrder, n_draws: int) -> None:
        """Count other draws; the arguments are those of the class."""
        self._n_groups = order.n_groups
        self._n_draws = n_draws

    def epochs_after(self, step: int) -> float:
        """Number of epochs after `step` steps, with a fraction for the epoch in progress."""
        return min(step * self._groups_per_step, self._n_draws) / self._n_groups

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        state.num_train_epochs = math.ceil(self._n_draws / self._n_groups)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        before = self.epochs_after(state.global_step - 1)
        state.epoch = self.epochs_after(state.global_step)
        if int(before) == int(state.epoch):
            return
        if args.logging_strategy == IntervalStrategy.EPOCH:
            control.should_log = True
        if args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= state.epoch:
            control.should_evaluate = True
        if args.save_strategy == SaveStrategy.EPOCH:
            control.should_save = True

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        # transformers' only epoch ends with the run; `on_step_end` has handled an epoch of groups
        # that ends at the same step.
        state.epoch = self.epochs_after(state.global_step)
        if state.epoch == int(state.epoch):
            control.should_log = control.should_evaluate = control.should_save = False
