"""Loading models: every weight comes from the files, or the model is refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.training import load, score, unscored_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomConfig,
    Qwen3ForCausalLM,
)

from gvpo_offline.compute.adapters import load_policy
from gvpo_offline.compute.files import model_files
from gvpo_offline.compute.loading import check_complete
from gvpo_offline.compute.model import load_model, weights_sha256
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError
from gvpo_offline.rewards.kinds import RewardModelSettings
from gvpo_offline.rewards.model import ModelScorer

Weights = dict[str, torch.Tensor]
LAYER = "model.layers.1."


def changed(
    source: Path, folder: Path, change: Callable[[Weights], Weights], **config: object
) -> Path:
    """A copy of a model whose weights and configuration are changed."""
    shutil.copytree(source, folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    return folder


def without(weights: Mapping[str, torch.Tensor], part: str) -> Weights:
    return {name: tensor for name, tensor in weights.items() if part not in name}


def renamed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_policy(ModelSettings(str(folder)))
    return str(caught.value)


def test_a_layer_that_the_files_lack_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The second of two layers: 11 weights, of which the message lists four."""
    folder = changed(tiny_model_dir, tmp_path / "m", lambda held: without(held, LAYER))
    message = refusal(folder)
    assert "hold every weight of Qwen3ForCausalLM" in message
    assert f"no {LAYER}input_layernorm.weight, " in message
    assert "and 7 more" in message


