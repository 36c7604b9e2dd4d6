"""Commands that messages and hints name can be pasted into a shell, whatever a path holds."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from support.builders import build_dataset
from support.made_run import make_run

from gvpo_offline.cli import main
from gvpo_offline.commands.report import output_path
from gvpo_offline.commands.settings import ReportConfig
from gvpo_offline.commands.show.made import made_lines
from gvpo_offline.errors import ConfigError

NAME = "it's $HOME; `x` & more"


def test_the_hints_of_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / NAME, finished=False)
    page = tmp_path / f"{NAME}.html"
    assert main(["report", str(run), "--output", str(page)]) == 0
    hint = capsys.readouterr().out.splitlines()[-1]
    opened, _, command = hint.partition("; while a run trains: ")
    assert shlex.split(opened) == ["next:", "open", str(page), "in", "a", "browser"]
    assert shlex.split(command) == ["gvpo-offline", "report", str(run), "--live"]


def test_the_hint_of_a_dataset_s_first_group(tmp_path: Path) -> None:
    root = tmp_path / NAME
    build_dataset(root)
    (line,) = [own for own in made_lines(root) if "prints more" in own]
    command = line.partition("(")[2].partition(" prints more")[0]
    assert shlex.split(command) == ["gvpo-offline", "show", str(root)]


def test_the_remedies_of_a_report(tmp_path: Path) -> None:
    folder = tmp_path / NAME
    with pytest.raises(ConfigError) as caught:
        output_path(ReportConfig(paths=["run"], output=str(folder / "page.html")), "runs")
    assert shlex.split(str(caught.value.remedy).removeprefix("make it: ")) == [
        *("mkdir", "-p", str(folder))
    ]
    with pytest.raises(ConfigError) as caught:
        ReportConfig(paths=["run"], output=NAME)
    assert shlex.split(str(caught.value.remedy)) == ["--output", f"{NAME}.html"]


def test_the_hint_of_the_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / NAME
    build_dataset(root)
    (root / f".manifest-000002.json.{'0' * 32}.tmp").write_text("half")
    assert main(["doctor", str(root)]) == 0
    hint = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(hint) == ["next:", "gvpo-offline", "doctor", str(root), "--remove"]
