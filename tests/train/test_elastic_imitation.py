"""A run with imitation auto, warm-up and bfloat16 that goes on with another number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.builders import make_group
from support.fork_server import ForkServer
from support.rounding import ADAM_EPSILON
from support.training import VOCAB_SIZE, score, unscored_dataset

from gvpo_offline.train.checkpoint import METRICS_FILE, SEAL_NAME

N_STEPS, SAVED_AT, WARMUP = 6, 2, 4


def logged(number: int) -> object:
    """A group of four by a person and sampler 1; every fourth is all wrong."""
    rewards = np.zeros(4) if number % 4 == 0 else np.array([1.0, 0, 0, 1])
    names = ("person", "1", "1", "1")
    return make_group(
        number, k=4, vocab_size=VOCAB_SIZE, scored=False, samplers=names, rewards=rewards
    )


def lines(out: Path) -> list[dict[str, float]]:
    text = (out / METRICS_FILE).read_text(encoding="utf-8")
    return [own for own in map(json.loads, text.splitlines()) if "loss" in own]


def test_imitation_auto_and_warm_up_on_other_ranks(
    tmp_path: Path, tiny_model_dir: Path, server: ForkServer
) -> None:
    """Two ranks, then one: alpha 1 + 10 / 4, the same samplers left out, rates of 1/5, 2/5 … of the
    peak, and a file of metrics with each step once."""
    root = unscored_dataset(
        tmp_path / "data", tiny_model_dir, groups=[logged(number) for number in range(20)]
    )
    score(root, tiny_model_dir, bf16=True)
    settings = {
        "model_name_or_path": tiny_model_dir,
        "dataset": root,
        "output_dir": tmp_path / "out",
        "beta": 0.5,
        "imitation": "auto",
        "imitation_without": '["1"]',
        "groups_per_step": 5,
        "max_steps": N_STEPS,
        "warmup_steps": WARMUP,
        "learning_rate": 1e-3,
        "adam_epsilon": ADAM_EPSILON,
        "logging_steps": 1,
        "save_steps": SAVED_AT,
        "bf16": "true",
        "disable_tqdm": "true",
    }
    argv = ["train", *(str(word) for name, own in settings.items() for word in (f"--{name}", own))]
    for status, output in server.run_ranks(argv, 2):
        assert status == 0, output
    whole = lines(tmp_path / "out")
    checkpoint = tmp_path / "out" / f"checkpoint-{SAVED_AT}"
    objective = json.loads((checkpoint / SEAL_NAME).read_text())["identity"]["objective"]
    assert (objective["imitation"], objective["imitation_without"]) == (3.5, ["1"])
    child = server.start([*argv, "--resume_from_checkpoint", str(checkpoint)])
    assert child.wait() == 0, child.output
    assert "imitation auto: alpha is 3.5" in child.output
    assert "rounding in bfloat16" in child.output
    again = lines(tmp_path / "out")
    assert [own["step"] for own in again] == list(range(1, N_STEPS + 1))
    for one, other in zip(whole, again, strict=True):
        assert one["learning_rate"] == other["learning_rate"]
        # Noise of rounding to bfloat16 in losses of about one
        assert other["loss"] == pytest.approx(one["loss"], rel=0.02)
        assert other["imitation_loss"] == pytest.approx(one["imitation_loss"], rel=0.02)
    rates = [1e-3 * own for own in (0.2, 0.4, 0.6, 0.8, 1.0, 0.5)]
    assert [own["learning_rate"] for own in again] == pytest.approx(rates)
