"""What is checked of every sampler before the first one draws a response."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.sampling import config, local, remote

from gvpo_offline.compute.adapters import load_policy
from gvpo_offline.compute.model import check_model
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import GVPOError
from gvpo_offline.rewards.kinds import RewardModelSettings
from gvpo_offline.rewards.model import ModelScorer
from gvpo_offline.sampling.local import model_info
from gvpo_offline.sampling.run import run_sample
from gvpo_offline.tokenizer import load_policy_tokenizer


def broken(model: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a model with other weights."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.fixture
def gguf_of_unknown_architecture(tmp_path: Path) -> Path:
    gguf = pytest.importorskip("gguf", reason="extra gvpo-offline[gguf]")
    folder = tmp_path / "unknown"
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "model.gguf", "abacus7")
    writer.add_name("unknown")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def refused(tmp_path: Path, model: Path, second: dict[str, Any]) -> str:
    """The error of a run with a good sampler and this one; the first has drawn nothing."""
    samplers = {"good": local(model), "second": second}
    with pytest.raises(GVPOError) as caught:
        run_sample(config(tmp_path, model, samplers, n=2))
    assert not list((tmp_path / "data").rglob("samples/*/*"))
    return str(caught.value)


def test_the_weights_of_a_later_sampler(tmp_path: Path, tiny_model_dir: Path) -> None:
    def lose(weights: dict[str, Any]) -> None:
        del weights["model.layers.1.mlp.up_proj.weight"]

    def widen(weights: dict[str, Any]) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        weights[name] = weights[name].new_zeros(3, 5)

    lost = broken(tiny_model_dir, tmp_path / "lost", lose)
    wide = broken(tiny_model_dir, tmp_path / "wide", widen)
    assert "no model.layers.1.mlp.up_proj.weight" in refused(tmp_path, tiny_model_dir, local(lost))
    assert "(3, 5) instead of" in refused(tmp_path, tiny_model_dir, local(wide))
    check_model(ModelSettings(str(tiny_model_dir)))


def test_the_base_of_a_later_adapter(tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    base = broken(tiny_model_dir, tmp_path / "base", lambda weights: weights.clear())
    held = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(held))
    assert "hold every weight" in refused(tmp_path, tiny_model_dir, local(folder))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        pytest.param(
            {"kind": "vllm", "model_name_or_path": "MODEL", "max_new_tokens": 4},
            "needs the package vllm",
            marks=pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed"),
        ),
        (remote("http://localhost:1/v1", api_key_env="NO_SUCH_KEY"), "NO_SUCH_KEY"),
        ({"kind": "openai_batch", "model": "m", "results": ["no.jsonl"]}, "no.jsonl"),
    ],
    ids=["package", "key", "results"],
)
def test_what_later_samplers_need(
    tmp_path: Path, tiny_model_dir: Path, second: dict[str, Any], message: str
) -> None:
    named = {k: str(tiny_model_dir) if v == "MODEL" else v for k, v in second.items()}
    assert message in refused(tmp_path, tiny_model_dir, named)


def test_a_gguf_of_an_architecture_that_is_not_read(
    tmp_path: Path, tiny_model_dir: Path, gguf_of_unknown_architecture: Path
) -> None:
    """Every way to a model says the architecture and the remedy: policies, tokenizers, samplers,
    reward models.
    """
    name = str(gguf_of_unknown_architecture)
    ways: list[Callable[[], object]] = [
        lambda: load_policy(ModelSettings(name)),
        lambda: load_policy_tokenizer(ModelSettings(name)),
        lambda: model_info(name, None, remote_code=False, gguf_file="model.gguf"),
        lambda: ModelScorer(RewardModelSettings(kind="model", model_name_or_path=name)).start(),
    ]
    for way in ways:
        with pytest.raises(GVPOError) as caught:
            way()
        message = str(caught.value)
        assert "'abacus7'" in message
        assert "transformers dequantises" in message
        assert "safetensors" in message
    assert "'abacus7'" in refused(tmp_path, tiny_model_dir, local(Path(name)))
