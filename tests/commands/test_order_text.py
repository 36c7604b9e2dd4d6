"""What `order` says where names are hostile, or a run file has relative paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gvpo_offline.cli import main
from gvpo_offline.commands.order_text import step_lines

BEFORE = Path(__file__).parents[1] / "data" / "before"


def test_columns_stay_aligned_where_names_hold_control_characters() -> None:
    names = ["two", "<b>\x1b[31m", "line\nbreak\ttab"]
    groups: list[dict[str, Any]] = [
        {"draw": n, "dataset": name, "group_id": "g", "epoch": 1, "file": "f", "row": 0}
        for n, name in enumerate(names)
    ]
    lines = step_lines({"step": 1, "steps": 1, "groups": groups, "ranks": None})
    table = lines[-4:]
    assert "\\x1b[31m" in table[2]
    assert all(own.isprintable() for own in table)
    assert len({own.rindex(" f ") for own in table[1:]}) == 1


def test_a_relative_path_says_where_to_run_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run files of earlier versions have the paths as they were given."""
    monkeypatch.chdir(tmp_path)
    assert main(["order", str(BEFORE / "run"), "--step", "1"]) == 1
    assert "in the folder in which `gvpo-offline train` ran" in capsys.readouterr().err
    monkeypatch.chdir(BEFORE)
    assert main(["order", "run", "--step", "1", "--json", "true"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"]
