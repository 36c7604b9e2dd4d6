"""Epochs of a run whose loader knows only steps.

The loader's one pass is the whole run, so transformers by itself would count a single epoch. Here
the logged epoch is the share of groups drawn, and what is asked for "each epoch" happens at the
first step that completes one.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from gvpo_offline.stream.mix import MixedOrder


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
