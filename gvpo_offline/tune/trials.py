"""Short runs of GVPOTrainer, each from the policy's initial weights, whose metrics are cached.

The metrics of each trial are written to a file in `trials/`, in the folder of the search, so that
an interrupted search repeats no trial. The file name contains a hash of everything that determines
the metrics.
"""

from __future__ import annotations

import contextlib
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
from gvpo_offline.files import remove_abandoned
from gvpo_offline.hashing import sha256_json
from gvpo_offline.losses import GroupStatistics
from gvpo_offline.store.commit import create_only
from gvpo_offline.store.survey import Survey
from gvpo_offline.train.callbacks import MetricWarningCallback
from gvpo_offline.train.config import GVPOConfig
from gvpo_offline.train.evaluation import held_out_statistics
from gvpo_offline.train.movement import MovementCallback
from gvpo_offline.train.record.metrics_file import MetricsFileCallback
from gvpo_offline.train.record.progress import ProgressLines
from gvpo_offline.train.record.run_record import RunRecord
from gvpo_offline.train.trainer import GVPOTrainer
from gvpo_offline.tune.search import (
    LIKELY,
    LOWEST_RATE,
    Metrics,
    RangePoint,
    diverged,
    misfit,
    range_rate,
    score,
)
from gvpo_offline.tune.trial_files import read_trial_file, trial_text

logger = logging.getLogger(__name__)
_OUTPUT = (
    *(PrinterCallback, ProgressCallback, ProgressLines),
    *(MetricWarningCallback, MovementCallback, MetricsFileCallback, RunRecord),
)


class TrialTrainer(GVPOTrainer):
    """A short run without output: no checkpoints, no console log, no preflight."""

    _logs_noise = False
    records_residuals = False
    saves_when_stopped = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for printing in _OUTPUT:
            self.remove_callback(printing)

    def preflight(self, *, log_summary: bool = True) -> list[Survey]:
        """Does nothing: the data, the same in all trials, are checked once before the first."""
        return []

    def train_and_evaluate(self) -> dict[str, float]:
        """Train, then evaluate on all held-out groups.

        Returns:
            `GroupStatistics.metrics`; nan if log-probs were not finite at some point.
        """
        if not stays_finite(self.train):
            return GroupStatistics.zeros().metrics()
        self.check_can_evaluate()
        quiet = replace(self.engine, on_entropy=None)
        found: list[GroupStatistics] = []

        def evaluate() -> None:
            found.extend(
                held_out_statistics(self.model, quiet, view, self.args, self.accelerator)
                for view in self.data.held_out.values()
            )

        if not stays_finite(evaluate):
            return GroupStatistics.zeros().metrics()
        return functools.reduce(operator.add, found).metrics()


class RangeTestTrainer(TrialTrainer):
    """A run whose learning rate rises at every step, until training diverges."""

    _logs_noise = True  # of the first run of a search, for all of them

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A schedule of `range_rate`; the optimizer's own learning rate is `LOWEST_RATE`."""
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer,
            lambda step: range_rate(step, num_training_steps) / LOWEST_RATE,
        )
        return self.lr_scheduler

    def run_range_test(self) -> list[RangePoint]:
        """Train; the learning rate and misfit of each step until training diverges."""
        steps = self.args.max_steps
        seen = _RangeCallback(self.args.loss_type, steps)
        self.add_callback(seen)
        stays_finite(self.train)
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


def stays_finite(work: Callable[[], Any]) -> bool:
    """Call `work`; whether the policy's log-probs stayed finite on every rank.

    The data have been checked before, so a DataError of the loss is about the policy's log-probs.
    """
    failed = False
    try:
        work()
    except DataError as error:
        logger.info("training diverged: %s", error)
        failed = True
    return not any(gather_results(lambda: failed))


