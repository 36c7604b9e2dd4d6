"""Logging, saving and evaluating at different steps: what a resumed run logs, and what is timed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import scored_dataset, trainer_of
from transformers import AutoTokenizer, TrainerCallback

from gvpo_offline.errors import StorageError
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train import saving
from gvpo_offline.train.objective import StepMeter

# Of the computer, and of one start of a run.
TIMES = {"tokens_per_second", "data_wait_share", "peak_memory_gb", "eval_runtime"}
RUN: dict[str, Any] = {
    "groups_per_step": 4,
    "max_steps": 7,
    "logging_steps": 4,
    "save_strategy": "steps",
    "save_steps": 3,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 16)


class StopsAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise KeyboardInterrupt


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads(text) for text in (folder / name).read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in found
        if "train_runtime" not in line
    ]


def test_a_run_resumed_between_two_logged_steps_loses_no_figure(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Logged: 4 by logging_steps, 3, 6 and 7 (the last step) with their checkpoints. Without the
    line of step 3, the line of step 4 of a run that resumes there would be of step 4 alone.
    """
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trainer_of(tiny_model_dir, dataset, whole, **RUN).train()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tiny_model_dir, dataset, cut, callbacks=[StopsAt(5)], **RUN).train()
    trainer_of(tiny_model_dir, dataset, cut, **RUN).train(resume_from_checkpoint=True)
    assert [line["step"] for line in lines(whole, "metrics.jsonl")] == [3, 4, 6, 7]
    for name in ("metrics.jsonl", "residuals.jsonl"):
        assert lines(cut, name) == lines(whole, name)


def test_without_logging_a_checkpoint_logs_nothing(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    changes = {**RUN, "logging_strategy": "no", "max_steps": 3}
    trainer_of(tiny_model_dir, dataset, tmp_path, **changes).train()
    assert not any("loss" in line for line in lines(tmp_path, "metrics.jsonl"))


def test_the_speed_of_training_leaves_out_evaluations_and_saves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """100 tokens in 2 s of training, of 10 s in all: of an evaluation from 1 s to 9 s. A log line
    at 5 s, within the time that is skipped, has begun the next interval.
    """
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    accelerator: Any = type("One", (), {"num_processes": 1, "reduce": lambda _, own, **how: own})()
    meter = StepMeter(torch.device("cpu"))
    meter.add_tokens(100)
    now[0] = 9.0
    meter.skip_since(1.0)
    now[0] = 10.0
    assert meter.drain(accelerator)["tokens_per_second"] == 50.0
    meter.add_tokens(30)
    now[0] = 14.0
    meter.skip_since(6.0)  # it began before the last line: 10 s to 14 s are skipped
    now[0] = 15.0
    assert meter.drain(accelerator)["tokens_per_second"] == 30.0


def test_a_full_disk_of_temporary_files_is_said(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.save raises RuntimeError there, which says nothing of a disk."""

    def fails(*args: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, max_steps=1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    monkeypatch.setattr(torch, "save", fails)
    monkeypatch.setattr(saving, "has_room", lambda folder: False)
    with pytest.raises(StorageError, match="set TMPDIR to a folder on another disk"):
        saving.check_savable(trainer.model, tokenizer, trainer.args)
