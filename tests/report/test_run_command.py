"""`gvpo-offline report`: which pages it makes, and what it writes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from support.builders import build_dataset
from support.made_run import HOSTILE, append, event, make_run, training_line

from gvpo_offline.cli import main
from gvpo_offline.commands.report import kind_of
from gvpo_offline.report.run.watch import WatchedRuns

pytest.importorskip("jinja2")
pytest.importorskip("vl_convert")


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_becomes_one_html_file_and_its_json_twin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "runs" / "first")
    assert main(["report", "runs/first"]) == 0
    said = capsys.readouterr().out.splitlines()
    html = (tmp_path / "first-report.html").read_text()
    twin = json.loads((tmp_path / "first-report.json").read_text())
    assert html.startswith("<!DOCTYPE html>")
    assert (twin["kind"], twin["runs"][0]["name"]) == ("runs", "first")
    size = (tmp_path / "first-report.html").stat().st_size / 1e6
    assert said == [
        f"first-report.html: {size:.1f} MB; the same as JSON: first-report.json",
        "next: open first-report.html in a browser",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {
        *("runs", "first-report.html", "first-report.json")
    }, "no temporary file stays"


def test_a_run_that_is_not_finished_has_the_live_page_as_its_next_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "my run", finished=False)
    assert main(["report", "my run"]) == 0
    assert (tmp_path / "my-run-report.html").is_file()
    assert capsys.readouterr().out.splitlines()[1] == (
        "next: open my-run-report.html in a browser; while a run trains: "
        "gvpo-offline report 'my run' --live"
    )


def test_several_runs_and_another_output(tmp_path: Path) -> None:
    make_run(tmp_path / "one"), make_run(tmp_path / "two")
    assert main(["report", "one", "two"]) == 0
    assert (tmp_path / "runs-report.html").is_file()
    assert main(["report", "one", "--output", "page.html"]) == 0
    assert json.loads((tmp_path / "page.json").read_text())["runs"][0]["name"] == "one"


def test_only_a_report_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run")
    assert main(["report", "run"]) == 0
    before = (tmp_path / "run-report.html").read_text()
    append(tmp_path / "run", "metrics.jsonl", [training_line(11, 0.5, 0.5)])
    assert main(["report", "run"]) == 0
    assert (tmp_path / "run-report.html").read_text() != before
    for name in ("run-report.html", "run-report.json"):
        kept = (tmp_path / name).read_text()
        (tmp_path / name).write_text("mine")
        assert main(["report", "run"]) == 1
        assert f"{name}: a report replaces only a report" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).write_text(kept)


def test_the_page_of_a_dataset_is_replaced_and_names_what_the_dataset_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next command of a dataset without a reference is not `train`."""
    build_dataset(tmp_path / "data", 4, reference=False)
    for _ in range(2):
        assert main(["report", "data"]) == 0
        assert capsys.readouterr().out.splitlines()[-2:] == [
            "open data-report.html in a browser",
            "next: gvpo-offline reference --dataset data --model_name_or_path MODEL",
        ]
    twin = json.loads((tmp_path / "data-report.json").read_text())
    assert (twin["made_by"], twin["kind"]) == ("gvpo-offline report", "dataset")


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    assert main(["report", "run"]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("run-report.*")}
    assert main(["report", "run"]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob("run-report.*")} == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report"], "paths must be set"),
        (["report", "none"], "no such file or folder. Name a folder that"),
        (["report", "empty"], "a folder that holds neither"),
        (["report", "run", "data"], "a report is of one dataset, or of any number of runs"),
        (["report", "data", "--live"], "live shows runs"),
        (["report", "run", "--beta", "0.3"], "beta is a setting of a report of a dataset"),
        (["report", "run", "--output", "x"], "Output ends in .html|output ends in .html"),
        (["report", "run", "--output", "no/x.html"], "mkdir -p no"),
        (["report", "run", "--live", "--output", "x.html"], "a live page is served"),
        (["report", "run", "--live", "--port", "99999"], "port lies in 0"),
    ],
)
def test_what_cannot_work_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    make_run(tmp_path / "run"), build_dataset(tmp_path / "data", 4), (tmp_path / "empty").mkdir()
    assert main(arguments) == 1
    assert re.search(said, capsys.readouterr().err)
    assert not list(tmp_path.glob("*report*"))


def test_datasets_are_told_from_runs(tmp_path: Path) -> None:
    make_run(tmp_path / "run"), build_dataset(tmp_path / "data", 4)
    assert kind_of([str(tmp_path / "run")]) == "runs"
    assert kind_of([str(tmp_path / "data")]) == "dataset"
    assert kind_of(["s3://bucket/data"]) == "dataset"


def test_hostile_texts_are_no_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", model=HOSTILE)
    append(run, "events.jsonl", [event(11, "warning", text=HOSTILE)])
    assert main(["report", "run"]) == 0
    html = (tmp_path / "run-report.html").read_text()
    assert "document.title" in html
    assert "<script>document" not in html
    assert "\x1b" not in html


# ---- live ----


def test_the_page_is_made_again_only_when_a_file_has_changed(tmp_path: Path) -> None:
    """Also where the change is half a line: the page is then equal to the one before."""
    run = make_run(tmp_path / "run", finished=False)
    make = WatchedRuns([run])
    first = make()
    assert make() is first
    assert make.n_made == 1
    (run / "model.safetensors").write_bytes(b"not shown")
    assert make() is first
    path = run / "metrics.jsonl"
    changed = path.stat().st_mtime_ns
    with path.open("a") as file:
        file.write(json.dumps(training_line(11, 0.25, 0.5))[:20])
    os.utime(path, ns=(changed, changed))  # the page says when the files changed, in seconds
    half = make()
    assert make.n_made == 2
    assert [own.blocks for own in half.sections] == [own.blocks for own in first.sections]
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(training_line(11, 0.25, 0.5))[20:] + "\n")
    assert make().sections != first.sections
    assert make.n_made == 3


def test_a_file_that_is_damaged_for_a_while_is_an_error_until_it_is_whole(tmp_path: Path) -> None:
    from gvpo_offline.errors import IntegrityError

    run = make_run(tmp_path / "run")
    make = WatchedRuns([run])
    before = make()
    text = (run / "gvpo_run.json").read_text()
    (run / "gvpo_run.json").write_text(text[:50])
    for _ in range(2):
        with pytest.raises(IntegrityError):
            make()
    assert make.n_made == 2
    (run / "gvpo_run.json").write_text(text)
    assert make().sections == before.sections


def test_a_live_page_follows_a_run_that_writes_and_ends_with_a_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    process = subprocess.Popen(
        [sys.executable, "-m", "gvpo_offline.cli", "report", str(run), "--live"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    guard = threading.Timer(300, process.kill)
    guard.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.match(r"(http://127\.0\.0\.1:\d+/) shows .*run as the files change", line)
        assert found, line + (process.stderr.read() if process.poll() is not None else "")
        wanted = "0.01562 at step 64"  # in the summary of the chart of losses
        assert wanted not in _get(found[1])
        append(run, "metrics.jsonl", [training_line(64, 1 / 64, 0.5)])
        while wanted not in _get(found[1]):
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate()
        assert (process.returncode, rest, errors) == (0, "ended\n", "")
    finally:
        guard.cancel()
        process.kill()
        process.wait()
    assert not list(tmp_path.glob("*.html"))


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return str(answer.read().decode())
