"""The doctor lists what killed processes left, and removes what nothing needs and nothing else."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.builders import build_dataset

from gvpo_offline.cli import main
from gvpo_offline.store.leftovers import stages_at_work

HEX = "0123456789abcdef" * 2


def files(root: Path) -> dict[str, bytes]:
    """Every file of a folder, by relative path."""
    found = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def diagnosis(capsys: pytest.CaptureFixture[str], root: Path, *words: str) -> tuple[int, Any]:
    """Exit status and JSON object of the doctor."""
    capsys.readouterr()
    status = main(["doctor", str(root), "--format", "json", *words])
    out = capsys.readouterr()
    assert not out.err, out.err
    return status, json.loads(out.out)


def put(path: Path, content: bytes = b"left over") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def leave(root: Path) -> set[str]:
    """Leave in a dataset what kills leave; returns the relative paths."""
    put(root / f"rewards/reward/.{HEX[:16]}.{HEX}.tmp")
    put(root / f"commits/import/.00007.json.{HEX}.tmp")
    put(root / f".manifest-000002.json.{HEX}.tmp")
    put(root / f"rewards/reward/{HEX[:16]}-{HEX[:12]}.parquet")
    put(root / ".spill/abc/00000.arrows")
    return {
        f"rewards/reward/.{HEX[:16]}.{HEX}.tmp",
        f"commits/import/.00007.json.{HEX}.tmp",
        f".manifest-000002.json.{HEX}.tmp",
        f"rewards/reward/{HEX[:16]}-{HEX[:12]}.parquet",
        ".spill",
    }


@contextmanager
def locked(folder: Path, how: int) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, how)
    yield
    os.close(handle)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of three shards with a reward and a reference."""
    root = tmp_path_factory.mktemp("whole") / "data"
    build_dataset(root)
    return root


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "my data"))


