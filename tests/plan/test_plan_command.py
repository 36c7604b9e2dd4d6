"""`gvpo-offline plan`, and the line before training."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from support.builders import build_dataset, make_group

from gvpo_offline.cli import main

_LARGE = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
    "tie_word_embeddings": False,
}


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Arguments: a dataset of 40 groups of 4 responses, and the configuration of a 7B model."""
    groups = [make_group(i, k=4, prompt_tokens=200, response_tokens=300) for i in range(40)]
    build_dataset(tmp_path / "data", groups=groups)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(_LARGE))
    return [str(tmp_path / "data"), "--model_name_or_path", str(tmp_path / "model")]


def _planned(inputs: list[str], capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(["plan", *inputs, "--format", "json", *flags]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_one_gpu_holds_an_adapter_and_eight_the_whole_model(
    inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """7.6e9 weights: 16 bytes each are 122 GB, and an eighth of them 15."""
    one = _planned(inputs, capsys)
    assert one["parameters"] == 7_615_616_512
    assert {way["training"] for way in one["ways"] if way["fits"]} == {"adapter"}
    assert one["ways"][one["best"]]["training"] == "adapter"
    eight = _planned(inputs, capsys, "--gpus", "8")
    best = eight["ways"][eight["best"]]
    assert (best["training"], best["sharding"]) == ("full", "fsdp2")
    copies = [w for w in eight["ways"] if (w["training"], w["sharding"]) == ("full", "ddp")]
    assert not any(way["fits"] for way in copies)
    words = shlex.split(eight["next"])
    assert words[:3] == ["torchrun", "--nproc_per_node", "8"]
    assert words[words.index("--fsdp") + 1] == "true"


def test_time_follows_operations_gpus_and_share(
    inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """32 of 40 equal groups on 1 GPU: 32 · (200 + 4 · 299) = 44,672 tokens."""
    flags = ("--use_peft", "true", "--activation_checkpointing", "false")
    (slow,) = _planned(inputs, capsys, *flags)["ways"]
    assert slow["operations_per_step"] > 4 * 6.5e9 * 44_672  # two passes of 2 a weight
    (fast,) = _planned(inputs, capsys, *flags, "--peak_share", "0.9")["ways"]
    assert fast["seconds_of_products"] == pytest.approx(slow["seconds_of_products"] / 2)
    assert slow["hours_per_epoch"] == pytest.approx(slow["seconds_per_step"] * 40 / 32 / 3600)


def test_the_budget_is_lowered_until_it_fits(
    inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--use_peft", "true", "--dtype", "bfloat16", "--gpu_memory_gb", "40")
    ways = _planned(inputs, capsys, *flags)["ways"]
    kept, again = ways
    assert kept["fits"]
    assert again["fits"]
    assert kept["max_tokens_per_micro_batch"] < again["max_tokens_per_micro_batch"] == 16_384


def test_the_text_ends_with_the_run_and_the_next_command(
    inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *inputs, "--gpus", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("this run: ")
    assert " GB of 80, " in lines[-2]
    assert " a step at 0.45 of peak; " in lines[-2]
    assert lines[-1].startswith("next: torchrun ")
    assert main(["plan", *inputs, "--gpu", "l4", "--use_peft", "false"]) == 0
    assert "nothing fits" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--gpu", "h1000"), "gpu is the name of a GPU"),
        (("--max_tokens_per_micro_batch", "400"), "499 tokens, more than 400"),
        (("--sharding", "fsdp2"), "divided among several GPUs"),
        (("--peak_share", "1.5"), "peak_share"),
        (("--model_name_or_path", "/no/such"), "config.json"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    inputs: list[str], capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    assert main(["plan", *inputs, *flags]) == 1
    assert said in capsys.readouterr().err
