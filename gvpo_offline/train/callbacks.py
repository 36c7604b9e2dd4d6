"""Callbacks of a run: warnings about what its metrics show, and epochs counted in groups.

`matters` reads the metrics of one set of groups (the training groups, or one held-out dataset).
`Watch` separates the sets and logs each warning once, and again when its value is twice as bad.
The loader makes one pass over all steps of a run, which transformers by itself would count as one
epoch; `EpochCallback` counts epochs in groups drawn.
"""

from __future__ import annotations

import logging
import math
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

logger = logging.getLogger(__name__)

# What is said, and from where on: nats, shares of the variance, a share of the loss.
SUNK_NATS = -1.0
LOST_NATS = -2.0
LEAST_EXPLAINED = -0.5
EXPLAINED_FALL = 0.02
LOSS_RISE = 0.01
_WORSE = 2.0  # times as bad as when it was said last
# The losses whose optimum explains all of the rewards' variance at its beta.
_REGRESSIONS = ("gvpo", "pmd_mean", "rebel", "listwise")
_EVAL = "eval"
_MARK = "_explained_variance"  # every line of metrics has it, held-out ones once per dataset

Line = tuple[int, Mapping[str, float]]


@dataclass(frozen=True)
class Matter:
    """Something to say: `badness` > 0 grows as it gets worse."""

    name: str
    badness: float
    text: str


def matters(lines: Sequence[Line], *, held_out: bool, regression: bool = True) -> Iterator[Matter]:
    """What the last line says in the light of those before it.

    Args:
        lines: (optimizer step, metrics), oldest first; of lines in training two are enough.
        held_out: whether the groups are held out.
        regression: whether the loss aims at explained variance.
    """
    before, (_, now) = (lines[-2][1] if len(lines) > 1 else {}), lines[-1]
    best = now.get("best_log_ratio_mean", math.nan)
    if best < SUNK_NATS and best < before.get("best_log_ratio_mean", -math.inf):
        yield Matter(
            "best_log_ratio",
            -best,
            f"the best responses' mean log-ratio sinks: {best:.3g} nats. Only differences within a "
            "group are constrained, so all of a group's responses can become unlikely together. "
            "What helps: a small anchor (gvpo), a larger beta, a lower learning rate, fewer epochs",
        )
    mass = now.get("log_mass_mean", math.nan)
    if mass < LOST_NATS:
        yield Matter(
            "log_mass",
            -mass,
            f"the logged responses together lose probability: log_mass_mean is {mass:.3g} nats, "
            "and the policy moves to responses that nobody logged and nobody scored. What helps: "
            "a larger beta, a lower learning rate, fewer epochs, a small anchor (gvpo)",
        )
    explained = now.get("explained_variance", math.nan)
    if regression and not held_out and explained < LEAST_EXPLAINED:
        yield Matter(
            "explained_variance",
            -explained,
            f"explained variance in training is {explained:.3g}, far worse than the reference's 0: "
            "the learning rate is too high, unless the policy began far from the reference",
        )
    if held_out:
        yield from _turned(lines, regression=regression)


def _turned(lines: Sequence[Line], *, regression: bool) -> Iterator[Matter]:
    """Held-out figures that were better before, two evaluations in a row."""
    explained = _told(lines, "explained_variance")
    if regression and explained:
        step, best = max(explained, key=lambda line: line[1])
        falls = [best - value for _, value in explained[-2:]]
        if min(falls) > EXPLAINED_FALL:
            yield Matter(
                "explained_variance",
                falls[-1],
                f"held-out explained variance fell to {explained[-1][1]:.3g} from {best:.3g} at "
                f"step {step}: what is learned no longer carries over. What helps: fewer epochs, "
                "a lower learning rate, a larger beta, more groups",
            )
    losses = _told(lines, "loss")
    if losses:
        step, least = min(losses, key=lambda line: line[1])
        rises = [(value - least) / max(abs(least), 1e-12) for _, value in losses[-2:]]
        if min(rises) > LOSS_RISE:
            yield Matter(
                "loss",
                rises[-1],
                f"held-out loss turned: {losses[-1][1]:.4g}, least was {least:.4g} at step {step}. "
                "Stop there, or load_best_model_at_end with save_strategy best",
            )


def _told(lines: Sequence[Line], name: str) -> list[tuple[int, float]]:
    """A figure line by line, with its step, where it is a number."""
    found = [(step, metrics.get(name, math.nan)) for step, metrics in lines]
    return [(step, value) for step, value in found if math.isfinite(value)]


class Watch:
    """Reads a run's logged lines in order, and gives what is worth a warning.

    Args:
        loss_type: of the run.
    """

    def __init__(self, loss_type: str = "gvpo") -> None:
        self._regression = loss_type in _REGRESSIONS
        self._lines: dict[str, list[Line]] = defaultdict(list)
        self._said: dict[tuple[str, str], float] = {}

    def read(self, step: int, logs: Mapping[str, Any]) -> list[str]:
        """The warnings of a further line: texts, each naming step and groups."""
        texts = []
        for part, metrics in _parts(logs).items():
            lines, held_out = self._lines[part], part.startswith(_EVAL)
            lines.append((step, metrics))
            if not held_out:
                del lines[:-2]
            for matter in matters(lines, held_out=held_out, regression=self._regression):
                if matter.badness >= _WORSE * self._said.get((part, matter.name), 0.0):
                    self._said[part, matter.name] = matter.badness
                    texts.append(f"step {step}, {_label(part)}: {matter.text}")
        return texts


def _parts(logs: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The metrics of a logged line by prefix: "" in training, or eval, or eval_<dataset>."""
    if "explained_variance" in logs:
        return {"": dict(logs)}
    prefixes = [key.removesuffix(_MARK) for key in logs if key.endswith(_MARK)]
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


class WatchCallback(TrainerCallback):
    """Warns, on the main process, of what `Watch` finds; a resumed run knows what came before."""

    def __init__(self) -> None:
        self._watch = Watch()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watch = Watch(args.loss_type)
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
        order: the run's draws; those of an epoch are as many as all its datasets have groups.
        n_draws: groups of the run.
    """

    def __init__(self, groups_per_step: int, order: MixedOrder, n_draws: int) -> None:
        self._groups_per_step = groups_per_step
        self._n_groups = order.n_groups
        self._n_draws = n_draws

    def epochs_after(self, step: int) -> float:
        """Epochs completed, in whole and in part, after `step` steps."""
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
        # transformers' one epoch ends with the run; an epoch that ended there was announced above.
        state.epoch = self.epochs_after(state.global_step)
        if state.epoch == int(state.epoch):
            control.should_log = control.should_evaluate = control.should_save = False
