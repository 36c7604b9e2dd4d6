"""`pipelines/math_server`, whole: a model made on the spot, a real server, real math-verify.

Its `main` runs here; the commands and the server that it starts run in forked children, which
spares each the seconds of importing torch.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.fork_server import ForkServer, Shell
from support.importing import read_groups

from gvpo_offline.store.manifest import load_manifest

ROOT = Path(__file__).parents[2]
N_PROMPTS, K = 24, 4


class Forked:
    """Stands for `subprocess.Popen`: `transformers ...` in a child of the fork server."""

    def __init__(self, server: ForkServer, argv: Sequence[str]) -> None:
        self._child = server.start(argv[1:], program="transformers.cli.transformers:main")

    def poll(self) -> None:
        """It is at work until it is told to end."""

    def terminate(self) -> None:
        self._child.kill()

    def wait(self) -> int:
        return self._child.wait()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Path:
    """Where the demonstration has written; a short one."""
    folder = tmp_path_factory.mktemp("math_server")
    argv = ["--output_dir", folder, "--prompts", N_PROMPTS, "--pretrain_steps", 150]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "pipelines" / "math_server")
        for name in ("run", "demo"):  # other pipelines have files of the same names
            patch.delitem(sys.modules, name, raising=False)
        patch.setattr(subprocess, "run", Shell(server, {}))
        patch.setattr(subprocess, "Popen", lambda argv, **_: Forked(server, argv))
        importlib.import_module("demo").main(list(map(str, argv)))
        for name in ("run", "demo"):
            del sys.modules[name]
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
