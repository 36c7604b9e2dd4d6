"""The folder of a checkpoint: created, marked, sealed, and never removed if it is foreign."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gvpo_offline.errors import ConfigError
from gvpo_offline.train.checkpoint import (
    SEAL_NAME,
    begin_checkpoint,
    find_checkpoint,
    is_sealed,
    save_errors,
    seal_checkpoint,
)


def test_what_this_package_did_not_write_is_never_removed(tmp_path: Path) -> None:
    foreign = tmp_path / "checkpoint-5"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"somebody's work")
    with pytest.raises(ConfigError, match=r"checkpoint-5.*did not write"):
        begin_checkpoint(foreign)
    assert (foreign / "model.safetensors").read_bytes() == b"somebody's work"


def test_a_seal_lists_every_file(tmp_path: Path) -> None:
    """The seal also lists files in subfolders, as sharded optimizers write them.

    `begin_checkpoint` removes an interrupted checkpoint first.
    """
    folder = tmp_path / "checkpoint-7"
    begin_checkpoint(folder)
    (folder / "half.bin").write_bytes(b"x")
    begin_checkpoint(folder)
    assert not (folder / "half.bin").exists()
    (folder / "optimizer_0").mkdir()
    (folder / "optimizer_0" / "shard.distcp").write_bytes(b"12345")
    (folder / "weights.bin").write_bytes(b"123")
    assert not is_sealed(folder)
    seal_checkpoint(folder, 7, {"data": {"seed": 1}})
    content = json.loads((folder / SEAL_NAME).read_text())
    assert content["files"] == {"optimizer_0/shard.distcp": 5, "weights.bin": 3}
    assert content["step"] == 7
    assert find_checkpoint(tmp_path, True) == folder
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-7"]


def test_an_older_checkpoint_of_the_same_step_is_removed(tmp_path: Path) -> None:
    """It is renamed first, so that a kill during removal leaves no partial checkpoint."""
    folder = tmp_path / "checkpoint-7"
    begin_checkpoint(folder)
    (folder / "weights.bin").write_bytes(b"old")
    seal_checkpoint(folder, 7, {})
    (tmp_path / ".checkpoint-5.0123.tmp").mkdir()  # left by a kill during removal
    begin_checkpoint(folder)
    assert not is_sealed(folder)
    assert not (folder / "weights.bin").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


def test_errors_other_than_a_full_disk_are_not_changed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-7"

    def save() -> None:
        with save_errors(folder):
            begin_checkpoint(folder)
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        save()
    assert sorted(tmp_path.iterdir()) == [folder]  # the file that probes for space was removed
