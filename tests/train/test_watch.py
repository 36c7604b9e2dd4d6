"""Warnings while training: each matter's threshold, once, again when worse, and after a resume."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
from support.training import scored_dataset, trainer_of

from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.callbacks import Watch


def said(*lines: dict[str, float], loss_type: str = "gvpo") -> list[list[str]]:
    """The warnings after each line, at steps 10, 20, ..."""
    watch = Watch(loss_type)
    return [watch.read(10 * number, line) for number, line in enumerate(lines, 1)]


def counts(*lines: dict[str, float], loss_type: str = "gvpo") -> list[int]:
    return [len(texts) for texts in said(*lines, loss_type=loss_type)]


def training(**values: float) -> dict[str, float]:
    return {"loss": 1.0, "explained_variance": 0.1, "best_log_ratio_mean": 0.0, **values}


def held_out(name: str = "eval", **values: float) -> dict[str, float]:
    return {f"{name}_{key}": value for key, value in training(**values).items()}


def test_sinking_best_responses() -> None:
    """Below -1 and lower than the line before; then when twice as low as was said: -1.5, -3."""
    ratios = [-0.9, -1.5, -2.0, -2.9, -3.0, -5.0, -4.0, -6.5, -6.0]
    assert counts(*(training(best_log_ratio_mean=own) for own in ratios)) == [
        *(0, 1, 0, 0, 1, 0, 0, 1, 0)
    ]
    texts = said(training(), training(best_log_ratio_mean=-1.5))[1]
    assert texts[0].startswith("step 20, in training: the best responses' mean log-ratio sinks")
    for remedy in ("anchor", "larger beta", "lower learning rate", "fewer epochs"):
        assert remedy in texts[0]
    rising = [-8.0, -7.0, -5.0]  # a policy that comes from elsewhere
    assert counts(*(training(best_log_ratio_mean=own) for own in rising)) == [0, 0, 0]


def test_held_out_explained_variance_that_fell_two_evaluations_in_a_row() -> None:
    """Best 0.30. One low evaluation is chance; at 0.27 the second is a fall of 0.03, said again at
    a fall of 0.06 or more.
    """
    values = [0.1, 0.3, 0.2, 0.29, 0.27, 0.27, 0.25, 0.24, 0.23]
    lines = [held_out(explained_variance=own) for own in values]
    assert counts(*lines) == [0, 0, 0, 0, 0, 1, 0, 1, 0]
    assert "fell to 0.27 from 0.3 at step 20" in said(*lines)[5][0]
    assert counts(*lines, loss_type="dpo") == [0] * 9  # aims at no explained variance


def test_held_out_loss_that_turned_names_its_step() -> None:
    """Least 2 at step 20; above 2.02 at steps 40 and 50."""
    lines = [held_out(loss=own) for own in (3.0, 2.0, 2.01, 2.03, 2.04, 2.04, 2.2)]
    texts = said(*lines)
    assert [len(own) for own in texts] == [0, 0, 0, 0, 1, 0, 1]
    assert "held-out loss turned: 2.04, least was 2 at step 20" in texts[4][0]
    negative = [held_out(loss=own) for own in (-3.0, -2.99, -2.9, -2.9)]  # 1% is 0.03
    assert counts(*negative, loss_type="rloo") == [0, 0, 0, 1]


def test_a_rate_that_is_too_high() -> None:
    values = [-0.4, -0.6, -0.7, -1.3, 0.5]
    lines = [training(explained_variance=own) for own in values]
    assert counts(*lines) == [0, 1, 0, 1, 0]
    assert "learning rate is too high" in said(*lines)[1][0]
    assert counts(*lines, loss_type="rft") == [0] * 5


def test_probability_that_leaves_the_log() -> None:
    lines = [training(log_mass_mean=own) for own in (0.5, -1.9, -2.1, -3.0, -4.3)]
    assert counts(*lines) == [0, 0, 1, 0, 1]
    assert "nobody logged" in said(*lines)[2][0]


def test_datasets_are_watched_each_for_itself() -> None:
    """Maths falls, chat does not; both stand in one line, as they are logged."""
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


def test_lines_without_figures_are_no_matter() -> None:
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


def test_a_run_warns_once_and_a_resumed_one_remembers(
    dataset: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A rate of 0.03 throws the policy off; after the first step of the resumed run, nothing is
    said that was said before and is not twice as bad.
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
