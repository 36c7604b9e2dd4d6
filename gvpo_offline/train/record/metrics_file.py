"""`metrics.jsonl` in the folder of a run: everything that is logged, whatever the loggers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gvpo_offline.train.checkpoint import METRICS_FILE
from gvpo_offline.train.record.json_lines import JsonLinesFile, json_line


class MetricsFileCallback(TrainerCallback):
    """Appends a line with a JSON object to `metrics.jsonl` whenever metrics are logged.

    Each has `step` and `epoch` first. A value that is not finite is null. A resumed run first
    writes the lines up to its checkpoint anew, from the history that the checkpoint holds: lines of
    later steps are of a run that ended there. Only the main process writes, and only from the start
    of `train` on.
    """

    def __init__(self) -> None:
        self._file = JsonLinesFile(METRICS_FILE)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._file.begin(Path(args.output_dir), map(step_first, state.log_history))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._file.add([step_first({**(logs or {}), "step": state.global_step})])


def step_first(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A logged line with step and epoch before the other metrics."""
    first = {name: metrics[name] for name in ("step", "epoch") if name in metrics}
    return {**first, **metrics}


def metrics_line(metrics: Mapping[str, Any]) -> str:
    """A logged line as JSON: step and epoch, then the metrics in their order."""
    return json_line(step_first(metrics))
