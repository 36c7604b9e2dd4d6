"""What a run leaves in its folder besides metrics: events, sampled answers, residuals."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.sampled_answers import EXACT, word_dataset
from support.training import (
    same_weights,
    scored_dataset,
    trainer_of,
    weights_of,
)
from transformers import EarlyStoppingCallback, TrainerCallback

from gvpo_offline.errors import ConfigError, ResumeError
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.checkpoint import check_output_dir
from gvpo_offline.train.record.json_lines import JsonLinesFile, json_line, read_json_lines
from gvpo_offline.train.record.residuals import (
    MOST,
    GroupResiduals,
    first_worst,
    lines_of,
    worst,
)
from gvpo_offline.train.record.run_record import RunRecord
from gvpo_offline.tune.trials import TrialTrainer

RUN: dict[str, Any] = {
    "groups_per_step": 8,
    "num_train_epochs": 2,  # six steps of 24 groups
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
}
FILES = ("metrics.jsonl", "events.jsonl", "samples.jsonl", "residuals.jsonl")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 24)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GroupDataset]:
    return word_dataset(tmp_path_factory.mktemp("words"))


def lines(folder: Path, name: str = "events.jsonl") -> list[dict[str, Any]]:
    path = folder / name
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def kinds(folder: Path) -> list[tuple[int, str]]:
    return [(line["step"], line["kind"]) for line in lines(folder)]


class StopsAt(TrainerCallback):
    """Raises at the end of a step, as a run that is killed there."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise KeyboardInterrupt


# ---- events ----


def test_the_events_of_a_run(dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path) -> None:
    """With save_total_limit 1 each checkpoint replaces the one before. The data are trained on and
    held out at once, which is warned of before the first step.
    """
    trainer = trainer_of(
        tiny_model_dir, dataset, tmp_path, eval_dataset=dataset, save_total_limit=1, **RUN
    )
    trainer.train()
    evaluated = ["residuals", "evaluation", "checkpoint"]
    assert kinds(tmp_path) == [
        *[(0, "start"), (0, "warning")],
        *((2, kind) for kind in evaluated),
        *((4, kind) for kind in (*evaluated, "checkpoint")),
        *((6, kind) for kind in (*evaluated, "checkpoint", "end")),
    ]
    events = lines(tmp_path)
    start, warning, end = events[0], events[1], events[-1]
    assert (start["steps"], start["world_size"], start["device"]) == (6, 1, "cpu")
    assert len(start["settings"]) == 64
    assert {"python", "gvpo_offline", "torch", "transformers"} <= set(start["versions"])
    assert "are trained on as well" in warning["text"]
    assert warning["source"] == "gvpo_offline.train.preflight"
    assert (end["complete"], end["error"]) == (True, None)
    changed = [(e["action"], e["folder"]) for e in events if e["kind"] == "checkpoint"]
    assert changed == [
        ("saved", "checkpoint-2"),
        *[("saved", "checkpoint-4"), ("removed", "checkpoint-2")],
        *[("saved", "checkpoint-6"), ("removed", "checkpoint-4")],
    ]
    logged = [line for line in lines(tmp_path, "metrics.jsonl") if "eval_loss" in line]
    for event, line in zip((e for e in events if e["kind"] == "evaluation"), logged, strict=True):
        assert set(event["metrics"]) == {
            *("eval_loss", "eval_explained_variance", "eval_best_log_ratio_mean")
        }
        assert {name: line[name] for name in event["metrics"]} == event["metrics"]
    training = [line for line in lines(tmp_path, "metrics.jsonl") if "loss" in line]
    assert all(0.01 < line["peak_memory_gb"] < 1000 for line in training)


