"""Temporary files of killed writers are removed by the next one; those of live writers are not."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.builders import build_dataset

from gvpo_offline.doctor.diagnose import diagnose
from gvpo_offline.doctor.settings import DoctorConfig
from gvpo_offline.files import owned_file, remove_abandoned, replace_text
from gvpo_offline.merging.work import locked_dataset
from gvpo_offline.store.commit import create_only
from gvpo_offline.store.writer import publish

# Writes half of a file, says so, and waits in the middle of the write.
_WRITER = """
import sys
from pathlib import Path
from gvpo_offline.files import owned_file
with owned_file(Path(sys.argv[1])) as (file, temporary):
    file.write(b"half")
    file.flush()
    print(temporary.name, flush=True)
    sys.stdin.read()
"""


def _start(code: str, path: Path) -> tuple[subprocess.Popen[str], str]:
    """A process that has said its first line, and that line."""
    argv = [sys.executable, "-c", code, str(path)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def killed(tmp_path: Path) -> str:
    """The name of what a killed writer of manifest-000002.json left."""
    process, left = _start(_WRITER, tmp_path / "manifest-000002.json")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert _names(tmp_path) == [left]
    return left


def test_next_write_removes_what_a_killed_one_left(tmp_path: Path, killed: str) -> None:
    replace_text(tmp_path / "manifest-000002.json", "whole\n")
    assert _names(tmp_path) == ["manifest-000002.json"]
    assert (tmp_path / "manifest-000002.json").read_text() == "whole\n"


def test_file_of_another_name_stays(tmp_path: Path, killed: str) -> None:
    replace_text(tmp_path / "report.html", "whole\n")
    assert _names(tmp_path) == [killed, "report.html"]


def test_pattern_removes_files_of_every_version(tmp_path: Path, killed: str) -> None:
    remove_abandoned(tmp_path, "manifest-*.json")
    assert _names(tmp_path) == []


def test_file_of_a_live_writer_stays(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    process, left = _start(_WRITER, target)
    try:
        replace_text(target, "mine\n")
        assert _names(tmp_path) == [left, "report.html"]
    finally:
        process.communicate("")
    assert _names(tmp_path) == ["report.html"]  # the end of the block removes it
    assert target.read_text() == "mine\n"


def test_file_removed_before_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = fcntl.flock, []

    def late(handle: int, how: int) -> None:
        """The first lock comes after another writer's removal of what nobody has locked."""
        if not removed:
            removed.extend(_names(tmp_path))
            remove_abandoned(tmp_path, "*")
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with owned_file(tmp_path / "value") as (file, temporary):
        assert len(removed) == 1
        assert _names(tmp_path) == [temporary.name] != removed
        file.write(b"whole")
        file.flush()
        os.replace(temporary, tmp_path / "value")
    assert (tmp_path / "value").read_text() == "whole"


def test_next_version_removes_what_a_killed_publisher_left(tmp_path: Path) -> None:
    build_dataset(tmp_path, 4)
    left = tmp_path / f".manifest-000007.json.{'0' * 32}.tmp"
    left.write_text("{")
    with owned_file(tmp_path / "manifest-000008.json") as (_, live):
        publish(tmp_path, lambda newest: newest)
        assert live.exists()
    assert [name for name in _names(tmp_path) if name.endswith(".tmp")] == []


def test_compaction_that_was_killed_after_it_published_leaves_nothing(tmp_path: Path) -> None:
    """The next one has nothing to publish."""
    build_dataset(tmp_path, 4)
    left = tmp_path / f".manifest-000001.json.{'0' * 32}.tmp"
    left.write_text("{")
    with locked_dataset(tmp_path):
        assert not left.exists()


def test_doctor_leaves_the_file_of_a_live_writer(tmp_path: Path) -> None:
    build_dataset(tmp_path, 4)
    left = tmp_path / f".report.html.{'0' * 32}.tmp"
    left.write_text("<html>")
    with owned_file(tmp_path / "report.html") as (_, live):
        before = diagnose(DoctorConfig(str(tmp_path)))
        assert [own.path for own in before.findings if own.kind == "temporary"] == [left]
        diagnose(DoctorConfig(str(tmp_path), remove=True))
        assert [left.exists(), live.exists()] == [False, True]


def test_create_only_leaves_its_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "record.json"
    assert [create_only(path, "first ü"), create_only(path, "second")] == [True, False]
    assert path.read_text(encoding="utf-8") == "first ü"
    assert _names(path.parent) == ["record.json"]
