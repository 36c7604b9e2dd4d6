"""Errors of the operating system: one line with rule, value and remedy, and never a traceback.

Some are real (limits of open files, rights, links, names); the others are raised in the place of
the system's call, as its numbers are.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.builders import build_dataset

from gvpo_offline import cli
from gvpo_offline.cli import main
from gvpo_offline.errors import ConfigError, IntegrityError, StorageError
from gvpo_offline.files import read_text, replace_text, storage_errors
from gvpo_offline.findings.thresholds import load_thresholds
from gvpo_offline.importing.sources.inputs import find_sources
from gvpo_offline.rewards.functions import load_function
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.system_errors import untranslated_lines

NUMBERS = [
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOTDIR),
    *(errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ESTALE, errno.EIO, errno.ENOENT),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EEXIST, errno.ENXIO, errno.EBUSY),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole") / "data"
    build_dataset(root, tokenizer=None)
    return root


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


@contextlib.contextmanager
def without_rights(*paths: Path) -> Iterator[None]:
    """Take all rights to some paths, and for root, who needs none, be another user meanwhile."""
    user = os.geteuid()
    before = [(path, path.stat().st_mode) for path in paths]
    for path in paths:
        path.chmod(0)
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        if user == 0:
            os.seteuid(user)
        for path, mode in before:
            path.chmod(mode)


@pytest.fixture
def shared(whole: Path) -> Iterator[Path]:
    """A copy of the dataset in a folder that every user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        root = Path(shutil.copytree(whole, Path(folder) / "data"))
        yield root


# ---- the errors ----


@pytest.mark.parametrize("number", NUMBERS, ids=[errno.errorcode[n] for n in NUMBERS])
def test_each_number_is_an_error_of_one_line(number: int) -> None:
    with pytest.raises(StorageError) as caught, storage_errors(Path("/there/file")):
        raise OSError(number, os.strerror(number), "/there/.file.0.tmp")
    error = caught.value
    assert error.file == "/there/file"  # a temporary file is called by the name that it would get
    assert f"{os.strerror(number)} ({errno.errorcode[number]})" in str(error.received)
    assert error.remedy
    assert len(error.lines()) == 1
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_an_error_names_the_file_that_the_system_names() -> None:
    with pytest.raises(StorageError, match=r"^/there/input: "), storage_errors(Path("/out")):
        raise PermissionError(errno.EACCES, "no", "/there/input")


def test_a_library_s_own_error_passes() -> None:
    with pytest.raises(OSError, match=r"^not a Parquet file$"), storage_errors(Path("x")):
        raise OSError("not a Parquet file")


