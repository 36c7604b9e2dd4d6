"""Weights that stay as their files store them until FSDP2 has sharded them."""

from __future__ import annotations

import json
import os
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.fork_server import ForkServer
from support.rounding import adam_rounding
from support.tiny_policy import stored_model
from support.training import largest_difference, scored_dataset, train_command
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gvpo_offline.compute.model import dtype_of, load_model
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.compute.widening import NARROW, widen, widens
from gvpo_offline.errors import StorageError
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train import gathering

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "loading.py"
SHARDED = {"fsdp": "true", "fsdp_config": json.dumps({"state_dict_type": "SHARDED_STATE_DICT"})}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 12)


def load(folder: Path, **changes: Any) -> Any:
    settings = ModelSettings(model_name_or_path=str(folder), **changes)
    return load_model(settings, sharded_later=True)


@pytest.mark.parametrize("dtype", NARROW)
def test_weights_stay_stored_until_they_are_widened(
    dtype: torch.dtype, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """An optimizer that has the parameters keeps them, and tied ones stay tied."""
    folder = stored_model(tmp_path / "narrow", tiny_model_dir, dtype)
    model = load(folder)
    assert widens(model)
    assert {own.dtype for own in model.parameters()} == {dtype}
    assert dtype_of(model) == "float32"
    before = list(model.parameters())
    widen(model)
    assert not widens(model)
    after = list(model.parameters())
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    whole = load_model(ModelSettings(model_name_or_path=str(folder))).state_dict()
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, whole[name])


