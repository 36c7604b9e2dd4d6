"""The best checkpoint of a run: its metric, checked before the first step, and its folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gvpo_offline.errors import ConfigError, ResumeError
from gvpo_offline.losses import GroupStatistics
from gvpo_offline.sampled_eval.result import METRICS
from gvpo_offline.train.checkpoint import is_sealed

logger = logging.getLogger(__name__)
_WITHOUT_BEST = "restore the best checkpoint from a copy, or set load_best_model_at_end: false"


def metric_names(
    held_out: Iterable[str], *, imitates: bool = False, sampled: bool = False
) -> list[str]:
    """Names of the metrics that an evaluation gives, without the prefix `eval_`.

    Args:
        held_out: names of the held-out datasets; a single one is named "".
        imitates: whether the objective has the term of imitation.
        sampled: whether it samples answers.
    """
    own = [*GroupStatistics.zeros().metrics(), "runtime"]
    own += ["squares_loss", "imitation_loss"] if imitates else []
    logged = [f"{name}_{metric}" if name else metric for name in held_out for metric in own]
    return [*logged, *(METRICS if sampled else ())]


def check_best_metric(args: TrainingArguments, held_out: Iterable[str]) -> None:
    """Raise ConfigError if no evaluation of the run gives `metric_for_best_model`.

    transformers sets it to `loss` with load_best_model_at_end, and with the schedules that follow a
    metric.
    """
    metric = args.metric_for_best_model
    if metric is None or args.eval_strategy.value == "no":
        return
    names = metric_names(
        held_out,
        imitates=bool(getattr(args, "imitation", 0)),
        sampled=getattr(args, "eval_samples", 0) > 0,
    )
    if metric not in names and metric.removeprefix("eval_") not in names:
        raise ConfigError(
            "metric_for_best_model is a metric that evaluation gives",
            received=metric,
            remedy=f"set it to one of {', '.join(names)}",
        )


class BestCheckpointCallback(TrainerCallback):
    """Finds the best checkpoint of a resumed run in the present output_dir.

    The state of a run holds the path that the folder had when it was written, possibly relative to
    another working directory.

    Args:
        is_of_run: whether a sealed checkpoint belongs to this run.
        verify: raises ResumeError, with the remedy that it is given, if files of a checkpoint are
            damaged; called on all ranks.
    """

    def __init__(
        self, is_of_run: Callable[[Path], bool], verify: Callable[[Path, str], None]
    ) -> None:
        self._is_of_run, self._verify = is_of_run, verify
        self.resumed_from: Path | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the best checkpoint of the state.

        Raises:
            ResumeError: it is to be loaded at the end, and is nowhere or damaged.
        """
        if self.resumed_from is None or not state.best_global_step:
            return
        recorded = TrainerState.load_from_json(str(self.resumed_from / "trainer_state.json"))
        written = recorded.best_model_checkpoint
        # The best metric may be of a step that was not saved; the best of those saved is recorded.
        names = [f"checkpoint-{state.best_global_step}"]
        names += [Path(written).name] if written else []
        folders = [Path(args.output_dir), self.resumed_from.absolute().parent]
        tried = [folder / name for name in names for folder in folders]
        found = next((path for path in tried if is_sealed(path) and self._is_of_run(path)), None)
        if found is not None:
            state.best_model_checkpoint = str(found)
            if written and Path(written) != found:
                logger.info("the best checkpoint, recorded as %s, is %s", written, found)
            if args.load_best_model_at_end and found.name != self.resumed_from.name:
                self._verify(found, _WITHOUT_BEST)
            return
        state.best_model_checkpoint = None
        if written and args.load_best_model_at_end:
            raise ResumeError(
                "load_best_model_at_end needs the best checkpoint of the run so far",
                received=f"none of {', '.join(map(str, dict.fromkeys(tried)))}",
                remedy=f"move {Path(written).name} back to output_dir, or set "
                "load_best_model_at_end: false",
                file=self.resumed_from,
            )
