"""`pipelines/cluster`: the files that users copy, run as a scheduler would run them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.builders import build_dataset
from support.rewarding import answered, read

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "pipelines" / "cluster"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two files of four groups; answers are not marked, so that none is right."""
    groups = answered(8)
    build_dataset(
        tmp_path / "data", groups=groups, groups_per_shard=4, reward=None, reference=False
    )
    return tmp_path / "data"


def on_the_path(tmp_path: Path) -> dict[str, str]:
    """The environment of a job: the package, its command on the PATH, and this checkout."""
    command = tmp_path / "bin" / "gvpo-offline"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m gvpo_offline.cli "$@"\n')
    command.chmod(0o755)
    paths = {"PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **paths}


def test_an_array_of_jobs(tmp_path: Path, data: Path) -> None:
    environment = on_the_path(tmp_path)
    shutil.copytree(CLUSTER, tmp_path / "pipelines" / "cluster")
    for index in range(2):
        job = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_TASK_COUNT": "2"}
        argv = ["bash", "pipelines/cluster/slurm_reward.sbatch", str(data)]
        done = subprocess.run(
            argv, cwd=tmp_path, env={**environment, **job}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert ("1 of 2 tasks belong to other shards" in done.stderr) == (index == 0)
        assert ("reward right_and_brief@1: 8 groups" in done.stdout) == (index == 1)
    for group in read(data):
        assert group.rewards is not None
        assert group.components is not None
        assert group.components.tolist() == [[0.0] * group.group_size, [3.0] * group.group_size]
        assert group.rewards.tolist() == [-0.003] * group.group_size
    wrong = {**environment, "SLURM_ARRAY_TASK_MIN": "1"}
    done = subprocess.run(argv, cwd=tmp_path, env=wrong, capture_output=True, text=True)
    assert done.returncode == 2
    assert "the array must begin at 0" in done.stderr
