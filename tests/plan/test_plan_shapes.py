"""Shapes of models from their configurations, compared with transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gvpo_offline.errors import ConfigError
from gvpo_offline.plan.config_file import model_shape
from gvpo_offline.plan.devices import device_named, find_device
from gvpo_offline.plan.shapes import shape_of_config

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
_HYBRID = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
# The weights that are counted by matrices differ in nothing; vectors may.
_MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    ("mistral", {"head_dim": 32}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 32}),
    ("gemma", {"head_dim": 32}),
    ("gemma2", {"head_dim": 32}),
    ("gemma3_text", {"head_dim": 32}),
    ("olmo2", {}),
    ("phi3", {"pad_token_id": 0}),
    ("glm4", {"head_dim": 16, "pad_token_id": 0}),
    ("mixtral", {"num_local_experts": 4}),
    ("qwen3_moe", {"head_dim": 16, **_EXPERTS}),
    ("qwen2_moe", {"shared_expert_intermediate_size": 48, **_EXPERTS}),
    ("gpt2", {"n_embd": 64, "n_layer": 4, "n_head": 4}),
    ("gpt_neox", {"num_key_value_heads": 4}),
    ("deepseek_v3", _LATENT),
    ("gpt_oss", {"head_dim": 16, "num_local_experts": 4}),
    ("qwen3_next", {**_HYBRID, **_EXPERTS, "shared_expert_intermediate_size": 32}),
]


@pytest.mark.parametrize(("model_type", "settings"), _MODELS, ids=lambda v: str(v)[:20])
def test_the_number_of_weights_is_that_of_the_model(
    model_type: str, settings: dict[str, Any]
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 128} if model_type == "gpt2" else _SIZES
    config = AutoConfig.for_model(model_type, **{**sizes, **settings})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = shape_of_config(config.to_dict())
    assert found.known
    assert found.parameters == sum(weight.numel() for weight in model.parameters())


def test_kinds_of_layers_follow_the_configuration() -> None:
    config = {"model_type": "qwen3_next", **_SIZES, **_HYBRID, "full_attention_interval": 4}
    assert [layer.kind for layer in shape_of_config(config).layers] == [*["linear"] * 3, "full"]
    config = {"model_type": "gemma3_text", **_SIZES, "sliding_window": 8}
    config["layer_types"] = ["sliding_attention"] * 3 + ["full_attention"]
    assert [layer.window for layer in shape_of_config(config).layers] == [8, 8, 8, 0]


def test_the_text_part_of_a_model_of_several_modalities_is_described() -> None:
    inner = {"model_type": "gemma3_text", **_SIZES}
    assert shape_of_config({"model_type": "gemma3", "text_config": inner}) == shape_of_config(inner)


def test_an_adapter_has_the_shape_of_its_base(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama", **_SIZES}))
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert model_shape(str(adapter)) == model_shape(str(base))


@pytest.mark.parametrize("content", ["", "[1]", '{"model_type": "vit"}'])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="causal language model"):
        model_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_devices_are_found_by_the_name_of_the_driver(driver: str, name: str | None) -> None:
    found = device_named(driver)
    assert (None if found is None else found.name) == name


def test_an_unknown_gpu_is_refused_with_the_names_of_the_known() -> None:
    with pytest.raises(ConfigError, match="h100, h100-nvl"):
        find_device("h1000")