@dataclass(frozen=True)
class Trials:
    """Runs the trials of a search.

    Attributes:
        trainer: makes a trainer of a class, with a newly loaded policy.
        args: the settings of the run.
        run_steps: optimizer steps of the run; a trial has the same share of warm-up steps.
        folder: the folder in which metrics are cached.
        identity: what determines the metrics besides beta, learning rate and steps, as plain data.
    """

    trainer: Callable[[GVPOConfig, type[Any]], Any]
    args: GVPOConfig
    run_steps: int
    folder: Path
    identity: Mapping[str, Any]

    def trial(self, beta: float, learning_rate: float, steps: int) -> Metrics:
        """Held-out metrics after a short run, for `tune.propose`."""

        def run(scratch: Path) -> dict[str, float]:
            args = self.short_args(scratch, beta, learning_rate, steps)
            found: dict[str, float] = self.trainer(args, TrialTrainer).train_and_evaluate()
            return found

        metrics = self._cached("trial", beta, learning_rate, steps, run)
        if self._begun_earlier:
            metrics = {name: own for name, own in metrics.items() if "likely_" not in name}
        self.log(
            f"beta {beta:g}, learning rate {learning_rate:g}: score {score(metrics):.4g}, "
            f"held-out explained variance {metrics['explained_variance']:.4g}"
        )
        return metrics

    @functools.cached_property
    def _begun_earlier(self) -> bool:
        """Whether an earlier version, with another score, ran trials of this search.

        All trials of a search must be compared by one score.
        """
        begun = broadcast_from_rank0(
            lambda: any(
                content["settings"] == self.identity.get("settings")
                and content["kind"] == "trial"
                and LIKELY not in content["figures"]
                for content in _contents(self.folder)
            )
        )
        if begun and self.args.process_index == 0:
            logger.warning(
                "%s: the search goes on with the score of the version that began it, in which all "
                "responses have the same weight, also those that the policy never samples; to "
                "search with the present score, remove the folder",
                self.folder,
            )
        return begun

    def range_test(self, beta: float, steps: int) -> list[RangePoint]:
        """The points of a learning-rate range test, up to the step at which training diverged."""

        def run(scratch: Path) -> dict[str, float]:
            args = self.short_args(scratch, beta, LOWEST_RATE, steps)
            args.logging_steps = 1
            points = self.trainer(args, RangeTestTrainer).run_range_test()
            return {str(step): point.misfit for step, point in enumerate(points)}

        found = self._cached("range", beta, LOWEST_RATE, steps, run)
        return [RangePoint(range_rate(int(step), steps), own) for step, own in found.items()]

    def log(self, text: str) -> None:
        """Log the progress of the search, on the main process."""
        if self.args.process_index == 0:
            logger.info(text)

    def short_args(
        self, scratch: Path, beta: float, learning_rate: float, steps: int
    ) -> GVPOConfig:
        """The settings of a short run, which writes nothing but to a scratch folder."""
        args = copy.copy(self.args)
        args.output_dir = str(scratch)
        args.beta, args.learning_rate, args.max_steps = beta, learning_rate, steps
        if args.warmup_steps >= 1:
            args.warmup_steps = args.get_warmup_steps(self.run_steps) * steps // self.run_steps
        args.logging_strategy, args.logging_steps = IntervalStrategy.STEPS, steps
        args.logging_first_step = False
        args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False
        args.save_strategy, args.load_best_model_at_end = SaveStrategy.NO, False
        args.eval_samples, args.eval_reward = 0, None
        args.report_to, args.push_to_hub = [], False
        args.resume_from_checkpoint = None
        return args

    def _cached(
        self,
        kind: Literal["trial", "range"],
        beta: float,
        learning_rate: float,
        steps: int,
        run: Callable[[Path], dict[str, float]],
    ) -> dict[str, float]:
        """The result of `run`, from its file if there is one; the same on all ranks.

        Args:
            kind: `trial` or `range` (a learning-rate range test).
            beta: beta of the run.
            learning_rate: learning rate of the run.
            steps: optimizer steps of the run.
            run: trains in a temporary folder and returns metrics; called if there is no file.
        """
        key = {
            "kind": kind,
            "beta": beta,
            "learning_rate": learning_rate,
            "steps": steps,
            **self.identity,
        }
        name = f"{kind}-beta-{beta:g}-rate-{learning_rate:g}-{sha256_json(key)[:12]}.json"
        path = self.folder / "trials" / name

        def is_done() -> bool:
            remove_abandoned(path.parent, "*.json")
            return path.exists()

        if not broadcast_from_rank0(is_done):
            with tempfile.TemporaryDirectory(prefix="gvpo-offline-tune-") as scratch:
                made = finite_or_none(run(Path(scratch)))
            clear_device_cache(garbage_collection=True)
            text = trial_text(path, {**key, "figures": made})
            broadcast_from_rank0(lambda: create_only(path, text))
        held = broadcast_from_rank0(lambda: _read(path, key))
        return {name: math.nan if own is None else own for name, own in held.items()}


def finite_or_none(metrics: Metrics) -> dict[str, float | None]:
    """Metrics for JSON, with None for each value that is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def searches(folder: Path) -> set[str]:
    """The identities of the searches whose trials are in a folder: their `settings`."""
    return {str(content["settings"]) for content in _contents(folder)}


def _contents(folder: Path) -> list[dict[str, Any]]:
    """What the files of trials in a folder hold; damaged files, which `_read` refuses, left out."""
    found = []
    for path in sorted((folder / "trials").glob("*.json")):
        with contextlib.suppress(ValueError):
            found.append(read_trial_file(path, ("settings", "kind", "figures")))
    return found


def _read(path: Path, key: Mapping[str, Any]) -> dict[str, float | None]:
    try:
        content = read_trial_file(path, ("figures",))
        figures: dict[str, float | None] = content.pop("figures")
        own_key = json.loads(json.dumps(key))
        if any(own != own_key[name] for name, own in content.items() if name in own_key):
            raise ValueError("the settings of another trial")
        if not all(own is None or isinstance(own, int | float) for own in figures.values()):
            raise ValueError("figures that are no numbers")
    except (ValueError, AttributeError) as error:
        raise IntegrityError(
            "the file of a trial is valid JSON with its settings, and its metrics under `figures`",
            received=f"{type(error).__name__}: {error}",
            remedy="remove the file; the trial is then repeated",
            file=path,
        ) from error
    return figures
