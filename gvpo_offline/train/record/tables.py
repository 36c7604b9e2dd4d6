"""Tables of sampled answers for loggers that have tables or texts.

W&B, MLflow and trackio have tables, TensorBoard has texts in Markdown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from transformers.integrations import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from gvpo_offline.sampled_eval.shown import COLUMNS, ShownAnswer, markdown_table

_NAME = "eval/sampled/answers"
_MLFLOW_FILE = "sampled_answers.json"


def log_table(callbacks: Iterable[Any], answers: Sequence[ShownAnswer], step: int) -> None:
    """Log answers as a table with those of a run's loggers that can.

    Args:
        callbacks: the callbacks of the run.
        answers: the rows.
        step: the optimizer step.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            writer = getattr(callback, "tb_writer", None)
            if writer is not None:
                writer.add_text(_NAME, markdown_table(list(answers)), step)
        elif isinstance(callback, WandbCallback):
            wandb = getattr(callback, "_wandb", None)
            if wandb is not None and getattr(wandb, "run", None) is not None:
                table = wandb.Table(columns=list(COLUMNS), data=[each.row() for each in answers])
                wandb.log({_NAME: table, "train/global_step": step})
        elif isinstance(callback, MLflowCallback):
            mlflow = getattr(callback, "_ml_flow", None)
            if mlflow is not None and mlflow.active_run() is not None:
                # Rows are appended to the file, so each names its step.
                mlflow.log_table(_columns(answers, step), _MLFLOW_FILE)
        elif isinstance(callback, TrackioCallback):
            trackio = getattr(callback, "_trackio", None)
            if trackio is not None and getattr(callback, "_initialized", False):
                rows = [dict(zip(COLUMNS, each.row(), strict=True)) for each in answers]
                trackio.log({_NAME: trackio.Table(data=rows), "train/global_step": step})


def _columns(answers: Sequence[ShownAnswer], step: int) -> dict[str, list[Any]]:
    rows = [[step, *each.row()] for each in answers]
    named = zip(("step", *COLUMNS), zip(*rows, strict=True), strict=True)
    return {name: list(values) for name, values in named}