def test_a_resumed_run_leaves_what_an_uninterrupted_one_does(
    words: tuple[Path, GroupDataset], tmp_path: Path
) -> None:
    """A run of six steps is interrupted after step 5, resumed from the checkpoint of step 4, and
    interrupted again after that of step 6. What was written of step 5 is gone; samples and
    residuals are those of a run without interruption, and each step is there once.
    """
    model, data = words
    settings = {
        **RUN,
        "groups_per_step": 1,
        "eval_samples": 2,
        "eval_reward": EXACT,
        "eval_dataset": data,
    }
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trainer_of(model, data, whole, **settings).train()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(model, data, cut, callbacks=[StopsAt(5)], **settings).train()
    assert lines(cut)[-1]["error"] == "KeyboardInterrupt"
    assert not lines(cut)[-1]["complete"]
    (cut / "residuals.jsonl").open("a").write('{"step": 5, "groups": "held')  # a kill in a write
    resumed = trainer_of(model, data, cut, **settings)
    resumed.train(resume_from_checkpoint=True)
    for name in ("samples.jsonl", "residuals.jsonl"):
        assert lines(cut, name) == lines(whole, name)
    assert [line["step"] for line in lines(cut, "samples.jsonl")] == [2] * 3 + [4] * 3 + [6] * 3
    without_start = [each for each in kinds(whole) if each != (0, "start")]
    # What is said of the data is said at each start.
    begun_again = [(4, "resume"), *[(4, kind) for step, kind in without_start if step == 0]]
    at = next(i for i, own in enumerate(without_start) if own[0] > 4)
    assert kinds(cut) == [(0, "start"), *without_start[:at], *begun_again, *without_start[at:]]
    resume = next(line for line in lines(cut) if line["kind"] == "resume")
    assert resume["checkpoint"] == "checkpoint-4"
    assert resume["settings"] == lines(cut)[0]["settings"] == lines(whole)[0]["settings"]
    # Further evaluations of the last step, and a resume at its end, add no line twice.
    resumed.evaluate()
    assert len(lines(cut, "samples.jsonl")) == 12
    again = trainer_of(model, data, cut, **settings)
    again.train(resume_from_checkpoint=str(cut / "checkpoint-6"))
    for name in ("samples.jsonl", "residuals.jsonl"):
        assert lines(cut, name) == lines(whole, name)


