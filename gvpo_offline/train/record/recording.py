"""A Trainer that records its run: the files of JSON lines, and what it prints."""

from __future__ import annotations

import functools
import resource
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from gvpo_offline.collectives import broadcast_from_rank0, gather_results
from gvpo_offline.group import Group
from gvpo_offline.hashing import sha256_json
from gvpo_offline.losses import GroupLoss
from gvpo_offline.train.distributed import ShardedTrainer
from gvpo_offline.train.evaluation import held_out_metrics
from gvpo_offline.train.record.loggers import group_names
from gvpo_offline.train.record.progress import use_progress
from gvpo_offline.train.record.residuals import (
    HELD_OUT,
    TRAINING,
    ResidualEvaluation,
    TrainingResiduals,
)
from gvpo_offline.train.record.run_record import RunRecord

if TYPE_CHECKING:
    from gvpo_offline.compute.engine import Engine
    from gvpo_offline.stream.view import DatasetView
    from gvpo_offline.train.data import TrainingData
    from gvpo_offline.train.objective import StepMeter

# The worst groups of each logged step, beside the tracked ones.
_MOST_OF_A_STEP = 4


class RecordedTrainer(ShardedTrainer):
    """A Trainer with a `RunRecord`, whose loggers group the names of metrics.

    Nothing here changes what is computed: residuals are of log-probs that a step or an evaluation
    computes anyway.
    """

    model: nn.Module
    data: TrainingData
    _meter: StepMeter
    records_residuals = True

    def __init__(self, *args: Any, callbacks: Any = None, **kwargs: Any) -> None:
        given = list(callbacks or [])
        super().__init__(*args, callbacks=[self.record, *given], **kwargs)
        group_names(self, list(self.data.held_out), given)
        use_progress(self, given)
        self._residuals = TrainingResiduals()

    @functools.cached_property
    def record(self) -> RunRecord:
        """Writes the run's events, sampled answers and residuals."""
        return RunRecord(lambda: sha256_json(self.identity()))

    def identity(self) -> dict[str, dict[str, Any]]:
        """The settings that a resumed run must share: data, objective, model, optimization."""
        raise NotImplementedError

    def recorded_metrics(
        self, engine: Engine, held_out: DatasetView, name: str, *, recorded: bool
    ) -> dict[str, float]:
        """`held_out_metrics` of the policy; every rank must call this.

        Args:
            engine: the policy's compute engine.
            held_out: the groups.
            name: of the held-out dataset.
            recorded: whether the groups with the largest residuals are recorded.
        """
        if not recorded:
            return held_out_metrics(self.model, engine, held_out, self.args, self.accelerator)
        first = broadcast_from_rank0(lambda: self.record.first_worst(HELD_OUT, name))
        own = ResidualEvaluation(tracked=frozenset(first or ()))
        found = held_out_metrics(self.model, engine, held_out, self.args, self.accelerator, own)
        self.record.residuals(own.gathered(), HELD_OUT, name)
        return found

    def note_loss(self, groups: Sequence[Group], loss: GroupLoss) -> None:
        """Keep the residuals of a micro-batch in training, where no groups are held out."""
        if self.records_residuals and not self.data.held_out:
            self._residuals.add(self.state.global_step + 1, groups, loss)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers; a line of training metrics gets the peak memory, and its step's
        residuals are recorded. Every rank must call this.
        """
        of_training = "loss" in logs
        if of_training:
            logs = {**logs, "peak_memory_gb": max(gather_results(self._peak_memory))}
        super().log(logs, start_time)
        if of_training and self.records_residuals and not self.data.held_out:
            last, before = self._residuals.drain()
            self.record.residuals(last, TRAINING, before=before, most=_MOST_OF_A_STEP)
            first = broadcast_from_rank0(lambda: self.record.first_worst(TRAINING))
            self._residuals.tracked = frozenset(first or ())

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As transformers, but a checkpoint has a logged line of the steps up to it, and the speed
        of training is without evaluations and saves.

        Otherwise a run that resumes from a checkpoint between two logged steps would lose the
        figures of the steps before it: they are in no file.
        """
        started = time.perf_counter()
        may_save = self.args.save_strategy == SaveStrategy.BEST and self.control.should_evaluate
        if self.args.logging_strategy != IntervalStrategy.NO:
            self.control.should_log |= self.control.should_save or may_save
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._meter.skip_since(started)

    def _peak_memory(self) -> float:
        """The most memory that this process has had so far, in GB (10^9 bytes): on a GPU that of
        its tensors; else that of the process.
        """
        if self.args.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.args.device) / 1e9
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