def test_a_dataset_without_leftovers(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(data)
    assert diagnosis(capsys, data, "--remove") == (
        *(0,),
        {"path": str(data), "of": "dataset", "busy": False, "findings": [], "removed": []},
    )
    assert files(data) == before
    assert main(["doctor", str(data)]) == 0
    assert capsys.readouterr().out == f"{data}: dataset, nothing is left over\n"


def test_leftovers_are_listed_and_removed_on_request_alone(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(data)
    left = leave(data)
    (data / "notes.txt").write_text("of a person")
    with_leftovers = files(data)
    status, found = diagnosis(capsys, data)
    assert status == 0
    assert {own["path"] for own in found["findings"]} == left
    assert all(own["removable"] for own in found["findings"])
    assert files(data) == with_leftovers
    assert main(["doctor", str(data)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{data}: dataset, 5 findings"
    assert lines[-1] == f"next: gvpo-offline doctor '{data}' --remove"
    status, found = diagnosis(capsys, data, "--remove")
    assert (status, found["findings"]) == (0, [])
    assert {own["path"] for own in found["removed"]} == left
    assert files(data) == {**before, "notes.txt": b"of a person"}


@pytest.mark.parametrize("where", [".", "commits"])
def test_nothing_is_removed_while_a_process_works_there(
    where: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(data)
    before = files(data)
    with locked(data / where, fcntl.LOCK_SH if where == "commits" else fcntl.LOCK_EX):
        _, found = diagnosis(capsys, data)
        assert found["busy"]
        assert main(["doctor", str(data), "--remove"]) == 1
        assert "while a process works" in capsys.readouterr().err
    assert files(data) == before
    assert not diagnosis(capsys, data)[1]["busy"]


def test_a_broken_record_goes_and_so_does_what_it_alone_named(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The orphan is told only once it is known what all records name."""
    before = files(data)
    put(data / f"rewards/reward/{HEX[:16]}-{HEX[:12]}.parquet")
    put(data / "commits/reward-x/0.json", b"{")
    status, found = diagnosis(capsys, data)
    assert (status, [own["kind"] for own in found["findings"]]) == (0, ["record"])
    status, found = diagnosis(capsys, data, "--remove")
    assert [own["kind"] for own in found["removed"]] == ["record", "orphan"]
    assert files(data) == before


def test_a_record_of_a_missing_file_or_under_another_name_is_broken(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = sorted((data / "commits/import").glob("*.json"))
    shutil.copy(records[0], data / "commits/import/00009.json")
    _, found = diagnosis(capsys, data)
    (own,) = found["findings"]
    assert (own["kind"], own["path"]) == ("record", "commits/import/00009.json")
    assert "received a record of task 00000 of stage import. Its task" in own["why"]


def test_damage_is_listed_never_removed_and_fails(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = next((data / "groups").glob("*.parquet"))
    victim.unlink()
    shutil.rmtree(data / "commits")
    status, found = diagnosis(capsys, data, "--remove")
    assert (status, found["removed"]) == (1, [])
    assert [own["kind"] for own in found["findings"]] == ["missing"]
    manifest = next(data.glob("manifest-*.json"))
    manifest.write_text(manifest.read_text()[:-20])
    put(data / f"rewards/reward/{HEX[:16]}-{HEX[:12]}.parquet")  # perhaps named by the manifest
    before = files(data)
    status, found = diagnosis(capsys, data, "--remove")
    assert (status, found["removed"]) == (1, [])
    assert [own["kind"] for own in found["findings"]] == ["manifest"]
    assert files(data) == before


def test_committed_work_that_is_not_published_is_kept(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for manifest in data.glob("manifest-*.json"):
        manifest.unlink()
    shutil.rmtree(data / "reference")
    before = files(data)
    status, found = diagnosis(capsys, data, "--remove")
    assert (status, found["removed"]) == (0, [])
    (own,) = found["findings"]
    assert (own["kind"], own["path"]) == ("unfinished", "commits/import")
    assert own["why"].startswith("3 committed tasks")
    assert files(data) == before


def test_the_checkpoints_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    seal = {"step": 2, "resumable": True, "identity": {}, "files": {"w": 1}, "lines": {}}
    put(run / "checkpoint-2/w", b"x")
    put(run / "checkpoint-2/gvpo_checkpoint.json", json.dumps(seal).encode())
    put(run / "checkpoint-4/gvpo_checkpoint_begun")
    put(run / "checkpoint-4/w", b"half")
    put(run / "checkpoint-6/model.bin", b"of another program")
    put(run / f".checkpoint-1.{HEX}.tmp/w")
    put(run / f".gvpo_run.json.{HEX}.tmp")
    put(run / "tune/policies/0.tmp")
    put(run / "metrics.jsonl", b"")
    status, found = diagnosis(capsys, run)
    left = ["checkpoint-4", f".checkpoint-1.{HEX}.tmp", f".gvpo_run.json.{HEX}.tmp"]
    left.append("tune/policies/0.tmp")
    assert (status, sorted(own["path"] for own in found["findings"])) == (0, sorted(left))
    with locked(run, fcntl.LOCK_EX):
        assert main(["doctor", str(run), "--remove"]) == 1
    status, found = diagnosis(capsys, run, "--remove")
    assert (status, sorted(own["path"] for own in found["removed"])) == (0, sorted(left))
    assert sorted(files(run)) == [
        "checkpoint-2/gvpo_checkpoint.json",
        *("checkpoint-2/w", "checkpoint-6/model.bin", "metrics.jsonl"),
    ]


def test_neither_a_dataset_nor_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "none"):
        assert main(["doctor", str(path), "--remove"]) == 1
        assert "the folder of a dataset or of a run" in capsys.readouterr().err


# ---- what the next run of a stage removes by itself ----


def test_a_stage_removes_what_killed_ones_left(data: Path) -> None:
    before = files(data)
    leave(data)
    with stages_at_work(data):
        # Spilled rows are those of an import or merge, which removes them itself.
        assert files(data) == {**before, ".spill/abc/00000.arrows": b"left over"}


def test_a_stage_removes_nothing_while_another_one_runs(data: Path) -> None:
    leave(data)
    before = files(data)
    with locked(data / "commits", fcntl.LOCK_SH), stages_at_work(data):
        assert files(data) == before


def test_a_stage_leaves_the_files_of_a_merge_that_runs(data: Path) -> None:
    """Which holds the lock of the folder: its shards are in no record yet."""
    leave(data)
    merging = put(data / f"rewards/reward/.rewrite-00000.{HEX}.tmp")
    shard = put(data / f"groups/rewrite-00000-{HEX[:12]}.parquet")
    with locked(data, fcntl.LOCK_EX), stages_at_work(data):
        assert merging.exists()
        assert shard.exists()
        assert (data / f".manifest-000002.json.{HEX}.tmp").exists()
        assert not (data / f"rewards/reward/.{HEX[:16]}.{HEX}.tmp").exists()


def test_the_lock_ends_with_the_stage_and_leaves_no_folder(tmp_path: Path) -> None:
    with stages_at_work(tmp_path):
        assert (tmp_path / "commits").is_dir()
    assert list(tmp_path.iterdir()) == []
