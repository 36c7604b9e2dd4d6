"""Layouts are chosen on a small model of the same classes, as they would be on the model itself."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from support.hybrid_models import CONTINUED, FORGETFUL, REFUSED, hybrid_model
from support.tiny_models import tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

from gvpo_offline.compute import probe
from gvpo_offline.compute import twin as twins
from gvpo_offline.compute.model import disable_dropout
from gvpo_offline.compute.probe import choose_path
from gvpo_offline.compute.twin import NoTwinError, make_twin


def model_of(family: str) -> Any:
    known = CONTINUED | FORGETFUL | REFUSED
    model = (hybrid_model if family in known else tiny_model)(family)
    disable_dropout(model)
    return model.train()


@pytest.fixture
def always_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also models that are as small as a twin have one."""
    monkeypatch.setattr(twins, "SMALL_MODEL", 0)


# Of each way of building layers one or two; all others were compared once and agree as well.
SOME = ["gpt2", "gemma2", "falcon", "mixtral", "llama4", "bloom", "qwen3.5", "bamba", "lfm2-moe"]
SOME += ["mamba2", "recurrent-gemma"]


@pytest.mark.usefixtures("always_twin")
@pytest.mark.parametrize("family", SOME)
def test_a_twin_gives_the_choice_of_the_model(
    family: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING, logger="gvpo_offline"):
        choice = choose_path(model_of(family))
    assert "compared on the model itself" not in caplog.text
    monkeypatch.setattr(twins, "SMALL_MODEL", 1 << 40)
    alone = choose_path(model_of(family))
    assert (choice.path, choice.prompt_once) == (alone.path, alone.prompt_once)


# ---- depth and width ----

_DEEP = {
    # settings beyond those of a small model; layers of the twin.
    "llama": ("llama", {}, 2),
    "full attention in every sixth layer": (
        "gemma3_text",
        {"num_hidden_layers": 12, "head_dim": 16},
        2,
    ),
    "linear attention": ("qwen3_5_text", {"num_hidden_layers": 8}, 2),
    "dense layers first": (
        "deepseek_v3",
        {"first_k_dense_replace": 3, "n_routed_experts": 64, "n_group": 4, "topk_group": 2}
        | {"moe_intermediate_size": 128, "q_lora_rank": 32, "kv_lora_rank": 16}
        | {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
        | {"num_key_value_heads": 16},
        4,
    ),
    "a rule over the layers' numbers": (
        "jamba",
        {"attn_layer_period": 4, "attn_layer_offset": 2, "mamba_d_state": 8}
        | {"use_mamba_kernels": False, "expert_layer_period": 2, "expert_layer_offset": 1},
        3,
    ),
}


@pytest.mark.parametrize("case", _DEEP)
def test_a_twin_has_one_layer_of_each_kind_and_is_narrow(case: str) -> None:
    """A twin has at least 2 layers; where a setting lists the kinds of layers, one of each."""
    kind, settings, layers = _DEEP[case]
    model = deep_model(kind, **settings)
    twin: Any = make_twin(model)
    assert twin.config.num_hidden_layers == layers
    assert twin.config.vocab_size == 512
    assert twin.config.hidden_size < model.config.hidden_size
    theirs = {type(module) for module in model.modules()}
    assert {type(module) for module in twin.modules()} == theirs
    assert {p.dtype for p in twin.parameters()} == {torch.float32}


def deep_model(kind: str, **settings: Any) -> Any:
    """A model with 8 layers of width 256: larger than its twin."""
    common = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 256}
    common |= {"num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, **common | settings)
    return AutoModelForCausalLM.from_config(config)


# ---- what is found, and what is not compared on a twin ----


@pytest.mark.parametrize("sliding", [True, False])
def test_a_wrong_layout_in_one_kind_of_layer_is_found(
    sliding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention that loses the packed row in layers 5 and 11 only, or in all others."""
    right = Gemma3Attention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.is_sliding == sliding:
            kwargs.pop("packed_row", None)
        return right(self, *args, **kwargs)

    model = deep_model("gemma3_text", num_hidden_layers=12, head_dim=16).train()
    assert choose_path(model).path.layout == "shared"
    monkeypatch.setattr(Gemma3Attention, "forward", forward)
    assert choose_path(model).path.layout != "shared"


def test_no_float32_copy_of_a_bfloat16_model_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise AssertionError("the model was computed in float32")

    monkeypatch.setattr(probe, "in_float32", refused)
    model = deep_model("llama").bfloat16().train()
    before = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    choice = choose_path(model)
    assert choice.path.layout == "shared"
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_random_state_is_unchanged() -> None:
    model = deep_model("llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_twin(model)
    assert torch.equal(torch.rand(3), expected)


def test_an_adapter_is_part_of_the_twin() -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(deep_model("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    twin = make_twin(adapted)
    trained = {name.split(".")[-3] for name, p in twin.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    assert choose_path(adapted).path.layout == "shared"


class _Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        doubled: torch.Tensor = 2 * self.inner(hidden)
        return doubled


@pytest.mark.parametrize("how", ["a module", "a forward"])
def test_what_the_configuration_does_not_describe_has_no_twin(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = deep_model("llama", num_hidden_layers=3)
    layer = model.model.layers[2].mlp
    if how == "a module":
        layer.down_proj = _Twice(layer.down_proj)
    else:
        layer.down_proj.forward = lambda x: 2 * nn.Linear.forward(layer.down_proj, x)
    with pytest.raises(NoTwinError, match=r"model\.layers\.2\.mlp\.down_proj"):
        make_twin(model)
    with caplog.at_level(logging.WARNING, logger="gvpo_offline"):
        assert choose_path(model, gradients=False).path.layout == "shared"
    assert "layouts are compared on the model itself" in caplog.text
