"""Warnings during training: the threshold of each, when it is repeated, and after a resume."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
from support.training import config_of, scored_dataset, trainer_of
from transformers import TrainerControl, TrainerState

from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.callbacks import MetricMonitor
from gvpo_offline.train.movement import MovementCallback, stillness


def said(*lines: dict[str, float], loss_type: str = "gvpo") -> list[list[str]]:
    """The warnings after each line, at steps 10, 20, ..."""
    watch = MetricMonitor(loss_type)
    return [watch.read(10 * number, line) for number, line in enumerate(lines, 1)]


def counts(*lines: dict[str, float], loss_type: str = "gvpo") -> list[int]:
    return [len(texts) for texts in said(*lines, loss_type=loss_type)]


def training(**values: float) -> dict[str, float]:
    return {"loss": 1.0, "explained_variance": 0.1, "best_log_ratio_mean": 0.0, **values}


def held_out(name: str = "eval", **values: float) -> dict[str, float]:
    return {f"{name}_{key}": value for key, value in training(**values).items()}


def test_best_responses_whose_log_ratio_falls() -> None:
    """Warns below -1 if lower than the line before, and again when twice as low: -1.5, -3, -6.5."""
    ratios = [-0.9, -1.5, -2.0, -2.9, -3.0, -5.0, -4.0, -6.5, -6.0]
    assert counts(*(training(best_log_ratio_mean=own) for own in ratios)) == [
        *(0, 1, 0, 0, 1, 0, 0, 1, 0)
    ]
    texts = said(training(), training(best_log_ratio_mean=-1.5))[1]
    assert texts[0].startswith("step 20, in training: the best responses' mean log-ratio falls")
    for remedy in ("anchor", "larger beta", "lower learning rate", "fewer epochs"):
        assert remedy in texts[0]
    rising = [-8.0, -7.0, -5.0]  # a policy that started far from the reference
    assert counts(*(training(best_log_ratio_mean=own) for own in rising)) == [0, 0, 0]


def test_held_out_explained_variance_that_fell_two_evaluations_in_a_row() -> None:
    """The best is 0.30. A single low evaluation gives no warning. The second consecutive one, 0.27,
    is a fall of 0.03; the warning is repeated at a fall of at least 0.06.
    """
    values = [0.1, 0.3, 0.2, 0.29, 0.27, 0.27, 0.25, 0.24, 0.23]
    lines = [held_out(explained_variance=own) for own in values]
    assert counts(*lines) == [0, 0, 0, 0, 0, 1, 0, 1, 0]
    assert "fell to 0.27 from 0.3 at step 20" in said(*lines)[5][0]
    assert counts(*lines, loss_type="dpo") == [0] * 9  # not a regression on rewards


def test_held_out_loss_that_rises_names_the_step_of_its_minimum() -> None:
    """The least is 2 at step 20; more than 1% above it, 2.02, at steps 40 and 50."""
    lines = [held_out(loss=own) for own in (3.0, 2.0, 2.01, 2.03, 2.04, 2.04, 2.2)]
    texts = said(*lines)
    assert [len(own) for own in texts] == [0, 0, 0, 0, 1, 0, 1]
    assert "held-out loss rises: 2.04; the least was 2 at step 20" in texts[4][0]
    negative = [held_out(loss=own) for own in (-3.0, -2.99, -2.9, -2.9)]  # 1% is 0.03
    assert counts(*negative, loss_type="rloo") == [0, 0, 0, 1]


def test_a_rate_that_is_too_high() -> None:
    values = [-0.4, -0.6, -0.7, -1.3, 0.5]
    lines = [training(explained_variance=own) for own in values]
    assert counts(*lines) == [0, 1, 0, 1, 0]
    assert "learning rate is too high" in said(*lines)[1][0]
    assert counts(*lines, loss_type="rft") == [0] * 5


def test_logged_responses_that_lose_probability() -> None:
    lines = [training(log_mass_mean=own) for own in (0.5, -1.9, -2.1, -3.0, -4.3)]
    assert counts(*lines) == [0, 0, 1, 0, 1]
    assert "were not logged" in said(*lines)[2][0]


def test_unlikely_writers_do_not_hide_a_loss_of_probability() -> None:
    """log_mass_mean is above 0 because of a person's responses; without them it is below -2."""
    lines = [
        training(log_mass_mean=2.6, likely_log_mass_mean=-1.9),
        training(log_mass_mean=2.6, likely_log_mass_mean=-2.1),
    ]
    texts = said(*lines)
    assert [len(own) for own in texts] == [0, 1]
    assert "likely_log_mass_mean is -2.1 nats" in texts[1][0]


def test_held_out_responses_that_gain_more_than_the_references_can() -> None:
    """Above 1 nat, and again when twice as high; in training a loss of imitation does that."""
    values = (0.7, 1.0, 1.1, 2.1, 2.64)
    lines = [held_out(log_mass_mean=own) for own in values]
    assert counts(*lines) == [0, 0, 1, 0, 1]
    assert "log_mass_mean of held-out responses is 2.64 nats" in said(*lines)[4][0]
    assert counts(*(training(log_mass_mean=own) for own in values)) == [0] * 5


# ---- a policy that does not move ----


