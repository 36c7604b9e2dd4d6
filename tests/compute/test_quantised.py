"""QLoRA: an adapter on a 4-bit or 8-bit base model, which is also the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import lines_of, unscored_dataset
from test_adapters import train
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from gvpo_offline.commands.evaluate import run_evaluate
from gvpo_offline.commands.settings import EvaluateConfig
from gvpo_offline.compute.adapters import adapter_disabled, check_trainable, policy_sha256
from gvpo_offline.compute.model import dtype_of, load_model, weights_sha256
from gvpo_offline.compute.probe import choose_path
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError
from gvpo_offline.store.dataset import open_dataset

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    """A model with layers wide enough for quantisation blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "dtype", "start"),
    [
        ({"load_in_4bit": True}, "float32+nf4", 1e-4),
        ({"load_in_4bit": True, "bf16": True}, "float32+nf4", 0.1),
        ({"load_in_4bit": True, "bf16": True, "dtype": "bfloat16"}, "bfloat16+nf4", 0.1),
        ({"load_in_8bit": True}, "float32+int8", 0.1),
    ],
    ids=["4 bits", "4 bits, bf16", "4 bits in bfloat16", "8 bits"],
)
def test_an_adapter_is_trained_on_quantised_weights(
    model_dir: Path, tmp_path: Path, settings: dict[str, Any], dtype: str, start: float
) -> None:
    """Log-ratios against the quantised base start at 0, and the base does not change."""
    root = unscored_dataset(tmp_path / "data", model_dir)
    run = train(model_dir, root, tmp_path / "run", **settings)
    (family,) = open_dataset(root).manifest.references
    assert (family.dtype, run.policy.dtype) == (dtype, dtype)
    spread = lines_of(run, "log_ratio_std")
    assert spread[0] < start
    assert spread[-1] > 0.1
    with adapter_disabled(run.model) as base:
        assert policy_sha256(base) == family.weights_sha256
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in run.model.named_parameters() if "lora_" in name}


def test_evaluation_on_the_way_leaves_gradients_as_they_are(
    model_dir: Path, tmp_path: Path
) -> None:
    """On some CPUs bitsandbytes repacks weights in evaluation mode, which breaks training."""
    root = unscored_dataset(tmp_path / "data", model_dir)
    options = {"load_in_4bit": True, "eval_dataset": str(root)}
    quiet = train(model_dir, root, tmp_path / "quiet", **options)
    asked = {"eval_strategy": "steps", "eval_steps": 1}
    often = train(model_dir, root, tmp_path / "often", **options, **asked)
    assert lines_of(often, "grad_norm") == lines_of(quiet, "grad_norm")
    expected = lines_of(often, "eval_loss")[-1]
    config = EvaluateConfig(
        dataset=str(root),
        model_name_or_path=str(tmp_path / "often"),
        beta=0.5,
        load_in_4bit=True,
        use_cpu=True,
        show_progress=False,
    )
    assert run_evaluate(config).metrics["loss"] == pytest.approx(expected, rel=1e-4)


def test_layouts_are_judged_in_float32(model_dir: Path) -> None:
    """The probe computes products in float32, because bfloat16 rounding hides wrong layouts."""
    settings = ModelSettings(str(model_dir), load_in_4bit=True, dtype="bfloat16")
    model = load_model(settings, compute_dtype=torch.bfloat16)
    assert dtype_of(model) == "bfloat16+nf4"
    choice = choose_path(model, gradients=False)
    assert choice.path.layout == "shared"
    assert not choice.refused
    layer = model.model.layers[0].mlp.up_proj
    assert layer.compute_dtype == torch.bfloat16


def test_what_cannot_be_quantised_or_trained(model_dir: Path, tmp_path: Path) -> None:
    both = ModelSettings(str(model_dir), load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(ConfigError, match="exclude each other"):
        load_model(both)
    with pytest.raises(ConfigError, match=r"through an adapter.*4-bit.*Set use_peft"):
        train(model_dir, tmp_path / "nowhere", tmp_path / "run", use_peft=False, load_in_4bit=True)
    model = load_model(ModelSettings(str(model_dir), load_in_4bit=True))
    with pytest.raises(ConfigError, match="nf4 weights without an adapter"):
        check_trainable(model)
    assert weights_sha256(model) != weights_sha256(load_model(ModelSettings(str(model_dir))))
