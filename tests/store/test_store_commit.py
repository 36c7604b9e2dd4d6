"""Files that are whole or absent: races, SIGKILL at random moments, and what is left behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import store_storm
from support.builders import build_dataset, make_groups

from gvpo_offline import files
from gvpo_offline.errors import IntegrityError, StorageError
from gvpo_offline.files import storage_errors
from gvpo_offline.store import commit
from gvpo_offline.store.commit import TaskLog, TaskRecord, create_only, write_hashed
from gvpo_offline.store.manifest import Manifest, load_manifest, manifest_versions
from gvpo_offline.store.validate import validate
from gvpo_offline.store.writer import publish, write_groups

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: more kills a second, and the same renames and links.

    SIGKILL leaves the page cache alone, so fsync makes no difference to these tests.
    """
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def run_storm(mode: str, folder: Path, amount: float, seed: int = 0) -> dict[str, Any]:
    command = [sys.executable, str(SUPPORT / "store_storm.py"), mode, str(folder), str(amount)]
    paths = os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT.parent)])
    done = subprocess.run(
        [*command, str(seed)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# ---- killed writers ----


def test_no_reader_ever_sees_a_half_written_dataset(quick_folder: Path) -> None:
    """Two writers at a time, SIGKILLed at random moments; then the same dataset after all."""
    result = run_storm("storm", quick_folder / "storm", 10.0)
    print(result)
    assert result["kills"] >= 20
    assert result["views"] >= 20
    assert result["bad"] == 0, result["said"]

    undisturbed = quick_folder / "undisturbed"
    store_storm.write_dataset(undisturbed)
    wanted = load_manifest(undisturbed)
    for root in store_storm.roots(quick_folder / "storm"):
        store_storm.write_dataset(root)
        found = load_manifest(root)
        assert found.groups == wanted.groups
        assert found.rewards == wanted.rewards
        assert validate(root, lambda numbers, label: numbers).survey.n_groups == 72
        # Nothing lies there but what the manifest names, and temporary files that say so.
        named = {entry.path for entry in found.groups}
        named |= {sidecar.file.path for sidecar in found.rewards[0].files}
        present = {str(p.relative_to(root)) for p in root.rglob("*") if p.suffix == ".parquet"}
        assert present == named


def test_the_reader_of_these_tests_sees_half_written_files(quick_folder: Path) -> None:
    """The control: shards written straight to their names are seen broken under the same kills."""
    result = run_storm("naive", quick_folder / "naive", 2.0)
    print(result)
    assert result["bad"] > 0


# ---- races ----


def test_of_two_attempts_at_a_task_one_wins_for_both(quick_folder: Path) -> None:
    """Attempts with different tokens: both processes end with the winner's files, 15 times."""
    result = run_storm("race", quick_folder, 15)
    print(result)
    assert result["agreed"] == 15
    assert result["winners"] == [1] * 15


def test_publishing_at_once_loses_nothing(quick_folder: Path) -> None:
    """3 processes publish 10 samplers each: 30 versions, and the newest names all 30."""
    result = run_storm("publish", quick_folder / "data", 10)
    assert result["versions"] == list(range(1, 31))
    assert result["samplers"] == sorted(f"{who}-{n}" for who in range(3) for n in range(10))


def test_a_publication_in_between_is_built_upon(tmp_path: Path) -> None:
    """Another process publishes after the manifest was read and before it is written."""
    build_dataset(tmp_path, 4)
    seen: list[int] = []

    def build(newest: Manifest | None) -> Manifest:
        assert newest is not None
        seen.append(newest.version)
        if len(seen) == 1:
            other = newest.model_copy(update={"samplers": {**newest.samplers, "other": {}}})
            publish(tmp_path, lambda _: other)
        return newest.model_copy(update={"samplers": {**newest.samplers, "mine": {}}})

    manifest = publish(tmp_path, build)
    assert seen == [1, 2]
    assert manifest.version == 3
    assert {"mine", "other"} <= set(load_manifest(tmp_path).samplers)


# ---- the pieces ----


def test_create_only_creates_once(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "record.json"
    assert create_only(path, "first")
    assert not create_only(path, "second")
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_system_without_hard_links_is_refused_clearly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(StorageError, match="file system with hard links") as caught:
        create_only(tmp_path / "record.json", "content")
    assert caught.value.file == str(tmp_path / "record.json")
    assert list(tmp_path.iterdir()) == []


def test_a_file_gets_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    def fail_midway(path: Path) -> None:
        path.write_bytes(b"half")
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        assert path.name.startswith(".")
        raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        write_hashed(tmp_path, "shard", ".bin", fail_midway)
    assert list(tmp_path.iterdir()) == []
    path, digest = write_hashed(tmp_path, "shard", ".bin", lambda p: p.write_bytes(b"whole"))
    assert path.name == f"shard-{digest[:12]}.bin"
    assert path.read_bytes() == b"whole"


def test_new_folders_are_made_durable_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is durable only if every new folder above it is: each parent's entry is flushed."""
    flushed: list[Path] = []
    for module in (files, commit):
        monkeypatch.setattr(module, "fsync_folder", flushed.append)
    write_hashed(tmp_path / "a" / "b", "shard", ".bin", lambda p: p.write_bytes(b"x"))
    assert set(flushed) == {tmp_path, tmp_path / "a", tmp_path / "a" / "b"}
    flushed.clear()
    write_hashed(tmp_path / "a" / "b", "shard", ".bin", lambda p: p.write_bytes(b"y"))
    assert flushed == [tmp_path / "a" / "b"]
    flushed.clear()
    create_only(tmp_path / "c" / "d" / "record.json", "content")
    assert set(flushed) == {tmp_path, tmp_path / "c", tmp_path / "c" / "d"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_is_told_from_other_failures(number: int) -> None:
    with pytest.raises(StorageError, match="room on the disk") as caught, storage_errors(Path("x")):
        raise OSError(number, os.strerror(number))
    assert caught.value.file == "x"
    with pytest.raises(StorageError, match="the right to read"), storage_errors(Path("x")):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(OSError, match="no number"), storage_errors(Path("x")):
        raise OSError("no number")


# ---- commit records ----


def committed(root: Path) -> tuple[TaskLog, TaskRecord]:
    log = TaskLog(root, "import")
    record = write_groups(root, "import", "t", make_groups(5), reward="reward")
    return log, log.commit(record)


def test_a_commit_is_found_again(tmp_path: Path) -> None:
    log, record = committed(tmp_path)
    assert log.committed("t") == record
    assert log.committed("u") is None
    assert TaskLog(tmp_path, "reference").committed("t") is None


def test_a_commit_whose_files_were_damaged_is_an_error(tmp_path: Path) -> None:
    """Neither taken over nor quietly done again: somebody should know that the disk is failing."""
    log, record = committed(tmp_path)
    for entry in (record.groups[0], record.sidecars[0].file):
        path = tmp_path / entry.path
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(IntegrityError) as caught:
            log.committed("t")
        assert caught.value.file == str(path)
        path.unlink()
        with pytest.raises(IntegrityError):
            log.committed("t")
        path.write_bytes(content)
    assert log.committed("t") == record


def test_a_second_attempt_at_a_damaged_commit_says_so(tmp_path: Path) -> None:
    log, record = committed(tmp_path)
    (tmp_path / record.sidecars[0].file.path).write_bytes(b"")
    with pytest.raises(IntegrityError):
        log.commit(record)


def test_versions_without_a_folder(tmp_path: Path) -> None:
    assert manifest_versions(tmp_path / "nowhere") == []