@pytest.mark.parametrize("wanted", ["auto", "bfloat16", "float32"])
def test_nothing_is_left_to_widen(wanted: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The stored data type is the wanted one."""
    dtype = torch.float32 if wanted == "float32" else torch.bfloat16
    assert not widens(load(stored_model(tmp_path / "model", tiny_model_dir, dtype), dtype=wanted))


def test_rounded_buffers_are_not_widened(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Gemma 3 computes the scale of its embeddings, sqrt(20) here, in the data type of its
    weights: 4.46875 in bfloat16. A float32 model has 4.47213595.
    """
    config = AutoConfig.for_model(
        "gemma3_text",
        hidden_size=20,
        intermediate_size=24,
        num_hidden_layers=1,
        head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert not widens(loaded)
    assert {own.dtype for own in loaded.parameters()} == {torch.float32}
    scale = float(loaded.model.embed_tokens.embed_scale)
    assert scale == pytest.approx(20**0.5, rel=2.0**-23)
    assert torch.tensor(20**0.5).bfloat16().item() == 4.46875


@pytest.mark.parametrize(
    ("n", "settings", "changes"),
    [
        (2, {}, {}),
        (4, {}, {"tie_word_embeddings": False}),
        (2, {"bf16": "true"}, {}),
        (2, {"dtype": "bfloat16", "bf16": "true"}, {}),
        (2, {"adapter": "true"}, {}),
    ],
    ids=["tied", "untied on four", "bf16", "stored in bf16, trained in float32", "adapter"],
)
def test_the_same_policy_is_trained_whichever_type_its_files_have(
    n: int,
    settings: dict[str, str],
    changes: dict[str, Any],
    dataset: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    server: ForkServer,
) -> None:
    """Bit by bit: bfloat16 files, whose weights are widened in shards, and float32 files with the
    same values.
    """
    own = dict(settings)
    adapter = own.pop("adapter", None)
    if adapter:
        own |= {"use_peft": "true", "lora_r": "2", "lora_target_modules": "all-linear"}
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    saved = []
    for dtype in (torch.bfloat16, torch.float32):
        folder = stored_model(tmp_path / str(dtype), tiny_model_dir, dtype, **changes)
        out = tmp_path / f"out-{dtype}"
        argv = train_command(
            dataset, folder, out, **SHARDED, **own, reference_check="off", save_strategy="no"
        )
        for status, output in server.run_ranks(argv, n):
            assert status == 0, output
        saved.append(load_file(out / name))
    assert {value.dtype for value in saved[0].values()} == {torch.float32}
    assert saved[0].keys() == saved[1].keys()
    assert {k for k, value in saved[0].items() if not torch.equal(value, saved[1][k])} == set()


def test_a_checkpoint_of_two_ranks_resumes_on_four(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    """Weights and Adam's moments are float32 in the checkpoint; the files of the model are not."""
    folder = stored_model(tmp_path / "model", tiny_model_dir, torch.bfloat16)
    settings = {**SHARDED, "reference_check": "off", "groups_per_step": "4", "save_steps": "1"}
    whole, out = tmp_path / "whole", tmp_path / "resumed"
    for status, output in server.run_ranks(train_command(dataset, folder, whole, **settings), 2):
        assert status == 0, output
    shutil.copytree(whole / "checkpoint-1", tmp_path / "checkpoint-1")
    argv = train_command(
        *(dataset, folder, out), **settings, resume_from_checkpoint=tmp_path / "checkpoint-1"
    )
    for status, output in server.run_ranks(argv, 4):
        assert status == 0, output
    one, other = (load_file(path / "model.safetensors") for path in (whole, out))
    assert largest_difference(one, other) <= adam_rounding(3)


@pytest.fixture(scope="module")
def growth(
    dataset: GroupDataset,
    tiny_model_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    server: ForkServer,
) -> Callable[[str, int], dict[str, float]]:
    """Host memory of a run by phase, per byte of float32 weights in its layers.

    The difference of two models, of two and of ten layers, so that what the interpreter, the
    batches and the embedding take is left out; 14 MB a layer, 110 MB in all.
    """
    root = tmp_path_factory.mktemp("growth")
    bench = runpy.run_path(str(BENCHMARK))
    models = {n: wide_model(root / f"layers{n}", tiny_model_dir, n) for n in (2, 10)}

    def measured(way: str, n: int) -> dict[str, float]:
        peaks = {}
        for layers, folder in models.items():
            out = root / f"{way}-{n}-{layers}".replace(", ", "-")
            out.mkdir()
            argv = bench["command_of"](way, n, out / "run", folder, dataset.root)
            for status, output in server.run_ranks(
                [*bench["WORK"], out, *argv], n, program=str(BENCHMARK)
            ):
                assert status == 0, output
            found = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(n)]
            figures = bench["largest"](found, 1)
            peaks[layers] = figures["anonymous_of_a_rank"]
            peaks[layers]["pages of all"] = figures["pss_of_all_loaded"]
        weights = [load_file(folder / "model.safetensors") for folder in models.values()]
        sizes = [4 * sum(own.numel() for own in each.values()) for each in weights]
        return {k: (peaks[10][k] - peaks[2][k]) / (sizes[1] - sizes[0]) for k in peaks[2]}

    return measured


def wide_model(folder: Path, tiny: Path, layers: int) -> Path:
    """A bfloat16 Llama with layers of 3.4M weights."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        vocab_size=AutoConfig.from_pretrained(tiny).vocab_size,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


# Of 110 MB; for pages that one of the two runs happens to have more than the other. A copy of the
# model, which the tests look for, is 0.5 as stored and 1 in float32.
SLACK = 0.2


@pytest.mark.parametrize("n", [2, 4])
def test_a_rank_holds_its_shards(n: int, growth: Callable[[str, int], dict[str, float]]) -> None:
    """FSDP2, bfloat16 files, trained in float32. Loading: the pages of the file, once on the
    machine. Start-up checks: nothing that grows with the layers. Sharding: 1/n, with the shards as
    stored beside them until they are converted. Saving: what training keeps on n ranks, weights,
    gradients and Adam's two moments (4/n), and no whole model.
    """
    found = growth("fsdp2", n)
    bounds = {"load": 0.0, "pages of all": 0.5, "check": 0.0, "shard": 1.5 / n, "save": 4 / n}
    assert {k: found[k] for k, bound in bounds.items() if found[k] > bound + SLACK} == {}
    assert found["train"] > 3 / n, "the measure misses what training needs"


@pytest.mark.parametrize("n", [2, 4])
def test_a_rank_scores_a_reference_with_its_shards(
    n: int, growth: Callable[[str, int], dict[str, float]]
) -> None:
    """1/n while it scores, beside a layer that is gathered and the embedding."""
    found = growth("reference", n)
    bounds = {"load": 0.0, "pages of all": 0.5, "check": 0.0, "shard": 1.5 / n, "score": 1 / n}
    assert {k: found[k] for k, bound in bounds.items() if found[k] > bound + SLACK} == {}
    assert found["score"] > 0.5 / n, "the measure misses the shards"


def test_copies_of_a_machine_share_the_pages_of_the_file(
    growth: Callable[[str, int], dict[str, float]],
) -> None:
    """DDP in the type of the files: one copy on the machine once loaded. The start-up checks keep
    one gradient of every weight, 0.5; they measure the rounding noise in float32 by layers, where
    a float32 copy of the model would be 1 more.
    """
    found = growth("ddp, as stored", 2)
    assert found["pages of all"] <= 0.5 * 1.3
    assert found["load"] <= SLACK
    assert found["check"] <= 0.5 + SLACK


def test_no_room_for_gathered_weights_is_an_error(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the page is touched: a file without blocks would end the process with SIGBUS."""
    model = load_model(ModelSettings(model_name_or_path=str(tiny_model_dir)))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (
        pytest.raises(StorageError, match="No space left on device"),
        gathering.gathered_weights(model, tmp_path / "out", keep=True),
    ):
        raise AssertionError("unreachable")
    assert not list((tmp_path / "out").iterdir())


def test_gathered_weights_are_those_of_the_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = load_model(ModelSettings(model_name_or_path=str(tiny_model_dir)))
    with gathering.gathered_weights(model, tmp_path, keep=True) as weights:
        for name, value in model.state_dict().items():
            assert torch.equal(weights[name], value)
            assert weights[name].data_ptr() != value.data_ptr()
        assert not list(tmp_path.iterdir()), "a killed process would leave it"
    with gathering.gathered_weights(model, tmp_path, keep=False) as weights:
        assert not weights
