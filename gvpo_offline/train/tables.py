"""Tables of sampled answers for loggers that have tables or texts: W&B and TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from transformers.integrations import TensorBoardCallback, WandbCallback

from gvpo_offline.sampled_eval.shown import COLUMNS, ShownAnswer, markdown_table

_NAME = "eval/sampled_answers"


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