def test_a_run_resumed_in_another_folder_takes_its_lines_along(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    trainer_of(tiny_model_dir, dataset, first, eval_dataset=dataset, **RUN).train()
    moved = trainer_of(tiny_model_dir, dataset, second, eval_dataset=dataset, **RUN)
    moved.train(resume_from_checkpoint=str(first / "checkpoint-4"))
    assert lines(second, "residuals.jsonl") == lines(first, "residuals.jsonl")
    assert [kind for step, kind in kinds(second) if step < 4] == [
        *("start", "warning", "residuals", "evaluation", "checkpoint")
    ]


def test_a_checkpoint_of_an_earlier_version_keeps_the_lines_by_their_steps(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    trainer_of(tiny_model_dir, dataset, tmp_path, eval_dataset=dataset, **RUN).train()
    whole = lines(tmp_path, "residuals.jsonl")
    seal = tmp_path / "checkpoint-4" / "gvpo_checkpoint.json"
    content = json.loads(seal.read_text())
    assert content.pop("lines")["residuals.jsonl"] == sum(own["step"] <= 4 for own in whole)
    del content["sha256"], content["seal_sha256"]
    seal.write_text(json.dumps(content))
    resumed = trainer_of(tiny_model_dir, dataset, tmp_path, eval_dataset=dataset, **RUN)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert lines(tmp_path, "residuals.jsonl") == whole


def test_warnings_have_the_step_at_which_they_were_said(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A far too high learning rate. Each warning that was printed is an event, once."""
    trainer = trainer_of(
        tiny_model_dir, dataset, tmp_path, learning_rate=0.3, num_train_epochs=3, loss_type="gvpo"
    )
    trainer.train()
    said = [r for r in caplog.records if r.name.startswith("gvpo_offline") and r.levelno >= 30]
    noted = [line for line in lines(tmp_path) if line["kind"] == "warning"]
    assert [line["text"] for line in noted] == [record.getMessage() for record in said]
    of_steps = [line for line in noted if line["text"].startswith("step ")]
    assert of_steps
    for line in of_steps:
        assert line["text"].startswith(f"step {line['step']}, ")


def test_a_second_run_of_a_trainer_begins_its_record_anew(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Its warnings from before the first step too; and an error before it is not the end of the
    first run.
    """
    settings = {"eval_dataset": dataset, "max_steps": 1, "reference_check": "off"}
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, **settings)
    for _ in range(2):
        trainer.train()
        assert [kind for _, kind in kinds(tmp_path)] == ["start", "warning", "end"]
    with pytest.raises(ResumeError):
        trainer.train(resume_from_checkpoint=True)
    assert [kind for _, kind in kinds(tmp_path)] == ["start", "warning", "end"]


def test_a_run_that_fails_says_so_in_its_last_event(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise ValueError("no\nmemory")

    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, callbacks=[Fails()], max_steps=2)
    with pytest.raises(ValueError, match="memory"):
        trainer.train()
    last = lines(tmp_path)[-1]
    assert (last["step"], last["kind"], last["complete"]) == (1, "end", False)
    assert last["error"] == "ValueError: no memory"


def test_early_stopping_and_the_best_checkpoint(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """No evaluation is a million better than the first, so the run stops at the second, with the
    best checkpoint, which is the better of the two by the loss.
    """
    trainer = trainer_of(
        *(tiny_model_dir, dataset, tmp_path),
        eval_dataset=dataset,
        callbacks=[EarlyStoppingCallback(1, 1e6)],
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        **RUN,
    )
    trainer.train()
    events = lines(tmp_path)
    assert events[-1]["kind"] == "end"
    assert (events[-1]["step"], events[-1]["complete"]) == (trainer.state.global_step, False)
    assert trainer.state.best_model_checkpoint is not None


def test_a_file_that_cannot_be_written_leaves_the_others(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder has the name of each file in turn. The run goes on and warns once."""
    for name in ("events.jsonl", "residuals.jsonl"):
        out = tmp_path / name.partition(".")[0]
        (out / name).mkdir(parents=True)
        caplog.clear()
        trainer = trainer_of(tiny_model_dir, dataset, out, max_steps=2)
        trainer.train()
        assert trainer.state.global_step == 2
        found = [r.getMessage() for r in caplog.records if "is not written" in r.getMessage()]
        assert len(found) == 1
        assert name in found[0]
        assert len(lines(out, "metrics.jsonl")) == 3
        if name == "residuals.jsonl":
            warned = [line["text"] for line in lines(out) if line["kind"] == "warning"]
            assert found[0] in warned


def test_the_record_does_not_change_the_run(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A run that evaluates and records has bitwise the weights of one that does neither."""
    made = trainer_of(tiny_model_dir, dataset, tmp_path / "bare", max_steps=4)
    bare = TrialTrainer(str(tiny_model_dir), made.args, train_dataset=dataset)
    bare.train()
    settings = {**RUN, "max_steps": 4}
    full = trainer_of(tiny_model_dir, dataset, tmp_path / "full", eval_dataset=dataset, **settings)
    full.train()
    alone = trainer_of(tiny_model_dir, dataset, tmp_path / "alone", max_steps=4)
    alone.train()  # which records residuals of training groups
    assert lines(tmp_path / "alone", "residuals.jsonl")
    assert same_weights(weights_of(bare), weights_of(full))
    assert same_weights(weights_of(bare), weights_of(alone))
    assert not any((tmp_path / "bare" / name).exists() for name in FILES)
    assert all((tmp_path / "full" / name).exists() for name in FILES if name != "samples.jsonl")


def test_a_trial_of_tune_has_no_record(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    made = trainer_of(tiny_model_dir, dataset, tmp_path, max_steps=1)
    trial = TrialTrainer(str(tiny_model_dir), made.args, train_dataset=dataset)
    assert not any(isinstance(own, RunRecord) for own in trial.callback_handler.callbacks)


# ---- samples ----


def test_the_sampled_answers_of_each_evaluation(
    words: tuple[Path, GroupDataset], tmp_path: Path
) -> None:
    """One line for each of the three prompts, beside the best logged response of the group."""
    model, data = words
    trainer = trainer_of(
        *(model, data, tmp_path),
        eval_dataset=data,
        **{**RUN, "groups_per_step": 3, "max_steps": 2, "eval_samples": 2, "eval_reward": EXACT},
    )
    trainer.train()
    found = lines(tmp_path, "samples.jsonl")
    assert [line["group_id"] for line in found] == [f"group-{n:05}" for n in range(3)]
    best = {line["group_id"]: (line["best_logged"], line["best_logged_reward"]) for line in found}
    assert best == {
        "group-00000": ("two three", 1.0),
        "group-00001": ("red red red", 0.5),
        "group-00002": ("three", 0.5),
    }
    result = trainer.sampled_result()  # the same draws of the same policy
    for line, own in zip(found, result.prompts, strict=True):
        assert (line["step"], line["prompt"]) == (2, own.prompt)
        assert (line["answer"], line["reward"]) == (own.texts[0], own.rewards[0])
        assert line["kl"] == pytest.approx(float(own.log_ratios[0]), abs=1e-6)
        assert (line["length"], line["truncated"]) == (own.lengths[0], bool(own.truncated[0]))
        assert line["messages"] is None
    # A folder that is uploaded holds no texts of the data.
    trainer.args.push_to_hub = True
    trainer.evaluate()
    assert len(lines(tmp_path, "samples.jsonl")) == 3


# ---- residuals ----


def test_the_groups_with_the_largest_residuals(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """All 24 groups at the first evaluation, ranked; at the last, the 16 worst of that time and the
    16 that were worst at first. Figures are those of `predict` for the same weights:
    r = R - beta l, minus the group's mean.
    """
    beta = 0.5
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, eval_dataset=dataset, beta=beta, **RUN)
    trainer.train()
    found = lines(tmp_path, "residuals.jsonl")
    first, last = ([own for own in found if own["step"] == step] for step in (2, 6))
    assert [own["rank"] for own in first] == list(range(1, 25))
    tracked = {own["group_id"] for own in first[:MOST]}
    assert {own["group_id"] for own in last} == tracked | {
        own["group_id"] for own in last if own["rank"] <= MOST
    }
    assert [own["rank"] for own in last[:MOST]] == list(range(1, MOST + 1))
    assert {(own["groups"], own["dataset"]) for own in found} == {("held_out", "")}

    predicted = trainer.predict(dataset)
    for line in last:
        own = predicted.group_ids == line["group_id"]
        residuals = predicted.label_ids[own] - beta * predicted.predictions[own]
        residuals -= residuals.mean()
        assert line["rewards"] == predicted.label_ids[own].tolist()
        assert line["samplers"] == predicted.samplers[own].tolist()
        assert line["log_ratios"] == pytest.approx(predicted.predictions[own].tolist(), abs=1e-6)
        assert line["residuals"] == pytest.approx(residuals.tolist(), abs=1e-6)
        size = math.sqrt(float(np.square(residuals).mean()))
        assert line["residual"] == pytest.approx(size, abs=1e-6)
    assert [own["residual"] for own in last] == sorted((o["residual"] for o in last), reverse=True)


def test_without_held_out_groups_the_residuals_are_of_logged_steps(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Three steps an epoch, of which every second is logged: 2, 4 and 6. Step 2 has its 8 groups.
    Later lines have the four worst groups of a logged step, and each of those 8 groups when it
    comes again, in the second epoch: once, whether its step is logged or not. Rewards minus their
    mean are the residuals of step 1, as the policy is the reference there.
    """
    trainer_of(
        *(tiny_model_dir, dataset, tmp_path),
        groups_per_step=8,
        num_train_epochs=2,
        logging_steps=2,
    ).train()
    found = lines(tmp_path, "residuals.jsonl")
    assert {own["groups"] for own in found} == {"training"}
    first = [own for own in found if own["step"] == 2]
    assert [own["rank"] for own in first] == list(range(1, 9))
    again = [own for own in found if own["step"] > 2]
    tracked = {own["group_id"] for own in first}
    assert sorted(own["group_id"] for own in again if own["group_id"] in tracked) == sorted(tracked)
    assert all(own["step"] in (4, 6) and own["rank"] <= 4 for own in again if own["group_id"]
               not in tracked)  # fmt: skip

    every = tmp_path / "every"
    trainer_of(tiny_model_dir, dataset, every, groups_per_step=8, max_steps=1).train()
    for own in lines(every, "residuals.jsonl"):
        mean = sum(own["rewards"]) / len(own["rewards"])
        expected = [reward - mean for reward in own["rewards"]]
        # Log-ratios are those of rounding, some 1e-5 nats in float32, times beta = 0.5.
        assert own["residuals"] == pytest.approx(expected, abs=1e-4)


def test_the_lines_of_a_measurement() -> None:
    """Of 600 groups the first measurement has the 512 worst; a later one the 16 worst and those
    that were worst at first, with their ranks.
    """
    made = [GroupResiduals(f"g{n}", ["a"], [0.0], [0.0], [float(n)], float(n)) for n in range(600)]
    first = lines_of(made, None, part="held_out")
    assert [own["group_id"] for own in first] == [f"g{n}" for n in range(599, 87, -1)]
    found = first_worst([{"step": 2, **own} for own in first])
    assert found == {("held_out", ""): [own.group_id for own in worst(made, MOST)]}
    turned = [GroupResiduals(o.group_id, ["a"], [0.0], [0.0], [0.0], -o.residual) for o in made]
    later = lines_of(turned, found["held_out", ""], part="held_out")
    ranks = {str(own["group_id"]): own["rank"] for own in later}
    assert ranks == {f"g{n}": n + 1 for n in (*range(16), *range(584, 600))}
    # The first measurement is that of the first step, whatever follows.
    both = [{"step": 2, **own} for own in first] + [{"step": 4, **own} for own in later]
    assert first_worst(both) == found


# ---- files ----


def test_lines_and_files(tmp_path: Path) -> None:
    """Nothing is written before `begin`. Values that JSON does not have are null, also inside."""
    file = JsonLinesFile("a.jsonl")
    file.add([{"a": 1}])
    assert (file.n_lines, list(tmp_path.iterdir())) == (0, [])
    (tmp_path / "a.jsonl").write_text('{"of": "another run"}\n')
    file.begin(tmp_path)
    assert not (tmp_path / "a.jsonl").exists()
    file.begin(tmp_path, [{"a": [math.nan, {"b": math.inf}], "n": np.float32(0.5)}])
    file.add([{"text": "two\nlines \u2028"}, {"x": Path("y")}])
    assert file.n_lines == 3
    found = read_json_lines(tmp_path / "a.jsonl")
    assert found == [
        {"a": [None, {"b": None}], "n": 0.5},
        {"text": "two\nlines \u2028"},
        {"x": "y"},
    ]
    assert json_line({"a": True, "b": None}) == '{"a": true, "b": null}'
    with (tmp_path / "a.jsonl").open("a") as half:
        half.write('{"cut": ')
    assert read_json_lines(tmp_path / "a.jsonl") == found
    assert read_json_lines(tmp_path / "missing.jsonl") == []


def test_a_warning_without_a_handler_is_still_printed() -> None:
    """Python prints it by itself, unless some handler takes it: the record's must not count."""
    script = """
import logging
from gvpo_offline.train.record.heard import hearing
found = []
with hearing(found.append):
    logging.getLogger("gvpo_offline.train.x").warning("once %d", 7)
    logging.getLogger("gvpo_offline.train.x").info("not heard")
    logging.getLogger("other").warning("of others")
logging.getLogger("gvpo_offline.y").warning("later")
assert [own.getMessage() for own in found] == ["once 7"], found
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert ended.stderr.splitlines() == ["once 7", "of others", "later"]


def test_a_handled_warning_is_not_printed_twice(caplog: pytest.LogCaptureFixture) -> None:
    from gvpo_offline.train.record.heard import hearing

    found: list[logging.LogRecord] = []
    with hearing(found.append), hearing(found.append):
        logging.getLogger("gvpo_offline.train.x").warning("once")
    assert [record.getMessage() for record in caplog.records] == ["once"]
    assert len(found) == 2


def test_what_a_kill_leaves_of_a_file_does_not_block_a_new_run(tmp_path: Path) -> None:
    """Files of lines, and one that was being replaced; any other file does."""
    for name in FILES:
        (tmp_path / name).touch()
        (tmp_path / f".{name}.0123.tmp").touch()
    check_output_dir(tmp_path)
    (tmp_path / "notes.jsonl").touch()
    with pytest.raises(ConfigError, match=r"notes\.jsonl"):
        check_output_dir(tmp_path)
