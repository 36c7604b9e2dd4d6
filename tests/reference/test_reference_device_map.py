"""A reference model whose parts are on several devices, here in host memory and on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fork_server import ForkServer
from support.tiny_models import tiny_model
from support.tiny_policy import stored_model
from support.training import copy_of, score, sidecars, unscored_dataset

from gvpo_offline.compute.dispatched import PresentState, execution_device, is_absent, present
from gvpo_offline.compute.model import device_of, load_model, weights_sha256
from gvpo_offline.compute.probe import prepare_engine
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError
from gvpo_offline.reference.settings import ReferenceConfig


def places(**changes: int | str) -> dict[str, int | str]:
    """Everything in host memory but for some parts, named with _ for a dot."""
    parts = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    found: dict[str, int | str] = {f"model.{own}": "cpu" for own in parts} | {"lm_head": "cpu"}
    assert changes.keys() <= {key.replace("model.", "").replace(".", "_") for key in found}
    return {
        key: changes.get(key.replace("model.", "").replace(".", "_"), own)
        for key, own in found.items()
    }


PLACES = {
    "a layer": places(layers_1="disk"),
    "the output layer": places(lm_head="disk"),
    "the embedding and all layers": places(embed_tokens="disk", layers_0="disk", layers_1="disk"),
}


@pytest.fixture(scope="module")
def unscored(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    return unscored_dataset(tmp_path_factory.mktemp("data") / "data", tiny_model_dir, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", PLACES)
def test_the_sidecars_are_those_of_one_device(
    place: str, dtype: torch.dtype, unscored: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Byte for byte, with the same fingerprint; bfloat16 files are loaded as float32."""
    model = stored_model(*(tmp_path / "model", tiny_model_dir, dtype), tie_word_embeddings=False)
    one, many = copy_of(unscored, tmp_path / "one"), copy_of(unscored, tmp_path / "many")
    alone = score(one, model)
    found = score(many, model, use_cpu=False, device_map=PLACES[place])
    assert sidecars(many) == sidecars(one)
    assert alone.reference is not None
    assert found.reference is not None
    assert found.reference.fingerprint == alone.reference.fingerprint


def dispatched(folder: Path, family: str, parts: dict[str, int | str]) -> Any:
    tiny_model(family).save_pretrained(folder)
    return load_model(ModelSettings(model_name_or_path=str(folder)), device_map=parts)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mixtral"])
def test_the_start_up_check_finds_the_same_path(family: str, tmp_path: Path) -> None:
    """accelerate's hooks replace no forward of the model's own."""
    model = dispatched(tmp_path, family, places(layers_1="disk"))
    assert is_absent(model)
    settings: dict[str, Any] = {"max_tokens": 1000, "gradients": False}
    found = prepare_engine(model.eval(), **settings)
    assert found.path == prepare_engine(tiny_model(family).eval(), **settings).path


def test_weights_on_disk_are_read_where_they_are_needed(tmp_path: Path) -> None:
    """The first parameter is on disk: the device is that of its module's hook."""
    whole = tiny_model("qwen3")
    model = dispatched(tmp_path, "qwen3", PLACES["the embedding and all layers"])
    assert next(model.parameters()).is_meta
    assert device_of(model) == torch.device("cpu")
    table = model.get_input_embeddings()
    assert execution_device(table) == torch.device("cpu")
    with present(table):
        assert torch.equal(table.weight, whole.get_input_embeddings().weight)
    assert table.weight.is_meta
    state = PresentState(model)
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in whole.state_dict().items()
    }
    assert weights_sha256(model) == weights_sha256(whole)


def test_what_does_not_go_with_a_device_map(unscored: Path, tiny_model_dir: Path) -> None:
    given = {"dataset": str(unscored), "model_name_or_path": str(tiny_model_dir)}
    for other in ("fsdp", "use_cpu"):
        with pytest.raises(ConfigError, match=f"received device_map with {other}"):
            ReferenceConfig(**given, device_map="auto", **{other: True})
    for wrong in (places(norm="nowhere"), places(norm=-1), "everywhere", {}):
        with pytest.raises(ConfigError, match="device_map is one of auto, balanced"):
            ReferenceConfig(**given, device_map=wrong)


def test_an_adapter_is_refused(unscored: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="device_map is for models without an adapter"):
        score(unscored, tmp_path, use_cpu=False, device_map="auto")


def test_by_the_command_line(
    unscored: Path, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    """A mapping as JSON; and a word, which on this machine means host memory."""
    for number, given in enumerate((json.dumps(PLACES["a layer"]), "auto")):
        data = copy_of(unscored, tmp_path / str(number))
        argv = ["reference", "--dataset", data, "--model_name_or_path", tiny_model_dir]
        status, output = server.run([*argv, "--device_map", given])
        assert status == 0, output