def test_the_error_stands_alone_without_transformers_table(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """transformers logs a line for each missing weight; the filter that drops them is removed."""
    folder = changed(tiny_model_dir, tmp_path / "m", lambda held: without(held, LAYER))
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    owner = logging.getLogger("transformers")
    owner.addHandler(handler)
    try:
        refusal(folder)
        assert [each.getMessage() for each in records] == []
        Qwen3ForCausalLM.from_pretrained(folder)
    finally:
        owner.removeHandler(handler)
    assert [f"{LAYER}mlp.up_proj.weight" in each.getMessage() for each in records] == [True]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_weights_saved_with_a_wrapper_are_refused_by_its_name(
    tiny_model_dir: Path, tmp_path: Path, prefix: str
) -> None:
    message = refusal(changed(tiny_model_dir, tmp_path / "m", renamed(prefix)))
    assert f"The files hold {prefix}model." in message
    for part in prefix.split(".")[:-1]:
        assert f"'{part}.'" in message
    assert "saved with a wrapper around it" in message


def test_a_head_that_is_not_tied_has_to_be_there(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The tied head of the original is not stored, which is right."""
    assert "lm_head.weight" not in load_file(tiny_model_dir / "model.safetensors")
    load_policy(ModelSettings(str(tiny_model_dir)))
    folder = changed(tiny_model_dir, tmp_path / "m", dict, tie_word_embeddings=False)
    message = refusal(folder)
    assert "no lm_head.weight" in message
    assert "tie_word_embeddings: true" in message


def test_weights_of_other_shapes_are_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    """(64, 32) in the files; a configuration with an inner width of 48 expects (48, 32)."""
    message = refusal(changed(tiny_model_dir, tmp_path / "m", dict, intermediate_size=48))
    assert "model.layers.0.mlp.up_proj.weight (64, 32) instead of (48, 32)" in message


def test_weights_beyond_those_of_the_model_are_ignored_with_a_warning(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = changed(
        tiny_model_dir, tmp_path / "m", lambda held: {**held, "v_head.weight": torch.ones(1, 32)}
    )
    model = load_policy(ModelSettings(str(folder)))
    assert "v_head.weight" in caplog.text
    assert weights_sha256(model) == weights_sha256(load(tiny_model_dir))


def test_buffers_of_earlier_versions_are_no_weights(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Old checkpoints have the rotary frequencies of each layer, which are computed now."""
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    folder = changed(tiny_model_dir, tmp_path / "m", lambda held: {**held, **extra})
    model = load_policy(ModelSettings(str(folder)))
    assert weights_sha256(model) == weights_sha256(load(tiny_model_dir))


def test_a_model_without_positions_and_with_a_tied_head_loads(tmp_path: Path) -> None:
    from transformers import BloomForCausalLM

    config = BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)
    BloomForCausalLM(config).save_pretrained(tmp_path)
    load_model(ModelSettings(str(tmp_path)))


def test_the_reference_is_not_scored_with_random_weights(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = changed(tiny_model_dir, tmp_path / "m", lambda held: without(held, LAYER))
    data = unscored_dataset(tmp_path / "data", tiny_model_dir, 8)
    with pytest.raises(ConfigError, match="hold every weight"):
        score(data, folder)


def test_a_reward_model_needs_its_head(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A language model has no head of a classifier; it would get a random one."""
    settings = RewardModelSettings(kind="model", model_name_or_path=str(tiny_model_dir))
    with pytest.raises(ConfigError, match=r"no score\.weight.*trained with this head"):
        ModelScorer(settings).identity()
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    classifier.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    whole = RewardModelSettings(kind="model", model_name_or_path=str(tmp_path))
    assert ModelScorer(whole).identity()["weights_sha256"] == weights_sha256(classifier)


@pytest.mark.parametrize("change", [lambda held: without(held, "layers.1"), renamed("module.")])
def test_an_adapter_needs_all_of_its_weights(
    tiny_model_dir: Path, tmp_path: Path, change: Callable[[Weights], Weights]
) -> None:
    from peft import LoraConfig

    adapted = get_peft_model(
        load(tiny_model_dir), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    )
    adapted.save_pretrained(tmp_path)
    assert isinstance(load_policy(ModelSettings(str(tmp_path))), PeftModel)
    file = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    assert "files of an adapter hold all of its weights" in refusal(tmp_path)


def test_a_key_is_missing_whatever_else_is_there() -> None:
    found = {"missing_keys": {"a.w"}, "unexpected_keys": {"b.w"}, "mismatched_keys": set()}
    with pytest.raises(ConfigError, match=r"no a\.w\. The files hold b\.w instead: save"):
        check_complete("folder", "Model", found)
    check_complete("folder", "Model", {**found, "missing_keys": set()})


def test_the_gguf_file_of_a_folder(tmp_path: Path) -> None:
    """The only one of a folder without other weights, or the one that is named."""
    folder = str(tmp_path)
    assert model_files(folder).gguf_file is None
    (tmp_path / "a.gguf").touch()
    assert model_files(folder).gguf_file == "a.gguf"
    assert model_files(f"{folder}/a.gguf") == model_files(folder) == model_files(folder, "a.gguf")
    assert model_files(str(model_files(folder))) == model_files(folder)
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ConfigError, match=r"a\.gguf, b\.gguf.*Set gguf_file"):
        model_files(folder)
    assert model_files(folder, "b.gguf").gguf_file == "b.gguf"
    (tmp_path / "model.safetensors").touch()
    assert model_files(folder).gguf_file is None
    with pytest.raises(ConfigError, match=r"c\.gguf, and a folder that holds a\.gguf, b\.gguf"):
        model_files(folder, "c.gguf")
    with pytest.raises(ConfigError, match="one GGUF file"):
        model_files(f"{folder}/a.gguf", "b.gguf")


def test_a_gguf_file_of_a_hub_repository() -> None:
    assert model_files("owner/name", "q4.gguf") == model_files("owner/name/q4.gguf")
    assert model_files("owner/name").gguf_file is None
    assert model_files("owner/name-gguf").gguf_file is None


def test_without_the_package_gguf_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name)
    )
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ConfigError, match=r"ip install 'gvpo-offline\[gguf\]'") as caught:
        load_model(ModelSettings(str(tmp_path)))
    assert "\n" not in str(caught.value)
