"""The doctor reads the files of complete checkpoints and names those that are not as saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gvpo_offline.doctor.run import run_findings
from gvpo_offline.train.checkpoint import begin_checkpoint, seal_checkpoint
from gvpo_offline.train.checkpoint_files import SEAL, seal_text


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "optimizer.pt").read_bytes())
    content[5] ^= 1
    (folder / "optimizer.pt").write_bytes(bytes(content))


def cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weigh")


def lose(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def add(folder: Path) -> None:
    (folder / "scheduler.pt").write_bytes(b"of another step")


def edit_the_seal(folder: Path) -> None:
    text = (folder / SEAL).read_text()
    assert '"step": 2' in text
    (folder / SEAL).write_text(text.replace('"step": 2', '"step": 3'))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (flip_a_bit, "optimizer.pt"),
        (cut, "model.safetensors"),
        (lose, "model.safetensors"),
        (add, "scheduler.pt"),
        (edit_the_seal, SEAL),
    ],
)
def test_damage_is_found_and_nothing_removed(
    tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    """Of two checkpoints one is damaged; the other one is not mentioned."""
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        begin_checkpoint(folder)
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "optimizer.pt").write_bytes(b"moments")
        seal_checkpoint(folder, step, {})
    assert run_findings(tmp_path) == []
    damage(tmp_path / "checkpoint-2")
    (found,) = run_findings(tmp_path)
    assert (found.kind, found.path.name, found.removable) == ("checkpoint", "checkpoint-2", False)
    assert f"damaged or missing: {named}." in found.why


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../b", "", "./a", "a//b"])
def test_a_seal_names_files_of_its_folder_alone(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoint-2"
    begin_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(b"weights")
    seal_checkpoint(folder, 2, {})
    content = json.loads((folder / SEAL).read_text())
    del content["seal_sha256"]
    content["files"] = {name: 7}
    (folder / SEAL).write_text(seal_text(content))
    (found,) = run_findings(tmp_path)
    assert SEAL in found.why
