"""Short runs of GVPOTrainer, each from the policy's own weights, kept as small files.

A trial leaves nothing but its figures, in `trials/` of the search's folder: a search that was cut
off takes them from there. What makes a trial another one is in its file's name, by hash.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import math
import operator
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils.memory import clear_device_cache
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from gvpo_offline.collectives import broadcast_from_rank0, gather_results
from gvpo_offline.errors import DataError, IntegrityError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.losses import GroupStatistics
from gvpo_offline.store.commit import create_only
from gvpo_offline.store.survey import Survey
from gvpo_offline.train.callbacks import WatchCallback
from gvpo_offline.train.config import GVPOConfig
from gvpo_offline.train.evaluation import held_out_statistics
from gvpo_offline.train.trainer import GVPOTrainer
from gvpo_offline.tune.search import (
    LOWEST_RATE,
    Metrics,
    RangePoint,
    diverged,
    misfit,
    range_rate,
    score,
)

logger = logging.getLogger(__name__)


class TrialTrainer(GVPOTrainer):
    """A run of which nothing stays but what is measured at its end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for spoken in (PrinterCallback, ProgressCallback, WatchCallback):
            self.remove_callback(spoken)

    def preflight(self, *, say: bool = True) -> list[Survey]:
        """Nothing: the data of all trials are looked at once, before the first."""
        return []

    def measured(self) -> dict[str, float]:
        """Train; then the metrics of all held-out groups, or nan if log-probs became infinite."""
        if not _stays_finite(self.train):
            return GroupStatistics.zeros().metrics()
        self.check_can_evaluate()
        quiet = replace(self.engine, on_entropy=None)
        found: list[GroupStatistics] = []

        def evaluate() -> None:
            found.extend(
                held_out_statistics(self.model, quiet, view, self.args, self.accelerator)
                for view in self.data.held_out.values()
            )

        if not _stays_finite(evaluate):
            return GroupStatistics.zeros().metrics()
        return functools.reduce(operator.add, found).metrics()


class RangeTrainer(TrialTrainer):
    """A run whose learning rate rises at every step, until it goes wrong."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """`range_rate`, as factors of the optimizer's `LOWEST_RATE`."""
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer,
            lambda step: range_rate(step, num_training_steps) / LOWEST_RATE,
        )
        return self.lr_scheduler

    def points(self) -> list[RangePoint]:
        """Train, and give what each step measured."""
        steps = self.args.max_steps
        seen = _RangeCallback(self.args.loss_type, steps)
        self.add_callback(seen)
        _stays_finite(self.train)
        return seen.points


class _RangeCallback(TrainerCallback):
    def __init__(self, loss_type: str, steps: int) -> None:
        self._loss_type, self._steps = loss_type, steps
        self.points: list[RangePoint] = []

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "explained_variance" not in logs:
            return
        rate = range_rate(state.global_step - 1, self._steps)
        self.points.append(RangePoint(rate, misfit(logs, self._loss_type)))
        if diverged(self.points):
            control.should_training_stop = True


def _stays_finite(work: Callable[[], Any]) -> bool:
    """Do it; whether the policy's log-probs stayed finite, on every rank.

    The data were looked at before, so that a value that a loss refuses is the policy's.
    """
    failed = False
    try:
        work()
    except DataError as error:
        logger.info("the policy broke down: %s", error)
        failed = True
    return not any(gather_results(lambda: failed))


@dataclass(frozen=True)
class Trials:
    """The trials of a search.

    Attributes:
        trainer: makes a trainer of a kind, whose policy is loaded anew.
        args: the run's settings.
        run_steps: optimizer steps of the run; its warm-up's share of them is that of a trial.
        folder: where figures are kept.
        identity: what decides the figures beside beta, rate and steps, as plain data.
    """

    trainer: Callable[[GVPOConfig, type[Any]], Any]
    args: GVPOConfig
    run_steps: int
    folder: Path
    identity: Mapping[str, Any]

    def trial(self, beta: float, learning_rate: float, steps: int) -> Metrics:
        """Held-out metrics after a short run; as `tune.propose` asks for them."""

        def figures(scratch: Path) -> dict[str, float]:
            args = self._short(scratch, beta, learning_rate, steps)
            found: dict[str, float] = self.trainer(args, TrialTrainer).measured()
            return found

        metrics = self._kept("trial", beta, learning_rate, steps, figures)
        self.say(
            f"beta {beta:g}, learning rate {learning_rate:g}: score {score(metrics):.4g}, "
            f"held-out explained variance {metrics['explained_variance']:.4g}"
        )
        return metrics

    def range_run(self, beta: float, steps: int) -> list[RangePoint]:
        """What each step of a range run measured, up to where it went wrong."""

        def figures(scratch: Path) -> dict[str, float]:
            args = self._short(scratch, beta, LOWEST_RATE, steps)
            args.logging_steps = 1
            points = self.trainer(args, RangeTrainer).points()
            return {str(step): point.misfit for step, point in enumerate(points)}

        found = self._kept("range", beta, LOWEST_RATE, steps, figures)
        return [RangePoint(range_rate(int(step), steps), own) for step, own in found.items()]

    def say(self, text: str) -> None:
        """Log how far the search is, on the main process."""
        if self.args.process_index == 0:
            logger.info(text)

    def _short(self, scratch: Path, beta: float, learning_rate: float, steps: int) -> GVPOConfig:
        args = copy.copy(self.args)
        args.output_dir = str(scratch)
        args.beta, args.learning_rate, args.max_steps = beta, learning_rate, steps
        if args.warmup_steps >= 1:
            args.warmup_steps = args.get_warmup_steps(self.run_steps) * steps // self.run_steps
        args.logging_strategy, args.logging_steps = IntervalStrategy.STEPS, steps
        args.logging_first_step = False
        args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False
        args.save_strategy, args.load_best_model_at_end = SaveStrategy.NO, False
        args.report_to, args.push_to_hub = [], False
        return args

    def _kept(
        self,
        kind: Literal["trial", "range"],
        beta: float,
        learning_rate: float,
        steps: int,
        figures: Callable[[Path], dict[str, float]],
    ) -> dict[str, float]:
        """The figures from their file, or from `figures`, and then kept; the same on all ranks."""
        key = {
            "kind": kind,
            "beta": beta,
            "learning_rate": learning_rate,
            "steps": steps,
            **self.identity,
        }
        name = f"{kind}-beta-{beta:g}-rate-{learning_rate:g}-{sha256_json(key)[:12]}.json"
        path = self.folder / "trials" / name
        if not broadcast_from_rank0(path.exists):
            with tempfile.TemporaryDirectory(prefix="gvpo-offline-tune-") as scratch:
                made = finite_or_none(figures(Path(scratch)))
            clear_device_cache(garbage_collection=True)
            text = json.dumps({**key, "figures": made}, indent=1) + "\n"
            broadcast_from_rank0(lambda: create_only(path, text))
        held = broadcast_from_rank0(lambda: _read(path))
        return {name: math.nan if own is None else own for name, own in held.items()}


def finite_or_none(metrics: Metrics) -> dict[str, float | None]:
    """Metrics as JSON has them: None for what is no number."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _read(path: Path) -> dict[str, float | None]:
    try:
        figures: dict[str, float | None] = json.loads(path.read_text(encoding="utf-8"))["figures"]
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            "a trial's file is the JSON that was written",
            received=f"{type(error).__name__}: {error}",
            remedy="remove it; the trial is then made again",
            file=path,
        ) from error
    return figures
