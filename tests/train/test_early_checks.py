"""Settings that cannot work with the data, or have no effect, are named before a model loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.training import scored_dataset

from gvpo_offline.cli import main
from gvpo_offline.errors import ConfigError
from gvpo_offline.rewards.settings import RewardConfig
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.early_checks import FEWEST_HELD_OUT

LOGGER = "gvpo_offline.train.early_checks"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 24)


def train(dataset: GroupDataset, tmp_path: Path, **changes: Any) -> int:
    """`train` of a model that does not exist: what is found before it loads is found first."""
    settings = {
        "model_name_or_path": tmp_path / "no model",
        "dataset": dataset.root,
        "output_dir": tmp_path / "run",
        "groups_per_step": 4,
        "num_train_epochs": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        **changes,
    }
    path = tmp_path / "train.yaml"
    path.write_text(json.dumps(settings, default=str))
    return main(["train", "--config", str(path)])


EVALUATES = {"eval_fraction": 0.5, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "max_steps is a positive number of steps, or -1"),
        ({"max_steps": -5}, "max_steps is a positive number of steps, or -1"),
        ({"num_train_epochs": 0}, "num_train_epochs is above 0; received 0"),
        ({"eval_strategy": "epoch"}, "evaluation needs held-out groups"),
        ({"eval_fraction": 0.0001}, "eval_fraction holds out at least one group"),
        (
            {"eval_samples": 2}
            | {"eval_reward": {"scorers": {"a": {"kind": "exact", "column": "x"}}}},
            "answers are sampled to the prompts of held-out groups",
        ),
        # About 12 of 24 groups are trained on, 3 steps of 4 groups at most 6.
        (
            {**EVALUATES, "load_best_model_at_end": True, "eval_delay": 50},
            "received eval_delay 50 in a run of",
        ),
        (
            {**EVALUATES, "save_strategy": "best", "metric_for_best_model": "loss"}
            | {"eval_delay": 50},
            "received eval_delay 50 in a run of",
        ),
    ],
)
def test_what_cannot_work_is_an_error(
    dataset: GroupDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    assert train(dataset, tmp_path, **changes) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "no model" not in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"groups_per_step": 32, "num_train_epochs": 2},
            "groups_per_step (32) is more than the 24 training groups",
        ),
        ({"warmup_steps": 6}, "warmup_steps (6) is not below the 6 steps of the run"),
        ({**EVALUATES, "eval_delay": 50}, "nothing is evaluated: eval_delay 50 in a run of"),
        (
            {**EVALUATES, "load_best_model_at_end": True, "save_steps": 100},
            "chooses among one checkpoint, the last: save_steps is 100",
        ),
        ({"eval_fraction": 0.1}, "held-out groups are too few to tell one policy from another"),
        (
            {"eval_fraction": 0.5, "eval_samples": 2}
            | {"eval_reward": {"scorers": {"a": {"kind": "exact", "column": "x"}}}},
            "eval_samples has no effect: eval_strategy is no",
        ),
    ],
)
def test_what_is_hardly_meant_is_a_warning(
    dataset: GroupDataset,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    """Said once, and before the model is looked for, which ends the command."""
    assert train(dataset, tmp_path, **changes) == 1
    assert "no model" in capsys.readouterr().err
    said = [record.message for record in caplog.records if record.name == LOGGER]
    assert len([line for line in said if message in line]) == 1
    assert len(said) == 1


def test_a_run_of_sensible_settings_says_nothing(
    dataset: GroupDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(dataset, tmp_path, **EVALUATES, warmup_steps=0.1)
    assert not [record for record in caplog.records if record.name == LOGGER]


def test_the_fewest_held_out_groups() -> None:
    """All n groups prefer one given policy of two equally good ones with probability 2^-n. For ten
    comparisons at 5% in all that must be at most 0.5%: 2^-8 = 0.39%, 2^-7 = 0.78%.
    """
    assert FEWEST_HELD_OUT == 8
    assert 2**-FEWEST_HELD_OUT <= 0.05 / 10 < 2 ** -(FEWEST_HELD_OUT - 1)


def test_an_evaluation_of_no_group_is_refused_before_a_model_loads(
    dataset: GroupDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["evaluate", "--model_name_or_path", str(tmp_path / "no model"), "--beta", "0.1"]
    assert main([*argv, "--dataset", str(dataset.root), "--eval_fraction", "0.0001"]) == 1
    error = capsys.readouterr().err
    assert "an evaluation is on at least one group" in error
    assert "no model" not in error


def test_a_reward_of_weights_0_is_refused() -> None:
    """Every reward would be 0. One scorer of weight 0 beside another is a component to look at."""
    exact = {"kind": "exact", "column": "answer"}
    with pytest.raises(ConfigError, match=r"received scorers.a.weight: 0"):
        RewardConfig("data", scorers={"a": {**exact, "weight": 0}}).settings()
    both = {"a": {**exact, "weight": 0}, "b": exact}
    assert RewardConfig("data", scorers=both).settings()["a"].weight == 0
