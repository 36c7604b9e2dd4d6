"""`pipelines/math_server`, whole: a model made on the spot, a real server, real math-verify."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.importing import read_groups

from gvpo_offline.store.manifest import load_manifest

ROOT = Path(__file__).parents[2]
N_PROMPTS, K = 24, 4


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demonstration has written; a short one."""
    folder = tmp_path_factory.mktemp("math_server")
    argv = ["--output_dir", folder, "--prompts", N_PROMPTS, "--pretrain_steps", 300]
    done = subprocess.run(
        [sys.executable, ROOT / "pipelines/math_server/demo.py", *map(str, argv)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_stage_is_in_the_lineage(out: Path) -> None:
    manifest = load_manifest(out / "dataset")
    assert [step.stage for step in manifest.lineage] == ["sample", "reward", "reference"]
    assert set(manifest.samplers) == {"server"}
    assert [family.name for family in manifest.rewards] == ["correct"]
    assert (out / "trained" / "model.safetensors").exists()
    report = json.loads((out / "report.json").read_text())
    assert 0 < report["n_groups"] < N_PROMPTS


def test_rewards_say_who_is_right(out: Path) -> None:
    """`it is N` and `may be N`: the reward is 1 where N is the sum that the prompt asks for."""
    groups = read_groups(out / "dataset")
    assert len(groups) == N_PROMPTS
    distinct = plain = 0
    for group in groups:
        assert group.responses is not None
        assert group.rewards is not None
        assert group.group_size == K
        answer = json.loads(group.metadata or "")["answer"]
        for response, reward in zip(group.responses, group.rewards, strict=True):
            if said := re.fullmatch(r"(?:it is|may be) (\d+)", response):
                assert reward == float(said[1] == answer), response
                plain += 1
        distinct += len(set(group.responses)) > 1
    # A server that only ever says the likeliest thing gives each prompt 4 times the same.
    assert distinct > N_PROMPTS / 2
    assert plain > N_PROMPTS * K / 2  # the rest is babble: the model has learned for seconds
