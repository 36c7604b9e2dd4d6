"""A warning about a run whose policy does not move: a learning rate that is far too low."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gvpo_offline.train.settings import ADAPTER_LEARNING_RATE, FULL_LEARNING_RATE

logger = logging.getLogger(__name__)
# The share of a run after which the policy must have moved, and by how much: the root mean square
# of its log-ratios in units of the rounding noise, and in nats. The optimum has gaps of several
# nats; a hundredth of a nat is a change of a response's probability by 1%.
_SHARE = 0.1
_TIMES_NOISE = 2.0
_LEAST_NATS = 0.01


def stillness(metrics: Mapping[str, Any], noise: float) -> str:
    """The evidence that the policy has not moved, in words; empty if it has, or without evidence.

    Groups of equal rewards do not tell: their target is the reference.

    Args:
        metrics: a logged line of training, with log_ratio_mean and log_ratio_std in nats.
        noise: rounding noise of a log-ratio, nats, one standard deviation.
    """
    mean, std = (metrics.get(f"log_ratio_{own}", math.nan) for own in ("mean", "std"))
    size = math.hypot(mean, std)
    floor = max(_TIMES_NOISE * noise, _LEAST_NATS)
    if not size < floor or metrics.get("reward_std") == 0.0:
        return ""
    rounding = f", and rounding alone gives {noise:.2g}" if _TIMES_NOISE * noise > size else ""
    return f"the log-ratios are {size:.2g} nats (root mean square){rounding}"


def _tells(step: int, args: TrainingArguments, state: TrainerState) -> bool:
    """Whether a line of metrics up to a step shows if the policy moves."""
    warmup = args.get_warmup_steps(state.max_steps)
    least: float = max(_SHARE * state.max_steps, warmup, 1)
    return step - 1 >= least


class MovementCallback(TrainerCallback):
    """Warns once, after the first tenth of a run, if the log-ratios have not left the noise.

    It reads the first line of training metrics whose last step followed a tenth of the run's
    updates, all updates of the warm-up, and at least one: the metrics of a step are those before
    its update. A policy that did not start as the reference has log-ratios from the start and is
    not warned of.

    Args:
        noise: gives the rounding noise of a log-ratio, nats; 0 if it is not known.
        adapted: whether an adapter is trained.
    """

    def __init__(self, noise: Callable[[], float], *, adapted: bool) -> None:
        self._noise = noise
        self._adapted = adapted
        self._looked = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        lines = [line for line in state.log_history if "log_ratio_std" in line]
        self._looked = any(_tells(line["step"], args, state) for line in lines)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        line = logs or {}
        if self._looked or "log_ratio_std" not in line:
            return
        if not _tells(state.global_step, args, state):
            return
        self._looked = True
        found = stillness(line, self._noise())
        if found and state.is_world_process_zero:
            usual = ADAPTER_LEARNING_RATE if self._adapted else FULL_LEARNING_RATE
            what = "an adapter" if self._adapted else "a whole model"
            logger.warning(
                "step %d of %d: the policy has hardly moved: %s. The learning rate is %g; %s "
                "usually needs %g or more, and small models more than large ones. "
                "`gvpo-offline tune` finds it",
                state.global_step,
                state.max_steps,
                found,
                args.learning_rate,
                what,
                usual,
            )
