"""The lines of pipelines/distributed/README.md, run as they stand but for what a machine is."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from support.fork_server import ForkServer
from support.rank_storm import N_GROUPS, storm_dataset
from support.rounding import ADAM_EPSILON, adam_rounding
from support.training import copy_of, largest_difference, score, sidecars, unscored_dataset

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "pipelines" / "distributed"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
ALL_LINES = re.findall(r"^    ((?:accelerate launch|torchrun) .*)$", README, re.MULTILINE)
LINES = [line for line in ALL_LINES if "gvpo_offline.cli train" in line]


def test_the_readme_names_every_file() -> None:
    for path in FOLDER.rglob("*.yaml"):
        assert f"`{path.relative_to(FOLDER)}`" in README
        assert str(path.relative_to(ROOT)) in "\n".join(LINES)


def test_files_say_what_they_are() -> None:
    """What accelerate would choose otherwise: FSDP1, every rank but one without weights."""
    for name in ("fsdp2", "fsdp2_offload"):
        config = yaml.safe_load((FOLDER / "accelerate" / f"{name}.yaml").read_text())
        assert config["mixed_precision"] == "no"
        shards = config["fsdp_config"]
        assert shards["fsdp_version"] == 2
        assert shards["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"
        assert shards["fsdp_cpu_ram_efficient_loading"] is False
        assert shards["fsdp_offload_params"] is (name == "fsdp2_offload")


LAUNCHERS = {
    "accelerate": "accelerate.commands.accelerate_cli:main",
    "torchrun": "torch.distributed.run:main",
}


def launched(
    server: ForkServer, line: str, out: Path, data: Path, model_dir: Path
) -> dict[str, Any]:
    """Run a line on two processes of this machine; its settings as the run wrote them."""
    changes = {
        "dataset": data,
        "model_name_or_path": model_dir,
        "output_dir": out,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "adam_epsilon": ADAM_EPSILON,
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    output = run_line(server, line, changes)
    assert f"the trained policy: {out}" in output
    content: dict[str, Any] = json.loads((out / "gvpo_run.json").read_text())
    return content


def run_line(server: ForkServer, line: str, changes: dict[str, Any]) -> str:
    """Run a line with other settings; its output.

    The launcher runs in a fork, the processes that it starts begin as they would from a shell.
    """
    words = shlex.split(line)
    if words[0] == "accelerate":
        words[2:2] = ["--num_processes", "2", "--main_process_port", "0"]
    else:
        words[words.index("--nproc_per_node") + 1] = "2"
        words[1:1] = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    words += [str(word) for name, value in changes.items() for word in (f"--{name}", value)]
    status, output = server.run(
        words[1:], program=LAUNCHERS[words[0]], cwd=str(ROOT), env={"PYTHONPATH": str(ROOT)}
    )
    assert status == 0, output
    return output


def test_a_reference_scored_as_the_readme_says(
    tmp_path: Path, tiny_model_dir: Path, server: ForkServer
) -> None:
    """By accelerate with its file for FSDP2: the files of one process, said by one rank."""
    (line,) = (x for x in ALL_LINES if "reference --fsdp" in x and x.startswith("accelerate"))
    one = unscored_dataset(tmp_path / "one", tiny_model_dir, 8)
    many = copy_of(one, tmp_path / "many")
    score(one, tiny_model_dir)
    settings = {"model_name_or_path": tiny_model_dir, "use_cpu": "true", "show_progress": "false"}
    output = run_line(server, line, {"dataset": many, **settings})
    assert output.count("groups, references:") == 1
    assert sidecars(many) == sidecars(one)


def test_ddp_and_fsdp2_launched_as_the_readme_says(
    tmp_path: Path, tiny_model_dir: Path, server: ForkServer
) -> None:
    """DDP by torchrun, FSDP2 by accelerate: one policy, and checkpoints that say how they came."""
    data = storm_dataset(tmp_path / "data", tiny_model_dir)
    (ddp,) = (x for x in LINES if x.startswith("torchrun --nproc") and "fsdp2" not in x)
    (fsdp2,) = (x for x in LINES if "fsdp2.yaml -m" in x and x.startswith("accelerate"))
    for name, line in (("ddp", ddp), ("fsdp2", fsdp2)):
        run = launched(server, line, tmp_path / name, data, tiny_model_dir)
        assert run["training"]["groups_per_step"] == 64 > N_GROUPS
        seal = json.loads((tmp_path / name / "checkpoint-2" / "gvpo_checkpoint.json").read_text())
        backend = "replicated" if name == "ddp" else "fsdp2"
        assert seal["taken"]["backend"] == backend
        assert seal["taken"]["world_size"] == 2
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("ddp", "fsdp2"))
    assert largest_difference(one, other) <= adam_rounding(2)


@pytest.mark.parametrize("line", LINES)
def test_lines_name_files_that_are_there(line: str) -> None:
    named = re.findall(r"pipelines/\S+", line)
    assert named
    assert all((ROOT / path).is_file() for path in named)
