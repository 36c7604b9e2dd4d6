"""The campaigns of `benchmarks/faults` can fail: planted faults are counted."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from faults import corruptions, hostile, oracles, run
from faults.canary import SECRET, Canary
from faults.cases import Kill, Limits, Outcome, run_case
from faults.journal import Journal

QUICK = Limits(seconds=20.0, memory=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "case"
    path.mkdir()
    return path


def dataset(root: Path) -> Path:
    """A manifest with one file, which it describes rightly."""
    root.mkdir()
    (root / "a.parquet").write_bytes(b"abc")
    entry = {"path": "a.parquet", "sha256": oracles.sha256(root / "a.parquet"), "bytes": 3}
    (root / "manifest-000001.json").write_text(oracles.sealed("manifest", {"groups": [entry]}))
    return root


def test_a_planted_bad_view_is_counted(tmp_path: Path) -> None:
    root = dataset(tmp_path / "data")
    assert oracles.bad_views(root) == []
    (root / "a.parquet").write_bytes(b"abd")
    assert oracles.bad_views(root) == ["manifest-000001.json: a.parquet differs"]
    (root / "a.parquet").unlink()
    assert oracles.bad_views(root) == ["manifest-000001.json: a.parquet is missing"]
    (root / "manifest-000001.json").write_text('{"sha256": "0", "manifest": {}}')
    assert oracles.bad_views(root) == ["manifest-000001.json: another seal"]
    (root / "manifest-000001.json").write_text("{")
    assert len(oracles.bad_views(root)) == 1


def test_the_seal_is_that_of_the_package(tmp_path: Path) -> None:
    from gvpo_offline.hashing import sha256_json

    value = {"b": [1, 2.5, None], "a": "é\x1b"}
    assert oracles.canonical_sha256(value) == sha256_json(value)


def test_a_sealed_checkpoint_with_other_weights_is_a_bad_view(tmp_path: Path) -> None:
    for name in ("run", "whole"):
        (tmp_path / name / "checkpoint-2").mkdir(parents=True)
        (tmp_path / name / "checkpoint-2" / "gvpo_checkpoint.json").write_text("{}")
        (tmp_path / name / "checkpoint-2" / "model.safetensors").write_bytes(b"weights")
    runs = tmp_path / "run", tmp_path / "whole"
    steady = {"run/checkpoint-2/model.safetensors"}
    assert oracles.bad_checkpoints(*runs, steady) == []
    (tmp_path / "run" / "checkpoint-2" / "model.safetensors").write_bytes(b"weighty")
    assert len(oracles.bad_checkpoints(*runs, steady)) == 1
    (tmp_path / "run" / "checkpoint-2" / "gvpo_checkpoint.json").unlink()  # not sealed
    assert oracles.bad_checkpoints(*runs, steady) == []


def test_orphans_losses_and_other_bytes_are_told_apart() -> None:
    found = oracles.differences({"a": "1", "b": "2"}, {"a": "0", "c": "3"}, {"a"})
    assert found == {"missing": ["c"], "orphans": ["b"], "other": ["a"]}
    assert oracles.differences({"a": "1"}, {"a": "0"}, set()) == {}


def test_a_planted_silent_corruption_is_counted() -> None:
    ended_well, refused = Outcome(0, ""), Outcome(1, "error: a.parquet")
    assert corruptions.judge(ended_well, lambda: {"other": ["x"]})[0] == "silent"
    assert corruptions.judge(ended_well, dict)[0] == "harmless"
    assert corruptions.judge(refused, lambda: pytest.fail("not asked"))[0] == "found"


def test_every_way_of_corrupting_changes_the_file(tmp_path: Path) -> None:
    ways = set()
    for number in range(120):
        files = [tmp_path / "one", tmp_path / "two"]
        files[0].write_bytes(b'{"a": 123, "b": [4, 5]}' * 3)
        files[1].write_bytes(b"another")
        before = files[0].read_bytes()
        ways.add(corruptions.corrupt(files[0], files, random.Random(number)).split()[0])
        assert not files[0].exists() or files[0].read_bytes() != before
    assert ways == {"flip", "zero", "cut", "extend", "empty", "delete", "digit", "swap"}


@pytest.mark.parametrize("how", ["read", "write", "remove", "native"])
def test_a_planted_escape_is_counted(folder: Path, tmp_path: Path, how: str) -> None:
    canary = Canary(tmp_path / "outside", b"PAR1")
    secret = tmp_path / "outside" / "secret.txt"

    def work() -> int:
        if how == "read":
            assert SECRET in secret.read_text()
        elif how == "write":
            secret.write_text("other")
        elif how == "remove":
            secret.unlink()
        else:  # not through Python's open
            import pyarrow.fs

            with pyarrow.fs.LocalFileSystem().open_input_file(str(secret)) as file:
                file.read()
        return 0

    found = run_case(work, folder, limits=QUICK)
    assert found.status == 0, found.output
    line = hostile.verdict(found, canary.touched())
    assert line["escapes"]
    assert run._is_finding("hostile", line)


def test_an_untouched_canary_is_no_escape(folder: Path, tmp_path: Path) -> None:
    canary = Canary(tmp_path / "outside", b"PAR1")
    found = run_case(lambda: Path("inside").touch(), folder, limits=QUICK)
    assert hostile.verdict(found, canary.touched())["escapes"] == []


def test_hangs_tracebacks_and_control_characters_are_seen(folder: Path) -> None:
    hung = run_case(lambda: time.sleep(60), folder, limits=Limits(seconds=0.3, memory=0))
    assert hung.hung
    crashed = run_case(lambda: 1 // 0, folder, limits=QUICK)
    assert "ZeroDivisionError" in (crashed.traceback or "")
    aborted = run_case(lambda: os.kill(os.getpid(), signal.SIGSEGV), folder, limits=QUICK)
    assert aborted.traceback == "ended by SIGSEGV"
    spoken = run_case(lambda: print("a\x1b[31mb\tc"), folder, limits=QUICK)
    assert (spoken.status, spoken.traceback, spoken.raw_controls) == (0, None, ["\x1b"])


def test_a_kill_comes_before_the_chosen_change_of_a_file(folder: Path) -> None:
    def work() -> int:
        for name in "abc":
            Path(name).write_text("x")
        return 0

    assert run_case(work, folder, limits=QUICK).changes == 3
    for name in "abc":
        (folder / name).unlink()
    killed = run_case(work, folder, limits=QUICK, kill=Kill(signal.SIGKILL, event=3))
    assert killed.status == -signal.SIGKILL
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]


def test_processes_that_outlive_a_case_are_seen_and_ended(folder: Path) -> None:
    def work() -> int:
        if os.fork() == 0:
            time.sleep(60)
        return 0

    assert run_case(work, folder, limits=QUICK).left_processes


def test_a_campaign_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "kills")
    journal.add("a", value=1)
    with journal.path.open("a") as file:
        file.write('{"case": "b", "val')  # cut off by a kill
    done: list[tuple[str, Any]] = [("a", dict), ("b", lambda: {"value": 2})]
    journal.run(done, workers=2)
    found = {line["case"]: line["value"] for line in journal.lines()}
    assert found == {"a": 1, "b": 2}


def test_the_figures_count_every_kind() -> None:
    common = {"traceback": None, "hung": True, "peak_mb": 1.0}
    killed = {**common, "killed": True, "bad_views": ["x"], "rerun_status": 0, "doctor": ""}
    killed |= {"left_processes": False, "orphans": ["y"]}
    corrupted = {**common, "verdict": "silent", "named": True}
    attacked = {**common, "escapes": ["read"], "raw_controls": ["\x1b"], "traceback": "t"}
    found = run.summary({"kills": [killed], "corruptions": [corrupted], "hostile": [attacked]})
    for name in ("kills", "bad_views", "reruns_differing", "corruptions", "silent_corruptions"):
        assert found[name] == 1, name
    for name in ("hostile", "escapes", "unexplained_tracebacks", "raw_controls"):
        assert found[name] == 1, name
    assert found["hangs"] == 3
    assert json.loads(json.dumps(found)) == found
