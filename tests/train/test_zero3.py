"""DeepSpeed ZeRO-3 with the files that are shipped: two processes (gloo) end where one does.

Runs where DeepSpeed is installed, which is no dependency.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.rounding import adam_rounding
from support.training import largest_difference, train_command, unequal_dataset

from gvpo_offline.store.dataset import GroupDataset

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
SHIPPED = Path(__file__).parents[2] / "pipelines" / "distributed"
ADAPTER = ["--use_peft", "true", "--lora_target_modules", "[q_proj,down_proj]"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    """25 groups of 2 to 12 responses of 1 to 60 tokens; the largest are computed in pieces."""
    return unequal_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 25)


@pytest.fixture(scope="module")
def all_in_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped settings, but that small weights are cut like large ones."""
    settings = json.loads((SHIPPED / "zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = tmp_path_factory.mktemp("deepspeed") / "zero3.json"
    path.write_text(json.dumps(settings))
    return path


def launched(launcher: Sequence[str], arguments: Sequence[Any]) -> None:
    """Run `gvpo-offline train` to its end under a launcher of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*launcher, str(port), "-m", "gvpo_offline.cli", *map(str, arguments)]
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


TORCHRUN = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
ACCELERATE = ["accelerate.commands.launch", "--num_processes", "2"]
ACCELERATE += ["--config_file", str(SHIPPED / "accelerate" / "zero3.yaml"), "--main_process_port"]


def command(model_dir: Path, dataset: GroupDataset, output_dir: Path, *more: Any) -> list[Any]:
    """In the third step a rank has no group."""
    return [*train_command(dataset, model_dir, output_dir), *more]


def figures(output_dir: Path, *names: str) -> list[float]:
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [line[name] for name in names for line in history if name in line]


@pytest.mark.parametrize("more", [[], ADAPTER], ids=["all weights", "adapter"])
def test_shards_end_where_one_process_does(
    dataset: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    all_in_shards: Path,
    more: list[str],
) -> None:
    from gvpo_offline.cli import main

    assert main([str(w) for w in command(tiny_model_dir, dataset, tmp_path / "one", *more)]) == 0
    two = [*more, "--deepspeed", all_in_shards, "--activation_checkpointing", "true"]
    launched(TORCHRUN, command(tiny_model_dir, dataset, tmp_path / "two", *two))
    name = "adapter_model.safetensors" if more else "model.safetensors"
    one, both = (load_file(tmp_path / run / name) for run in ("one", "two"))
    assert largest_difference(one, both) <= adam_rounding(3)
    for figure in ("loss", "grad_norm", "eval_loss", "eval_explained_variance"):
        expected = figures(tmp_path / "one", figure)
        assert expected
        assert figures(tmp_path / "two", figure) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    resumed = [*two, "--resume_from_checkpoint", tmp_path / "two" / "checkpoint-2"]
    (tmp_path / "two" / name).unlink()
    launched(TORCHRUN, command(tiny_model_dir, dataset, tmp_path / "two", *resumed))
    assert largest_difference(load_file(tmp_path / "two" / name), both) == 0


def test_accelerates_file_works_as_shipped(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """With the base as reference, which the dataset holds."""
    from gvpo_offline.cli import main

    more = ["--reference", "base", *ADAPTER]
    assert main([str(w) for w in command(tiny_model_dir, dataset, tmp_path / "one", *more)]) == 0
    launched(ACCELERATE, command(tiny_model_dir, dataset, tmp_path / "two", *more))
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert largest_difference(one, two) < 1e-5