@pytest.mark.parametrize(
    ("mean", "std", "noise", "warned_of"),
    [
        (0.0, 0.004, 0.0, "0.004 nats"),  # below a hundredth of a nat
        (0.006, 0.006, 0.0, "0.0085 nats"),  # root of the sum of squares
        (0.0, 0.02, 0.0, ""),
        (0.0, 0.02, 0.05, "0.02 nats (root mean square), and rounding alone gives 0.05"),
        (0.0, 0.11, 0.05, ""),  # more than twice the noise
        (math.nan, math.nan, 0.05, ""),
    ],
)
def test_log_ratios_that_have_not_left_the_noise(
    mean: float, std: float, noise: float, warned_of: str
) -> None:
    found = stillness({"log_ratio_mean": mean, "log_ratio_std": std}, noise)
    assert warned_of in found
    assert bool(found) == bool(warned_of)


def test_groups_of_equal_rewards_do_not_ask_for_movement() -> None:
    still = {"log_ratio_mean": 0.0, "log_ratio_std": 0.0}
    assert stillness({**still, "reward_std": 0.3}, 0.0)
    assert not stillness({**still, "reward_std": 0.0}, 0.0)


def test_each_held_out_dataset_has_its_own_warnings() -> None:
    """Explained variance falls on maths but not on chat; one line holds the metrics of both."""
    falls = [0.5, 0.4, 0.3]
    lines = [
        {
            **held_out("eval_maths", explained_variance=own),
            **held_out("eval_chat", explained_variance=0.5),
        }
        for own in falls
    ]
    texts = said(*lines)
    assert [len(own) for own in texts] == [0, 0, 1]
    assert texts[2][0].startswith("step 30, held out (maths): ")


def test_lines_without_metrics_give_no_warning() -> None:
    assert said({"train_runtime": 3.0}, training(explained_variance=math.nan), {}) == [[], [], []]
    assert said(held_out("test", log_mass_mean=-9.0)) == [[]]


# ---- in a run ----


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 16)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    texts = [r.message for r in caplog.records if r.name == "gvpo_offline.train.callbacks"]
    caplog.clear()
    return texts


def test_a_resumed_run_does_not_repeat_warnings(
    dataset: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With a learning rate of 0.03 training diverges. The run resumed at step 2 gives the same
    warnings at steps 3 and 4 as the run that was not interrupted.
    """
    caplog.set_level(logging.WARNING, "gvpo_offline.train.callbacks")
    settings = {
        "learning_rate": 0.03,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 2,
        "num_train_epochs": 2,  # four steps
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, eval_dataset=dataset, **settings)
    trainer.train()
    whole = warned(caplog)
    assert any("in training: explained variance" in text for text in whole)
    late = [text for text in whole if text.startswith(("step 3", "step 4"))]
    resumed = trainer_of(tiny_model_dir, dataset, tmp_path, eval_dataset=dataset, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert warned(caplog) == late


def warned_at(tmp_path: Path, still: int, **settings: Any) -> int | None:
    """The step of the warning of a run of 20 steps whose log-ratios are 0 up to step `still`."""
    args = config_of(tmp_path, max_steps=20, **settings)
    state, control = TrainerState(), TrainerControl()
    state.max_steps, state.log_history = 20, []
    callback = MovementCallback(lambda: 0.0, adapted=False)
    callback.on_train_begin(args, state, control)
    for step in range(1, 21):
        state.global_step = step
        size = 0.0 if step <= still else 1.0
        before = callback._looked
        callback.on_log(args, state, control, {"log_ratio_mean": 0.0, "log_ratio_std": size})
        if callback._looked != before:
            return step if size == 0.0 else None
    raise AssertionError("it never looked")


def test_steps_that_cannot_show_movement_are_not_judged(tmp_path: Path) -> None:
    """The metrics of a step are those before its update. Of 20 steps, step 3 is the first that
    follows a tenth of the updates; with 5 steps of warm-up step 6, of which step 5 has the last."""
    assert warned_at(tmp_path, still=2) is None
    assert warned_at(tmp_path, still=3) == 3
    assert warned_at(tmp_path, still=5, warmup_steps=5) is None
    assert warned_at(tmp_path, still=6, warmup_steps=5) == 6
    assert warned_at(tmp_path, still=6, warmup_steps=0.25) == 6


def test_a_short_run_that_learns_is_not_warned_of(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 8 steps, the first follows no update: its log-ratios are 0 in every run."""
    settings = {"groups_per_step": 4, "max_steps": 8, "learning_rate": 1e-2}
    trainer_of(tiny_model_dir, dataset, tmp_path, **settings).train()
    assert not [r for r in caplog.records if r.name == "gvpo_offline.train.movement"]


@pytest.mark.parametrize(("rate", "n_warnings"), [(1e-9, 1), (1e-2, 0)])
def test_a_run_that_does_not_move_is_warned_of_once(
    dataset: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    rate: float,
    n_warnings: int,
) -> None:
    """Of 20 steps, step 3 is the first after a tenth of the updates, and step 4 the first line from
    then on. A resumed run does not repeat the warning.
    """
    settings = {
        "learning_rate": rate,
        "groups_per_step": 4,
        "max_steps": 20,
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": 10,
    }
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, **settings)
    trainer.train()
    name = "gvpo_offline.train.movement"
    found = [r.message for r in caplog.records if r.name == name]
    assert len(found) == n_warnings
    for text in found:
        assert text.startswith("step 4 of 20: the policy has hardly moved")
        assert "The learning rate is 1e-09; a whole model usually needs 1e-06 or more" in text
    caplog.clear()
    resumed = trainer_of(tiny_model_dir, dataset, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert not [r for r in caplog.records if r.name == name]
