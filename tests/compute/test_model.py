"""Model loading: all dropout disabled, adapters initialised from a seed, hashes of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import FAMILIES, VOCAB_SIZE, tiny_model
from torch import Tensor, nn

from gvpo_offline.compute.adapters import with_adapter
from gvpo_offline.compute.model import (
    autocast_dtype,
    disable_dropout,
    dtype_name,
    load_model,
    weights_sha256,
)
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError

WITH_DROPOUT = ("llama", "gpt2", "gpt-neox", "falcon", "opt")


def logits_of(model: nn.Module) -> Tensor:
    """(3, 9, V) logits of three rows of nine tokens."""
    ids = torch.arange(27).view(3, 9) % VOCAB_SIZE
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


@pytest.mark.parametrize(
    ("family", "attention"),
    [*((family, "eager") for family in FAMILIES), *((family, "sdpa") for family in WITH_DROPOUT)],
)
def test_dropout_is_off_wherever_it_hides(family: str, attention: str) -> None:
    """In training mode, as in the trainer: rates of dropout modules, of attention layers, of the
    configuration, and of layer drop.
    """
    model = tiny_model(family)
    model.set_attn_implementation(attention)

    def difference() -> float:
        still = logits_of(model.eval())
        model.train()
        return max(float((logits_of(model) - still).abs().max()) for _ in range(3))

    assert (difference() > 0.01) == (family in WITH_DROPOUT)
    disable_dropout(model)
    assert difference() == 0.0


def test_dropout_of_an_adapter_is_off_too() -> None:
    from peft import LoraConfig

    settings = LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False)
    model = with_adapter(tiny_model("qwen3"), settings, seed=0)
    model.train()
    assert not torch.equal(logits_of(model), logits_of(model))
    disable_dropout(model)
    trained = logits_of(model)
    assert torch.equal(trained, logits_of(model))
    assert torch.equal(trained, logits_of(model.eval()))


def test_an_adapters_first_weights_depend_on_the_seed_alone() -> None:
    from peft import LoraConfig

    def weights(seed: int) -> str:
        return weights_sha256(with_adapter(tiny_model("qwen3"), LoraConfig(r=4), seed=seed))

    one = weights(1)
    torch.rand(3)
    assert weights(1) == one
    assert weights(2) != one


def test_weights_are_named_by_their_values() -> None:
    """A checkpoint has the same hash in any wider data type; another value gives another hash."""
    model = tiny_model("qwen3").to(torch.bfloat16)
    one = weights_sha256(model)
    assert weights_sha256(model.float()) == one
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1.0
    assert weights_sha256(model) != one


def test_frozen_weights_alone_are_named_on_request() -> None:
    """Tied weights, which have two names, count as trained under both names."""
    model = tiny_model("qwen3")
    model.tie_weights()
    everything = weights_sha256(model, frozen_only=True)
    frozen = dict(model.named_parameters())["model.norm.weight"]
    frozen.requires_grad_(False)
    one = weights_sha256(model, frozen_only=True)
    assert one != everything
    with torch.no_grad():
        model.get_input_embeddings().weight += 1.0
        assert weights_sha256(model, frozen_only=True) == one
        frozen += 1.0
        assert weights_sha256(model, frozen_only=True) != one


def test_a_model_that_cannot_be_loaded(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.*Correct model_name_or_path"):
        load_model(ModelSettings(model_name_or_path=str(tmp_path / "nowhere")))
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_model_dir.iterdir():
        content = path.read_bytes()
        cut = len(content) // 2 if path.suffix == ".safetensors" else len(content)
        (broken / path.name).write_bytes(content[:cut])
    with pytest.raises(ConfigError, match=r"broken.*Correct model_name_or_path"):
        load_model(ModelSettings(model_name_or_path=str(broken)))


def test_data_types_by_name() -> None:
    assert dtype_name(autocast_dtype(bf16=True, fp16=False)) == "bfloat16"
    assert dtype_name(autocast_dtype(bf16=False, fp16=True)) == "float16"
    assert autocast_dtype(bf16=False, fp16=False) is None
    with pytest.raises(ConfigError, match="exclude each other"):
        autocast_dtype(bf16=True, fp16=True)