@pytest.mark.parametrize("name", ["ls", "train", "sample"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EMFILE, errno.E2BIG, None])
def test_what_nobody_translated_is_one_line_with_the_path(
    name: str,
    number: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(values: Any) -> None:
        raise OSError("a library's\nwords") if number is None else OSError(number, "no", "/a\x1b[m")

    monkeypatch.setattr(cli, "_parse", lambda *arguments: {})
    command = cli.COMMANDS[name]
    monkeypatch.setitem(cli.COMMANDS, name, type(command)("", run, ()))
    assert main([name]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"gvpo-offline {name}: error: ")
    assert (r"/a\x1b[m: " in err) == (number is not None)
    if number in (None, errno.E2BIG):
        assert "an error of the system" in err


def test_a_number_without_a_file() -> None:
    assert untranslated_lines(OSError(errno.E2BIG, "Argument list too long")) == [
        *("Argument list too long (OSError, an error of the system)",)
    ]


# ---- rights ----


def test_a_shard_without_rights_is_not_called_damaged(shared: Path) -> None:
    dataset = open_dataset(shared)
    shard = shared / dataset.manifest.groups[0].path
    with without_rights(shard), pytest.raises(StorageError, match="right to read") as caught:
        dataset.groups(0)
    assert caught.value.file == str(shard)
    assert "copy" not in str(caught.value)
    with without_rights(shard), pytest.raises(StorageError, match="right to read"):
        dataset.verify()
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(IntegrityError, match=r"[Rr]estore"):
        open_dataset(shared).verify()


def test_a_manifest_without_rights(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", str(shared)]) == 0  # imports what the command needs
    with without_rights(next(shared.glob("manifest-*.json"))):
        assert main(["ls", str(shared)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "manifest-000001.json: this process has the right" in err


def test_a_folder_without_the_right_to_write(shared: Path) -> None:
    with (
        without_rights(shared.parent),
        pytest.raises(StorageError, match="right to read what it needs and to write"),
    ):
        replace_text(shared.parent / "new.json", "text")


# ---- open files ----


def test_too_many_open_files_is_no_damage(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing can be read, or the manifest and not a shard, or everything."""
    words = ["show", str(data), "--json"]
    assert main(words) == 0
    seen = set()
    for free in (0, 1, 2, 3, 100):
        capsys.readouterr()
        with open_files_left(free):
            status = main(words)
        err = capsys.readouterr().err
        seen.add(status)
        if status:
            assert "may open as many files" in err, err
            assert "with a limit of" in err
            assert err.count("\n") == 1
    assert seen == {0, 1}


@contextlib.contextmanager
def open_files_left(number: int) -> Iterator[None]:
    """Let this process open no more than `number` further files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    handles = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                handles.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(number):
            os.close(handles.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for handle in handles:
            os.close(handle)


# ---- wrong kinds of paths ----


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """A named pipe that nobody writes to, a folder, a link to itself, and a long name."""
    places = {name: tmp_path / f"{name}.yaml" for name in ("pipe", "folder", "loop")}
    os.mkfifo(places["pipe"])
    places["folder"].mkdir()
    places["loop"].symlink_to(places["loop"])
    return {**places, "long": tmp_path / ("n" * 300), "zero": Path("/dev/zero")}


KINDS = ["pipe", "folder", "loop", "long", "zero"]


@pytest.mark.parametrize("kind", KINDS)
def test_settings_in_no_file(
    kind: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--config", str(places[kind])], [f"--config={places[kind]}"]):
        assert main(["ls", "data", *words]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ConfigError, match="thresholds is a YAML file"):
        load_thresholds(places[kind])


@pytest.mark.parametrize("kind", ["pipe", "loop", "zero"])
def test_an_input_that_is_no_file(kind: str, places: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="an input is a file"):
        find_sources([str(places[kind])])


def test_a_function_in_no_file(places: dict[str, Path]) -> None:
    pipe = places["pipe"].with_suffix(".py")
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="a named pipe, not a file"):
        load_function(f"{pipe}:reward")


@pytest.mark.parametrize("kind", KINDS)
def test_no_result_is_written_to_it(kind: str, places: dict[str, Path]) -> None:
    with pytest.raises(StorageError):
        replace_text(places[kind], "text")
    assert not list(places["pipe"].parent.glob(".*.tmp"))
    assert Path("/dev/zero").is_char_device()


def test_an_import_into_no_folder(places: dict[str, Path], tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("{}\n")
    for kind in ("pipe", "loop", "long"):
        words = ["import", "--inputs", str(log), "--output_dir", str(places[kind])]
        assert main(words) == 1
    assert not list(tmp_path.glob("**/*.tmp"))


# ---- writing of results ----


def test_a_result_is_replaced_where_a_link_leads(tmp_path: Path) -> None:
    target = tmp_path / "there" / "result.json"
    target.parent.mkdir()
    link = tmp_path / "result.json"
    link.symlink_to(target)
    replace_text(link, "one")  # the link leads to nothing yet
    replace_text(link, "two")
    assert link.is_symlink()
    assert target.read_text() == "two"


def test_streams_are_written_to(capfd: pytest.CaptureFixture[str]) -> None:
    replace_text(Path("/dev/stdout"), "text\n")
    replace_text(Path("/dev/null"), "text\n")
    assert capfd.readouterr().out == "text\n"
    assert Path("/dev/null").is_char_device()


def test_a_pipe_of_the_shell_is_read(tmp_path: Path) -> None:
    """As with --config <(…)."""
    reading, writing = os.pipe()
    os.write(writing, b"max_truncated: 0.2\n")
    os.close(writing)
    assert read_text(f"/dev/fd/{reading}") == "max_truncated: 0.2\n"
    os.close(reading)


def test_a_result_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    replace_text(path, "old")
    for number in (errno.EROFS, errno.EIO, errno.ESTALE, errno.ENFILE):

        def refuse(*arguments: Any, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(StorageError, match=errno.errorcode[number]):
                replace_text(path, "new")
        assert [own.name for own in tmp_path.iterdir()] == ["result.json"]
        assert path.read_text() == "old"


def test_what_a_killed_process_left_beside_a_result_goes_with_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "re[s]ult.json"
    left, other = (tmp_path / f".{name}.{'0' * 32}.tmp" for name in ("re[s]ult.json", "other.json"))
    left.write_text("half")
    other.write_text("half")
    replace_text(path, "whole")
    assert {own.name for own in tmp_path.iterdir()} == {path.name, other.name}
