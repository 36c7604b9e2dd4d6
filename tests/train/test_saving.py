"""Saving a trained model: invalid generation settings, and weights that must not be lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import load, same_weights, scored_dataset, trainer_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerCallback

from gvpo_offline.errors import ConfigError
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.saving import mend_generation_config

GREEDY = {"do_sample": False, "temperature": 0.6, "top_p": 0.9}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("saving") / "data", tiny_model_dir, 16)


def with_generation_config(source: Path, folder: Path, **settings: Any) -> Path:
    """A copy of a model with other generation settings and another end token in them.

    The trainer adds the tokenizer's end token: the settings are then no longer those of the file,
    and transformers refuses to save them.
    """
    shutil.copytree(source, folder)
    file = folder / "generation_config.json"
    held = json.loads(file.read_text())
    file.write_text(json.dumps({**held, "eos_token_id": 7, **settings}))
    return folder


def test_transformers_does_not_save_such_a_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    """What would end a run after its last step."""
    model = AutoModelForCausalLM.from_pretrained(
        with_generation_config(tiny_model_dir, tmp_path / "m", **GREEDY)
    )
    model.generation_config.eos_token_id = [7, 1]
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.safetensors"))


def test_generation_settings_without_effect_are_unset_before_the_first_step(
    tiny_model_dir: Path, dataset: GroupDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_generation_config(tiny_model_dir, tmp_path / "m", **GREEDY)
    trainer = trainer_of(folder, dataset, tmp_path / "run", save_strategy="epoch")
    assert "without temperature=0.6, top_p=0.9" in caplog.text
    trainer.train()
    trainer.save_model()
    saved = GenerationConfig.from_pretrained(tmp_path / "run")
    assert (saved.temperature, saved.top_p) in [(None, None), (1.0, 1.0)]
    assert saved.do_sample in (None, False)
    assert 7 in saved.eos_token_id
    assert same_weights(load(tmp_path / "run").state_dict(), trainer.model.state_dict())
    assert (tmp_path / "run" / "checkpoint-2" / "gvpo_checkpoint.json").is_file()


def test_valid_generation_settings_are_kept(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_generation_config(tiny_model_dir, tmp_path / "m", do_sample=True, temperature=0.6)
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = model.generation_config.to_dict()
    mend_generation_config(model)
    assert model.generation_config.to_dict() == before
    assert not caplog.records


def test_settings_that_cannot_be_mended_leave_the_special_tokens(
    tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two sequences of greedy decoding are refused without naming a setting to unset."""
    model: Any = load(tiny_model_dir)
    model.generation_config = GenerationConfig(eos_token_id=[7, 1], pad_token_id=0)
    model.generation_config.num_return_sequences = 2
    mend_generation_config(model)
    assert "with its special tokens alone" in caplog.text
    assert model.generation_config.eos_token_id == [7, 1]
    model.generation_config.validate(strict=True)


def test_what_cannot_be_saved_beside_the_weights_is_found_before_the_first_step(
    tiny_model_dir: Path, dataset: GroupDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path / "run", tokenizer=tokenizer)

    def refuse(folder: str, **kwargs: Any) -> None:
        raise TypeError("Object of type set is not JSON serializable")

    monkeypatch.setattr(tokenizer, "save_pretrained", refuse)
    with pytest.raises(ConfigError, match="tokenizer: TypeError: Object of type set"):
        trainer.train()
    assert trainer.state.global_step == 0


class _BreaksSettings(TrainerCallback):
    """Makes the generation settings invalid during training, as user code may."""

    def on_step_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.generation_config.temperature = 0.5


@pytest.mark.parametrize("saved", ["at the end", "in a checkpoint"])
def test_weights_are_written_even_if_the_model_cannot_be_saved(
    tiny_model_dir: Path, dataset: GroupDataset, tmp_path: Path, saved: str
) -> None:
    """After two steps of 8 of the 16 groups; the head is tied, so that it is stored once."""
    run = tmp_path / "run"
    trainer = trainer_of(
        tiny_model_dir,
        dataset,
        run,
        callbacks=[_BreaksSettings()],
        save_strategy="no" if saved == "at the end" else "epoch",
    )

    def train_and_save() -> None:
        trainer.train()
        trainer.save_model()

    with pytest.raises(ConfigError, match=r"GenerationConfig is invalid.*weights-2") as caught:
        train_and_save()
    assert str(run / "weights-2" / "model.safetensors") in str(caught.value)
    weights = load(run / "weights-2").state_dict()
    assert same_weights(weights, trainer.model.state_dict())
    assert not same_weights(weights, load(tiny_model_dir).state_dict())


def test_the_weights_of_an_adapter_are_written_too(
    tiny_model_dir: Path, dataset: GroupDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, PeftModel

    run = tmp_path / "run"
    adapter = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    trainer = trainer_of(tiny_model_dir, dataset, run, peft_config=adapter)
    trainer.train()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no model card")

    monkeypatch.setattr(trainer.model, "create_or_update_model_card", refuse)
    with pytest.raises(ConfigError, match=r"no model card.*adapter_model\.safetensors"):
        trainer.save_model()
    loaded = PeftModel.from_pretrained(load(tiny_model_dir), run / "weights-2")
    own = {n: t for n, t in trainer.model.state_dict().items() if "lora_" in n}
    assert any(tensor.abs().max() > 0 for name, tensor in own.items() if "lora_B" in name)
    held = loaded.state_dict()
    assert all(torch.equal(tensor, held[name]) for name, tensor in own.items())
