"""Reading the files of a run's folder."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gvpo_offline
from gvpo_offline.errors import DataError, IntegrityError
from gvpo_offline.train.run_folder import (
    EVENTS_FILE,
    METRICS_FILE,
    RESIDUALS_FILE,
    RUN_FILE,
    SAMPLES_FILE,
    is_run,
    read_events,
    read_lines,
    read_metrics,
    read_residuals,
    read_samples,
    read_settings,
)

BEFORE = Path(__file__).parents[1] / "data" / "before" / "run"


def write(folder: Path, name: str, *lines: Any, end: str = "\n") -> Path:
    """Write the lines: texts as they are, other values as JSON."""
    folder.mkdir(exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / name).write_text("\n".join(texts) + end, encoding="utf-8")
    return folder


def test_train_and_held_out_lines_of_a_step_are_one_row(tmp_path: Path) -> None:
    run = write(
        tmp_path / "run",
        METRICS_FILE,
        {"step": 5, "epoch": 0.5, "loss": 2.0, "learning_rate": 0.1},
        {"step": 5, "epoch": 0.5, "eval_loss": 3.0},
        {"step": 10, "epoch": 1.0, "loss": None, "learning_rate": 0.0},
        {"step": 10, "epoch": 1.0, "train_runtime": 7},
    )
    found = gvpo_offline.read_metrics(run)
    assert found.columns == [
        *("step", "epoch", "loss", "learning_rate", "eval_loss", "train_runtime")
    ]
    assert found["step"].to_list() == [5, 10]
    assert found["step"].dtype == pl.Int64
    assert found["eval_loss"].to_list() == [3.0, None]
    assert found["train_runtime"].dtype == pl.Int64
    loss = found["loss"].to_list()
    assert loss[0] == 2.0
    assert math.isnan(loss[1]), "logged, and not finite"


def test_a_later_line_of_a_step_counts_and_rows_ascend(tmp_path: Path) -> None:
    run = write(
        tmp_path / "run",
        METRICS_FILE,
        {"step": 4, "a": 1.5},
        {"step": 2, "a": 0.5},
        {"step": 4, "a": 2.5},
    )
    assert read_metrics(run).rows() == [(2, None, 0.5), (4, None, 2.5)]
    assert [line["a"] for line in read_lines(run)] == [1.5, 0.5, 2.5]


def test_texts_flags_and_huge_numbers_have_columns(tmp_path: Path) -> None:
    run = write(
        tmp_path / "run",
        METRICS_FILE,
        {"step": 1, "note": "<b>", "mixed": 1, "flag": True, "big": 2**70, "none": None},
        {"step": 2, "mixed": "x", "flag": False, "big": 1},
    )
    found = read_metrics(run)
    assert found["note"].to_list() == ["<b>", None]
    assert found["mixed"].to_list() == ["1", "x"]
    assert found["flag"].to_list() == [True, False]
    assert found["big"].to_list() == [2.0**70, 1.0]
    assert found["none"].is_nan().to_list() == [True, None]


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(min_value=0, max_value=10_000), text=st.text(max_size=6))
def test_every_cut_of_the_file_gives_the_lines_that_are_whole(cut: int, text: str) -> None:
    """A kill leaves any number of bytes: each whole line is read, and nothing else."""
    import tempfile

    lines = [{"step": n, "loss": n / 3, "note": text} for n in range(4)]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    kept = content[: cut % (len(content) + 1)]
    whole = kept.count(b"\n")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / METRICS_FILE).write_bytes(kept)
        found = read_lines(folder)
    # A line whose end of line alone is missing is whole too.
    assert found in (lines[:whole], lines[: whole + 1])
    if found == lines[: whole + 1] and whole < len(lines):
        assert kept.endswith(b"}")


@pytest.mark.parametrize(
    ("line", "received"),
    [
        ('{"step": 2, "lo', "JSONDecodeError"),
        ("[1]", "a list"),
        ('{"loss": 1}', "step None"),
        ('{"step": -1}', "step -1"),
        ('{"step": true}', "step True"),
        ('{"step": 1.5}', "step 1.5"),
    ],
)
def test_a_broken_line_that_is_not_the_last_names_file_and_line(
    tmp_path: Path, line: str, received: str
) -> None:
    run = write(tmp_path / "run", METRICS_FILE, {"step": 1}, line, {"step": 3})
    with pytest.raises(IntegrityError) as caught:
        read_metrics(run)
    assert str(run / METRICS_FILE) in str(caught.value)
    assert "in line 2" in str(caught.value)
    assert received in str(caught.value)


def test_a_broken_last_line_that_has_an_end_is_an_error(tmp_path: Path) -> None:
    run = write(tmp_path / "run", METRICS_FILE, {"step": 1}, '{"step": 2,')
    with pytest.raises(IntegrityError, match="in line 2"):
        read_metrics(run)
    write(run, METRICS_FILE, {"step": 1}, '{"step": 2,', end="")
    assert read_metrics(run)["step"].to_list() == [1]


def test_bytes_that_are_not_utf8_are_an_error(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_bytes(b'{"step": 1, "note": "\xff"}\n')
    with pytest.raises(IntegrityError, match="in line 1: UnicodeDecodeError"):
        read_metrics(tmp_path)


def test_a_run_of_an_earlier_version_is_read_from_its_checkpoint(tmp_path: Path) -> None:
    run = shutil.copytree(BEFORE, tmp_path / "run")
    state = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())
    expected = [line["step"] for line in state["log_history"]]
    assert expected, "the fixture has a history"
    found = read_metrics(run)
    assert found["step"].to_list() == sorted(set(expected))
    assert found["loss"].to_list() == [
        line["loss"] for line in state["log_history"] if "loss" in line
    ]
    assert read_settings(run)["training"]["beta"]


def test_a_run_before_its_first_line_has_no_rows(tmp_path: Path) -> None:
    run = write(tmp_path / "run", RUN_FILE, {"training": {}})
    found = read_metrics(run)
    assert found.shape == (0, 1)
    assert found.schema == {"step": pl.Int64}
    assert read_events(run) == read_samples(run) == read_residuals(run) == []
    assert read_settings(run) == {"training": {}}


def test_what_is_no_run_is_refused_with_a_remedy(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", write(tmp_path / "f", "x.txt", "") / "x.txt"):
        assert not is_run(path)
        with pytest.raises(DataError, match=r"name the output_dir of a run|Name the output_dir"):
            read_metrics(path)


def test_events_samples_and_residuals_are_their_lines(tmp_path: Path) -> None:
    events = [{"time": "2026-01-01T00:00:00Z", "step": 0, "kind": "start"}]
    samples = [{"step": 5, "text": "a"}, {"step": 5, "text": "b"}]
    residuals = [{"step": 5, "group_id": "g", "residuals": [1.0, -1.0]}]
    run = write(tmp_path / "run", EVENTS_FILE, *events)
    write(run, SAMPLES_FILE, *samples, '{"step": 5, "te', end="")
    write(run, RESIDUALS_FILE, *residuals)
    assert read_events(run) == events
    assert read_samples(run) == samples
    assert read_residuals(run) == residuals
    write(run, EVENTS_FILE, {"step": 1})
    with pytest.raises(IntegrityError, match="in line 1: kind None"):
        read_events(run)


def test_a_run_file_that_is_not_an_object_is_an_error(tmp_path: Path) -> None:
    for text in ("[]", "{", "\udcff".encode("utf-8", "surrogateescape").decode("latin-1")):
        (tmp_path / RUN_FILE).write_text(text, encoding="latin-1")
        with pytest.raises(IntegrityError, match=RUN_FILE):
            read_settings(tmp_path)


def test_reading_metrics_loads_no_torch(tmp_path: Path) -> None:
    run = write(tmp_path / "run", METRICS_FILE, {"step": 1, "loss": 1.0})
    script = (
        f"import sys, gvpo_offline; print(gvpo_offline.read_metrics({str(run)!r}).rows()); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[(1, None, 1.0)]\n"), done.stderr
