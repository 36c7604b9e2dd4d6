"""The line before training: memory and operations of the run, computed from shapes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from support.training import scored_dataset, trainer_of

from gvpo_offline.plan.memory import TrainingShape, step_bytes
from gvpo_offline.plan.shapes import shape_of_config
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train import needs
from gvpo_offline.train.needs import log_needs, needs_line
from gvpo_offline.train.trainer import GVPOTrainer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir)


@pytest.fixture
def trainer(tiny_model_dir: Path, dataset: GroupDataset, tmp_path: Path) -> GVPOTrainer:
    return trainer_of(tiny_model_dir, dataset, tmp_path)


def test_the_line_has_the_bytes_of_the_planned_steps(
    trainer: GVPOTrainer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy is float32 on a CPU, which is in no table of peaks: operations instead of time."""
    line, short = needs_line(trainer)
    assert not short
    found = float(line.split(" GB of ")[0])
    weights = sum(weight.numel() for weight in trainer.model.parameters())
    assert 16 * weights / 1e9 < found < 0.5
    assert line.endswith(" operations a step")
    caplog.set_level(logging.INFO, "gvpo_offline")
    log_needs(trainer)
    assert f"this run: {line} (computed from shapes)" in caplog.text
    monkeypatch.setattr(needs, "_device", lambda _: (None, 1.0))
    log_needs(trainer)
    assert "may not fit into memory" in caplog.text


def test_a_gpu_of_the_table_has_seconds(
    trainer: GVPOTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gvpo_offline.plan.devices import DEVICES

    monkeypatch.setattr(needs, "_device", lambda _: (DEVICES["h100"], 80e9))
    line, short = needs_line(trainer)
    assert not short
    assert " GB of 80, " in line
    assert " a step at 0.45 of peak, " in line
    assert line.endswith(f" for {trainer.args.max_steps:,} steps")


def test_a_model_without_sizes_is_passed_over(
    trainer: GVPOTrainer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(type(trainer.model.config), "to_dict", lambda _: {"model_type": "other"})
    caplog.set_level(logging.INFO, "gvpo_offline")
    log_needs(trainer)
    assert "this run" not in caplog.text


def test_the_model_is_within_a_tenth_of_what_a_step_keeps() -> None:
    """Bytes that autograd saves in two layers of a Qwen3, by saved-tensor hooks, each storage once;
    the model counts the input of each layer, both ends of the last norm are counted apart."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    config = Qwen3Config(**sizes, **heads, attn_implementation="sdpa")
    model = Qwen3ForCausalLM(config).train()
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own and tensor.dtype == torch.float32:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    n = 128
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(input_ids=torch.ones(1, n, dtype=torch.int64), use_cache=False)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    phases = step_bytes(shape_of_config(config.to_dict()), TrainingShape(), tokens=n, scored=1)
    layers = phases.phases["last layer"]["activations of all layers"]
    last = phases.phases["output layer"]["last hidden states"]
    assert layers + last == pytest.approx(saved, rel=0.1)
