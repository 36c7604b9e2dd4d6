"""Sharding settings: which are refused, and which defaults of accelerate are replaced."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from support.tiny_models import tiny_model
from support.training import config_of, scored_dataset, trainer_of
from torch import nn

from gvpo_offline.compute.model import device_of, disable_dropout
from gvpo_offline.errors import ConfigError
from gvpo_offline.train.distributed import (
    ShardedTrainer,
    _check_fsdp,
    _shard_on_cpu,
    _share_tied_weights,
    _use_model_checkpointing,
)
from gvpo_offline.train.engine import training_engine


def plugin_of(**settings: Any) -> FullyShardedDataParallelPlugin:
    plain = {"fsdp_version": 2, "cpu_ram_efficient_loading": False}
    return FullyShardedDataParallelPlugin(**{**plain, **settings})


def test_log_probs_and_gradients_stay_in_float32() -> None:
    """accelerate's policy for bf16 would return log-probs and reduce gradients in bfloat16."""
    plugin = plugin_of()
    plugin.set_mixed_precision("bf16")
    before = plugin.mixed_precision_policy
    assert before.output_dtype == before.reduce_dtype == torch.bfloat16
    _check_fsdp(plugin)
    after = plugin.mixed_precision_policy
    assert after.param_dtype == torch.bfloat16
    assert after.output_dtype is None
    assert after.reduce_dtype == torch.float32
    assert not after.cast_forward_inputs


def test_fsdp1_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"FSDP2; received fsdp_version 1\. Set fsdp_version: 2"):
        _check_fsdp(plugin_of(fsdp_version=1))


def test_ranks_without_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="Set fsdp_cpu_ram_efficient_loading: false"):
        _check_fsdp(plugin_of(cpu_ram_efficient_loading=True))


@pytest.mark.parametrize(("launched", "own"), [("bf16", {}), ("fp16", {})])
def test_a_mixed_precision_of_the_launcher_alone_is_refused(
    launched: str, own: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference check and the run's identity would not know of it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(ConfigError, match=f"received {launched} from accelerate, no from the run"):
        config_of(tmp_path, **own)


def test_a_mixed_precision_of_launcher_and_run_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert config_of(tmp_path, bf16=True).bf16
    # "no" in accelerate's configuration file leaves the choice to the run.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert config_of(tmp_path, bf16=True).bf16


def test_shards_need_a_launcher(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "ACCELERATE_USE_FSDP", "false"
    )  # accelerate would set it for all later tests
    data = scored_dataset(tmp_path / "data", tiny_model_dir, 4)
    with pytest.raises(ConfigError, match="fsdp only works in distributed training"):
        trainer_of(tiny_model_dir, data, tmp_path / "out", fsdp=True)


def test_the_models_own_activation_checkpointing_is_used(tmp_path: Path) -> None:
    """The probe takes it into account, and it has no wrapper that hides adapters from PEFT."""
    plugin, args = plugin_of(activation_checkpointing=True), config_of(tmp_path)
    _use_model_checkpointing(plugin, args)
    assert not plugin.activation_checkpointing
    model = tiny_model("falcon")
    disable_dropout(model)
    plain = training_engine(model, config_of(tmp_path), print, sharded=True)
    assert plain.path.layout == "continued"
    # Layout `continued` passes a cache from pass to pass, which recomputation does not support.
    recomputed = training_engine(model, args, print, sharded=True)
    assert recomputed.path.layout != "continued"
    plugin = plugin_of(activation_checkpointing=True, activation_checkpointing_offload=True)
    with pytest.raises(ConfigError, match=r"activation_checkpointing_kwargs: \{offload: true\}"):
        _use_model_checkpointing(plugin, args)


def test_a_model_cannot_be_evaluated_before_it_is_sharded() -> None:
    """The engine was chosen for the device to which the shards will be moved."""
    trainer = SimpleNamespace(is_fsdp_enabled=True, model=nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="received evaluate before train"):
        ShardedTrainer.check_can_evaluate(trainer)  # type: ignore[arg-type]


def test_fsdp2_over_cpu_processes_is_refused_if_a_gpu_is_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 would use a device mesh of the GPU with the gloo backend."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    accelerator: Any = SimpleNamespace(mixed_precision="no")
    args = config_of(tmp_path)
    assert not _shard_on_cpu(accelerator, args)
    args.fsdp_plugin_args = {"fsdp_version": 2, "cpu_ram_efficient_loading": False}
    with pytest.raises(ConfigError, match="Set CUDA_VISIBLE_DEVICES to an empty string"):
        _shard_on_cpu(accelerator, args)


def test_a_tied_parameter_is_saved_once() -> None:
    """A gathered state dict has a separate tensor for each name of a tied parameter."""
    model = tiny_model("gpt2")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one, other = "transformer.wte.weight", "lm_head.weight"
    assert weights[one].data_ptr() != weights[other].data_ptr()
    _share_tied_weights(weights, model)
    assert weights[one] is weights[other]
    _share_tied_weights(empty := {}, model)  # the state dict of every rank but the first
    assert not empty


def test_the_device_of_a_sharded_model_is_that_of_its_mesh() -> None:
    """Also if the shards are offloaded to another device."""

    class Shard(nn.Parameter):
        device_mesh = type("Mesh", (), {"device_type": "meta"})

    model = nn.Linear(1, 1)
    assert device_of(model) == torch.device("cpu")
    model.weight = Shard(torch.zeros(1, 1))
    assert device_of(model) == torch.device("meta")
