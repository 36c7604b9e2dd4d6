"""`metrics.jsonl` in the folder of a run, and the figures of samplers in its evaluations."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fork_server import ForkServer
from support.training import scored_dataset, train_command, trainer_of

from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.by_sampler import SamplerTotals, sampler_metrics, sampler_table
from gvpo_offline.train.callbacks import MetricMonitor
from gvpo_offline.train.record.json_lines import read_json_lines
from gvpo_offline.train.record.metrics_file import metrics_line
from gvpo_offline.tune.trials import TrialTrainer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 24)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


RUN: dict[str, Any] = {
    "groups_per_step": 8,
    "num_train_epochs": 2,  # six steps
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
}


def test_every_logged_line_is_in_the_file_and_a_resumed_run_replaces_later_ones(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Six lines of training, three of evaluations, and the last of the whole run. After a resume
    from step 2, the lines up to step 2 are those of the first run, and each step is there once.
    """
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, eval_dataset=dataset, **RUN)
    trainer.train()
    whole = lines(tmp_path)
    assert [list(line)[:2] for line in whole] == [["step", "epoch"]] * 10
    assert [line["step"] for line in whole] == [1, 2, 2, 3, 4, 4, 5, 6, 6, 6]
    assert [line["step"] for line in whole if "eval_loss" in line] == [2, 4, 6]
    assert whole[-1]["train_runtime"] > 0
    for line, logged in zip(whole, trainer.state.log_history, strict=True):
        assert line == pytest.approx(logged, nan_ok=True)
    resumed = trainer_of(tiny_model_dir, dataset, tmp_path, eval_dataset=dataset, **RUN)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again = lines(tmp_path)
    assert again[:3] == whole[:3]
    assert [line["step"] for line in again] == [line["step"] for line in whole]
    # One more evaluation, after training, is one more line.
    resumed.evaluate()
    assert len(lines(tmp_path)) == 11


def test_a_run_without_a_checkpoint_starts_anew_in_its_folder(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """An evaluation before training writes no file, and a killed run's lines are replaced."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, eval_dataset=dataset, max_steps=1)
    trainer.evaluate()
    assert len(lines(tmp_path)) == 2
    trainer.train()
    assert [line["step"] for line in lines(tmp_path)] == [1, 1]
    assert "loss" in lines(tmp_path)[0]


def test_a_trial_of_tune_writes_no_file(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    made = trainer_of(tiny_model_dir, dataset, tmp_path / "made", max_steps=1)
    trainer = TrialTrainer(
        str(tiny_model_dir), made.args, train_dataset=dataset, eval_dataset=dataset
    )
    trainer.train_and_evaluate()
    assert not (tmp_path / "made" / "metrics.jsonl").exists()


def test_a_file_that_cannot_be_written_is_warned_of_once(
    dataset: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A folder has its name. The run goes on."""
    (tmp_path / "metrics.jsonl").mkdir()
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
    found = [r.message for r in caplog.records if "metrics.jsonl is not written" in r.message]
    assert len(found) == 1


def test_values_that_json_does_not_have() -> None:
    line = {"loss": math.nan, "step": 3, "grad_norm": np.float32(0.5), "name": Path("x"), "n": None}
    assert json.loads(metrics_line(line)) == {
        "step": 3,
        "loss": None,
        "grad_norm": 0.5,
        "name": "x",
        "n": None,
    }


# ---- by sampler ----


def test_two_ranks_log_the_figures_of_all_samplers(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    """The means of each sampler are those of one process, whichever rank held its responses, and
    only the main process prints lines and writes the files. The residuals are those of one process.
    """
    found, residuals = [], []
    for n_ranks in (1, 2):
        out = tmp_path / f"{n_ranks}"
        argv = train_command(dataset, tiny_model_dir, out, save_strategy="no")
        ended = server.run_ranks(argv, n_ranks)
        assert {status for status, _ in ended} == {0}, "\n".join(text for _, text in ended)
        assert "log-ratio (nats)" in ended[0][1]
        found.append(next(line for line in lines(out) if "eval_loss" in line))
        shown = [text.count("step 2/2 (100%)") for _, text in ended]
        assert shown == [1] + [0] * (n_ranks - 1)
        starts = [line for line in read_json_lines(out / "events.jsonl") if line["kind"] == "start"]
        assert [line["world_size"] for line in starts] == [n_ranks]
        measured = read_json_lines(out / "residuals.jsonl")
        residuals.append({line["group_id"]: line["residuals"] for line in measured})
    one, two = found
    figures = [name for name in one if "/" in name]
    samplers = {name for group in dataset.groups(0) for name in group.samplers}
    assert {name.partition("/")[2] for name in figures} == samplers
    assert {name.partition("/")[0] for name in figures} == {
        *("eval_log_ratio", "eval_reward", "eval_weight")
    }
    assert one.keys() == two.keys()
    for name in figures:
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-3)
    assert len(residuals[0]) == 24
    assert residuals[0].keys() == residuals[1].keys()
    for name, own in residuals[0].items():
        assert residuals[1][name] == pytest.approx(own, rel=1e-3, abs=1e-3)


def test_an_evaluation_has_the_means_of_its_responses(
    dataset: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "gvpo_offline.train.evaluation")
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, eval_dataset=dataset, max_steps=2)
    trainer.train()
    metrics = trainer.evaluate()
    predicted = trainer.predict(dataset)
    for name in np.unique(predicted.samplers):
        own = predicted.samplers == name
        expected = float(predicted.predictions[own].mean())
        assert metrics[f"eval_log_ratio/{name}"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert metrics[f"eval_reward/{name}"] == pytest.approx(predicted.label_ids[own].mean())
        assert predicted.metrics[f"test_log_ratio/{name}"] == pytest.approx(expected)
    table = [r.message for r in caplog.records if r.name == "gvpo_offline.train.evaluation"]
    assert table[0] == "held out, by sampler:"
    assert len(table) == 2 + len(np.unique(predicted.samplers))


def test_metrics_of_the_samplers_with_the_most_responses() -> None:
    """Of 25 samplers 20 have metrics; the table says how many it leaves out. One sampler alone has
    none.
    """
    totals = {f"s{n:02}": SamplerTotals(100 - n, 10.0, -5.0, 1.0, 50.0) for n in range(25)}
    found = sampler_metrics(totals)
    assert len(found) == 3 * 20
    assert found["log_ratio/s00"] == pytest.approx(-0.05)
    assert "log_ratio/s20" not in found
    assert sampler_metrics({"only": SamplerTotals(3, 1.0)}) == {}
    means = {name: own.means() for name, own in totals.items()}
    table = sampler_table(means, 20)
    assert len(table) == 22
    assert table[-1] == "and 5 more"
    # Those with the most responses, the highest mean reward first: 10 / 81 of s19.
    assert [line.split()[:4] for line in table[1:3]] == [
        ["s19", "81", "0.123", "0.62"],
        ["s18", "82", "0.122", "0.61"],
    ]


def test_a_sampler_may_have_the_name_of_a_metric() -> None:
    """Only the evaluation itself is watched, not a sampler called x_explained_variance."""
    line = {"eval_explained_variance": 0.1, "eval_log_ratio/x_explained_variance": -9.0}
    falls = [line, {**line, "eval_log_ratio/x_explained_variance": -19.0}]
    watch = MetricMonitor()
    assert [watch.read(step, own) for step, own in enumerate(falls * 2)] == [[]] * 4
