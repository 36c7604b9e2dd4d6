"""Settings and inputs that the trainer refuses, before it changes anything."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.builders import make_groups
from support.training import config_of, scored_dataset, trainer_of, unscored_dataset

from gvpo_offline.errors import ConfigError
from gvpo_offline.store.dataset import GroupDataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 24)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("per_device_train_batch_size", 4),
        ("gradient_accumulation_steps", 2),
        ("auto_find_batch_size", True),
        ("label_smoothing_factor", 0.1),
        ("neftune_noise_alpha", 5.0),
        ("dataloader_drop_last", True),
        ("ignore_data_skip", True),
        ("train_sampling_strategy", "sequential"),
    ],
)
def test_batch_settings_of_transformers_are_refused(
    tmp_path: Path, setting: str, value: Any
) -> None:
    with pytest.raises(
        ConfigError, match=f"{setting} is not used in GVPO training; received {value}"
    ):
        config_of(tmp_path, **{setting: value})


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("beta", 0.0, "beta is a positive number; received 0.0"),
        ("beta", float("nan"), "beta is a positive number; received nan"),
        ("beta", float("inf"), "beta is a positive number; received inf"),
        ("anchor", 1.5, r"anchor lies in \[0, 1\]; received 1.5"),
        ("eval_fraction", 1.0, r"eval_fraction lies in \[0, 1\); received 1.0"),
        ("groups_per_step", 0, "groups_per_step is positive; received 0"),
        ("max_tokens_per_micro_batch", -5, "max_tokens_per_micro_batch is positive; received -5"),
        ("shuffle_window", 0, "shuffle_window is positive; received 0"),
        ("eval_strategy", "sometimes", "sometimes is not a valid IntervalStrategy"),
        ("lr_scheduler_type", "wavy", "wavy.* is not a valid SchedulerType"),
        ("optim", "imaginary", "imaginary is not a valid OptimizerNames"),
    ],
)
def test_settings_out_of_range_are_refused(
    tmp_path: Path, setting: str, value: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, **{setting: value})


@pytest.mark.parametrize("logger", ["nothing_known", "dvclive"])
def test_missing_loggers_are_named(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, logger: str
) -> None:
    """One does not exist, the other is not installed."""
    if importlib.util.find_spec(logger):
        pytest.skip(f"{logger} is installed")
    with pytest.raises(ConfigError, match=logger):
        trainer_of(tiny_model_dir, dataset, tmp_path, report_to=logger)


@pytest.mark.parametrize("steps", [{"num_train_epochs": 0}, {"num_train_epochs": -1.0}])
def test_a_run_has_at_least_one_step(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, steps: dict[str, float]
) -> None:
    with pytest.raises(ConfigError, match="num_train_epochs is above 0"):
        trainer_of(tiny_model_dir, dataset, tmp_path, **steps)


def test_a_folder_with_anything_in_it_is_refused(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A model's folder, a dataset's folder, a folder with notes. Loggers' folders are allowed."""
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "todo.txt").write_text("x")
    foreign = tmp_path / "foreign"
    (foreign / "checkpoint-3").mkdir(parents=True)
    (foreign / "checkpoint-3" / "model.safetensors").write_bytes(b"somebody's work")
    for folder in (model, dataset.root, notes, foreign):
        before = sorted(folder.rglob("*"))
        with pytest.raises(ConfigError, match="a new run's output_dir is empty"):
            trainer_of(tiny_model_dir, dataset, folder).train()
        assert sorted(folder.rglob("*")) == before
    (tmp_path / "out" / "runs").mkdir(parents=True)
    trainer_of(tiny_model_dir, dataset, tmp_path / "out").train()


def test_groups_without_reference_are_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    root = unscored_dataset(tmp_path / "data", tiny_model_dir, groups=make_groups(4, scored=False))
    with pytest.raises(ConfigError, match="Run `gvpo-offline reference`"):
        trainer_of(tiny_model_dir, str(root), tmp_path / "out")
