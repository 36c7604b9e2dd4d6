"""`metrics.jsonl` in the folder of a run: everything that is logged, whatever the loggers."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gvpo_offline.store.commit import temporary_name
from gvpo_offline.train.checkpoint import METRICS_FILE

logger = logging.getLogger(__name__)


class MetricsFileCallback(TrainerCallback):
    """Appends a line with a JSON object to `metrics.jsonl` whenever metrics are logged.

    Each has `step` and `epoch` first. A value that is not finite is null, since JSON has no other
    form of it. A resumed run first writes the lines up to its checkpoint anew, from the history
    that the checkpoint holds: lines of later steps are of a run that ended there. Only the main
    process writes, and only from the start of `train` on. A file that cannot be written does not
    end the run: a warning says so once.
    """

    def __init__(self) -> None:
        self._path: Path | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._path = Path(args.output_dir) / METRICS_FILE
        self._write(state.log_history, anew=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._write([{**(logs or {}), "step": state.global_step}], anew=False)

    def _write(self, lines: Iterable[Mapping[str, Any]], *, anew: bool) -> None:
        if self._path is None:
            return
        text = "".join(metrics_line(line) + "\n" for line in lines)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if anew and text:
                # Written beside and renamed: an interruption must not lose the lines of a run.
                written = temporary_name(self._path.parent, METRICS_FILE)
                written.write_text(text, encoding="utf-8")
                os.replace(written, self._path)
            else:
                with self._path.open("w" if anew else "a", encoding="utf-8") as file:
                    file.write(text)
        except OSError as error:
            logger.warning("%s is not written from here on: %s", self._path, error)
            self._path = None


def metrics_line(metrics: Mapping[str, Any]) -> str:
    """A logged line as JSON: step and epoch, then the metrics in their order."""
    first = {name: metrics[name] for name in ("step", "epoch") if name in metrics}
    return json.dumps({name: _plain(value) for name, value in {**first, **metrics}.items()})


def _plain(value: Any) -> Any:
    """A value as JSON; numbers of torch and numpy as those of Python."""
    value = value.item() if callable(getattr(value, "item", None)) else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)
