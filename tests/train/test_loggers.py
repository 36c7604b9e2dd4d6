"""`report_to`: names that group, tables of answers, and packages that are missing."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.sampled_answers import EXACT, word_dataset
from support.training import config_of, trainer_of
from transformers.integrations import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
)

from gvpo_offline.errors import ConfigError
from gvpo_offline.sampled_eval.shown import COLUMNS, ShownAnswer
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.record.loggers import EXTRAS, GroupingTensorBoard, grouped_name
from gvpo_offline.train.record.tables import log_table

ANSWERS = [ShownAnswer("p", "a", 0.5, "b", 1.0), ShownAnswer("q", "c", 0.25, "d", 0.75)]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GroupDataset]:
    return word_dataset(tmp_path_factory.mktemp("words"))


@pytest.mark.parametrize(
    ("name", "grouped"),
    [
        ("loss", "train/loss"),
        ("epoch", "train/epoch"),
        ("eval_loss", "eval/loss"),
        ("eval_log_ratio/person", "eval/log_ratio/person"),
        ("eval_sampled_reward_se", "eval/sampled/reward_se"),
        ("eval_a_loss", "eval/a/loss"),
        ("eval_a_b_loss", "eval/a_b/loss"),
        ("eval_a_b_reward/x_y", "eval/a_b/reward/x_y"),
    ],
)
def test_names_that_group(name: str, grouped: str) -> None:
    """Of the datasets a and a_b, a_b_loss is a metric of the second."""
    assert grouped_name(name, ["a", "a_b"]) == grouped


@pytest.mark.parametrize("name", EXTRAS)
def test_a_missing_package_is_named_before_a_model_is_loaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings alone say so, with the command that installs it."""
    found = importlib.util.find_spec
    missing = EXTRAS[name]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda own, *more: None if own in missing else found(own)
    )
    with pytest.raises(ConfigError) as raised:
        config_of(tmp_path, report_to=[name])
    assert f"report_to: {name} needs the package {name}" in str(raised.value)
    assert f"pip install 'gvpo_offline[{name}]'" in str(raised.value)


def test_tables_of_mlflow_and_trackio() -> None:
    """Modules with the signatures of mlflow 3.17 (log_table(data, artifact_file)) and trackio 0.43
    (Table(data=rows), log(metrics)).
    """
    tables: list[tuple[Any, ...]] = []
    mlflow = MLflowCallback.__new__(MLflowCallback)
    mlflow._auto_end_run = False
    mlflow._ml_flow = SimpleNamespace(
        active_run=lambda: object(),
        log_table=lambda data, artifact_file: tables.append((data, artifact_file)),
    )
    logged: list[dict[str, Any]] = []
    trackio = TrackioCallback.__new__(TrackioCallback)
    trackio._initialized = True
    trackio._trackio = SimpleNamespace(
        Table=lambda *, data: ("table", data), log=lambda metrics: logged.append(metrics)
    )
    log_table([mlflow, trackio], ANSWERS, 7)
    ((data, file),) = tables
    assert file == "sampled_answers.json"
    assert data == {
        "step": [7, 7],
        "prompt": ["p", "q"],
        "answer": ["a", "c"],
        "reward": [0.5, 0.25],
        "best_logged": ["b", "d"],
        "best_logged_reward": [1.0, 0.75],
    }
    rows = [dict(zip(COLUMNS, own.row(), strict=True)) for own in ANSWERS]
    assert logged == [{"eval/sampled/answers": ("table", rows), "train/global_step": 7}]


def train_with(
    logger: str, words: tuple[Path, GroupDataset], folder: Path, **changes: Any
) -> set[str]:
    """Names of the metrics, as `metrics.jsonl` has them, of a run with two held-out datasets."""
    model, data = words
    trainer_of(
        *(model, data, folder),
        eval_dataset={"a": data, "a_b": data},
        groups_per_step=3,
        max_steps=2,
        report_to=logger,
        eval_strategy="steps",
        eval_steps=1,
        eval_samples=2,
        eval_reward=EXACT,
        **changes,
    ).train()
    text = (folder / "metrics.jsonl").read_text()
    return {name for line in text.splitlines() for name in json.loads(line)} - {"step"}


def test_tensorboard(words: tuple[Path, GroupDataset], tmp_path: Path) -> None:
    """What its files hold: every metric by its grouped name, and a table for each evaluation."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    names = train_with("tensorboard", words, tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    board = EventAccumulator(str(folder))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {grouped_name(own, ["a", "a_b"]) for own in names}
    assert "eval/a_b/loss" in board.Tags()["scalars"]
    assert [own.step for own in board.Scalars("eval/sampled/reward")] == [1, 2]
    assert [own.step for own in board.Tensors("eval/sampled/answers/text_summary")] == [1, 2]


def test_the_logger_of_a_user_stays(
    words: tuple[Path, GroupDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that of `report_to` is replaced in its place, before the user's callbacks."""
    pytest.importorskip("tensorboard")
    model, data = words
    mine = TensorBoardCallback()
    trainer = trainer_of(model, data, tmp_path, report_to="tensorboard", callbacks=[mine])
    found = trainer.callback_handler.callbacks
    (ours,) = (own for own in found if isinstance(own, GroupingTensorBoard))
    assert found.index(ours) < found.index(mine)


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/store.db")
    yield mlflow
    mlflow.set_tracking_uri(None)


def test_mlflow(words: tuple[Path, GroupDataset], tmp_path: Path, mlflow_store: Any) -> None:
    names = train_with("mlflow", words, tmp_path / "run")
    run = mlflow_store.last_active_run()
    assert set(run.data.metrics) == {grouped_name(own, ["a", "a_b"]) for own in names}
    table = mlflow_store.load_table("sampled_answers.json", run_ids=[run.info.run_id])
    assert list(table.columns) == ["step", *COLUMNS]
    assert table["step"].tolist() == [1] * 3 + [2] * 3


def test_wandb(
    words: tuple[Path, GroupDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    names = train_with("wandb", words, tmp_path / "run")
    summary = set(wandb.run.summary.keys())
    wandb.finish()
    # transformers puts the figures of the whole run into the summary under their own names.
    expected = {grouped_name(own, ["a", "a_b"]) for own in names}
    assert {own for own in expected if own.startswith("eval/")} <= summary
    tables = list(tmp_path.glob("wandb/offline-run-*/files/media/table/eval/sampled/*.json"))
    assert len(tables) == 2
    assert all(json.loads(own.read_text())["columns"] == list(COLUMNS) for own in tables)


def test_trackio(
    words: tuple[Path, GroupDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its store is a SQLite file in a folder that trackio reads when it is imported."""
    import sqlite3

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    pytest.importorskip("trackio")
    names = train_with("trackio", words, tmp_path / "run")
    (store,) = (tmp_path / "store").glob("*.db")
    with sqlite3.connect(store) as connection:
        logged = [json.loads(row[0]) for row in connection.execute("select metrics from metrics")]
    found = {name for line in logged for name in line}
    evaluated = {grouped_name(own, ["a", "a_b"]) for own in names if own.startswith("eval_")}
    assert evaluated <= found
    tables = [line["eval/sampled/answers"] for line in logged if "eval/sampled/answers" in line]
    assert [len(table["_value"]) for table in tables] == [3, 3]
