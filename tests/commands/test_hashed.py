"""The run and the search in tests/data/hashed, whose files have hashes, go on with later code.

Bounds of the losses are those that `test_before.test_an_earlier_checkpoint_resumes` derives, for
the same dataset, model and settings.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_before import BEFORE, COMMANDS, files_of, rounding

from gvpo_offline import cli, open_dataset
from gvpo_offline.report.run.tune import read_tune
from gvpo_offline.train.checkpoint_files import damaged_files

HASHED = BEFORE.parent / "hashed"
EXPECTED: dict[str, Any] = json.loads((HASHED / "expected.json").read_text())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the dataset and the model, with the run and the search beside them."""
    copy = tmp_path / "before"
    shutil.copytree(BEFORE, copy)
    for name in ("run", "tuned"):
        shutil.rmtree(copy / name)
        shutil.copytree(HASHED / name, copy / name)
    monkeypatch.chdir(copy)
    return copy


def command(name: str, **changes: Any) -> int:
    config = Path("command.json")
    config.write_text(json.dumps({**COMMANDS[name], **changes}))
    return cli.main([name, "--config", str(config)])


def test_the_checkpoint_is_verified_and_resumes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses and their mean over all four steps are those of the run without interruption. An
    error in log-probs moves the loss of step 3; step 4's weights differ as well.
    """
    checkpoint = Path("run", "checkpoint-2")
    assert damaged_files(checkpoint) == []
    optimizer = (checkpoint / "optimizer.pt").read_bytes()
    (checkpoint / "optimizer.pt").write_bytes(optimizer[:9000] + b"\0\1" + optimizer[9002:])
    assert command("train", resume_from_checkpoint="auto") == 1
    assert "optimizer.pt: the checkpoint's file has the content" in capsys.readouterr().err
    (checkpoint / "optimizer.pt").write_bytes(optimizer)
    assert command("train", resume_from_checkpoint="auto") == 0
    history = json.loads(Path("run", "trainer_state.json").read_text())["log_history"]
    now = [line for line in history if "loss" in line]
    then = EXPECTED["train"]["log"]
    assert [line["step"] for line in now] == [1, 2, 3, 4]
    off = 2 * rounding(12, 2 * math.log(280))
    relative = off / (12 * math.log(280))
    dataset = open_dataset("whole", reward="points")
    groups = [g for i in range(dataset.n_row_groups) for g in dataset.groups(i)]
    assert max(length for g in groups for length in g.response_lengths) <= 12
    bounds = []
    for own, expected in zip(now, then, strict=True):
        norm = expected["grad_norm"]
        bound = COMMANDS["train"]["beta"] * off * math.sqrt(3 * expected["loss"])
        bounds.append(bound + norm * 2 * COMMANDS["train"]["learning_rate"] * relative * norm)
        assert abs(own["loss"] - expected["loss"]) <= bounds[-1]
    mean = EXPECTED["train"]["train_loss"]
    assert abs(history[-1]["train_loss"] - mean) <= max(bounds)
    since = sum(line["loss"] for line in then[2:]) / 2  # of the steps after the checkpoint alone
    assert abs(since - mean) > max(bounds)


def test_the_search_goes_on(folder: Path) -> None:
    """The range test and the first trial are read from their files, and run again where damaged."""
    assert read_tune(Path("tuned", "tune"))["beta"] == 0.5
    before = files_of("tuned/tune/trials")
    assert len(before) == 2
    settings = {"eval_fraction": 0.0, "eval_dataset": "whole"}
    (damaged,) = Path("tuned", "tune", "trials").glob("trial-*")
    whole = damaged.read_bytes()
    damaged.write_bytes(whole.replace(b"0.", b"1.", 1))
    assert command("tune", **settings) == 1
    damaged.unlink()
    assert command("tune", **settings) == 0
    after = files_of("tuned/tune/trials")
    kept = set(before) - {str(damaged)}
    assert {path: after[path] for path in kept} == {path: before[path] for path in kept}
    assert str(damaged) in after
    assert [Path(path).name for path in sorted(after)] == EXPECTED["trials"]
