"""Settings, arguments, methods and datasets that would have no effect: refused before training."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow.parquet as pq
import pytest
from support.builders import training_table
from support.training import config_of, scored_dataset, trainer_of
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.utils import is_liger_kernel_available

from gvpo_offline import GVPOConfig, GVPOTrainer
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.fields import HONOURED, REFUSED
from gvpo_offline.train.hooks import NEVER_CALLED

N_GROUPS = 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, N_GROUPS)


@pytest.fixture(scope="module")
def in_memory(dataset: GroupDataset, tmp_path_factory: pytest.TempPathFactory) -> datasets.Dataset:
    folder = tmp_path_factory.mktemp("memory")
    groups = [group for i in range(dataset.n_row_groups) for group in dataset.groups(i)]
    pq.write_table(training_table(groups), folder / "groups.parquet")
    return datasets.Dataset.from_parquet(
        str(folder / "groups.parquet"), cache_dir=str(folder / "cache")
    )


# ---- fields of TrainingArguments ----


def test_every_field_of_transformers_is_honoured_or_refused() -> None:
    honoured = [name for names in HONOURED.values() for name in names.split()]
    assert len(set(honoured)) == len(honoured)
    assert not set(honoured) & set(REFUSED)
    unknown = {field.name for field in fields(TrainingArguments)} - set(honoured) - set(REFUSED)
    assert not unknown, "transformers has new fields: say in train/fields.py what becomes of them"


OTHER_VALUES = {
    "train_sampling_strategy": "sequential",
    "length_column_name": "size",
    "label_names": ["labels"],
    "eval_accumulation_steps": 2,
    "include_for_metrics": ["loss"],
    "neftune_noise_alpha": 5.0,
    "label_smoothing_factor": 0.1,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_without_effect_is_refused(tmp_path: Path, name: str) -> None:
    """The value differs from the default: another bool, another number, or the one listed."""
    default = getattr(TrainingArguments(use_cpu=True), name)
    if name in OTHER_VALUES:
        value = OTHER_VALUES[name]
    else:
        value = not default if isinstance(default, bool) else default + 2
    with pytest.raises(ConfigError, match=f"^{name} is not used in GVPO training; received"):
        config_of(tmp_path, **{name: value})
    config_of(tmp_path, **{name: default})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_eval": True}, "received do_eval with eval_strategy no"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "found by evaluation"),
        ({"metric_for_best_model": "loss"}, "found by evaluation; received eval_strategy no"),
        ({"accelerator_config": {"split_batches": True}}, "with split_batches: True"),
        ({"accelerator_config": {"even_batches": False}}, "with even_batches: False"),
        ({"accelerator_config": "nowhere.json"}, "FileNotFoundError.*nowhere.json"),
        ({"accelerator_config": {"nothing": 1}}, "TypeError.*nothing"),
    ],
)
def test_combinations_without_effect_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, **settings)


def test_a_copy_of_a_configuration_may_stop_evaluating(tmp_path: Path) -> None:
    """transformers derives do_eval from eval_strategy; a copy must not keep it."""
    evaluating = config_of(tmp_path, eval_strategy="steps", eval_steps=1)
    assert replace(evaluating, eval_strategy="no").eval_strategy.value == "no"


@pytest.mark.skipif(is_liger_kernel_available(), reason="liger-kernel is installed")
def test_a_missing_liger_kernel_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use_liger_kernel needs the package liger-kernel"):
        config_of(tmp_path, use_liger_kernel=True)


def test_push_to_hub_without_a_hub_is_refused(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"push_to_hub makes a repository.*run `hf upload`"):
        trainer_of(tiny_model_dir, dataset, tmp_path, push_to_hub=True, hub_token="hf_x")


def test_resume_from_checkpoint_of_the_configuration_counts(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"groups_per_step": 4, "save_strategy": "steps", "save_steps": 1}
    trainer_of(tiny_model_dir, dataset, tmp_path, **settings).train()
    again = trainer_of(tiny_model_dir, dataset, tmp_path, resume_from_checkpoint="auto", **settings)
    assert again.train().global_step == 2
    with pytest.raises(ConfigError, match="a new run's output_dir is empty"):
        again.train(resume_from_checkpoint=False)


# ---- the metric of the best checkpoint ----

BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "eval_fraction": 0.5}


def test_a_metric_that_no_evaluation_gives_is_refused(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    for metric in ("accuracy", "eval_accuracy"):
        with pytest.raises(ConfigError, match=f"received {metric}. Set it to one of loss, expl"):
            trainer_of(tiny_model_dir, dataset, tmp_path, metric_for_best_model=metric, **BEST)
    for metric in ("pair_accuracy", "eval_loss"):
        trainer_of(tiny_model_dir, dataset, tmp_path, metric_for_best_model=metric, **BEST)


def test_in_a_mix_the_metric_has_the_name_of_a_dataset(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """transformers' default, loss, is given by no evaluation of two datasets."""
    mix = {"one": dataset, "two": dataset}
    settings: dict[str, Any] = {**BEST, "load_best_model_at_end": True, "groups_per_step": 16}
    with pytest.raises(ConfigError, match=r"received loss\..*one_loss.*two_loss"):
        trainer_of(tiny_model_dir, mix, tmp_path, **settings)
    trainer = trainer_of(
        tiny_model_dir, mix, tmp_path, metric_for_best_model="two_loss", **settings
    )
    trainer.train()
    assert trainer.state.best_metric == trainer.state.log_history[1]["eval_two_loss"]


# ---- arguments ----


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        ("tokenizer", "it is called processing_class"),
        ("ref_model", "`gvpo-offline reference` computes them"),
        ("reward_funcs", "`gvpo-offline reward` computes them"),
        ("compute_metrics", "override evaluate"),
        ("data_collator", "lays groups out itself"),
        ("beta", "beta is a setting: pass it to GVPOConfig"),
        ("train_datasett", r"did you mean train_dataset instead of train_datasett"),
    ],
)
def test_arguments_of_other_trainers_are_answered(
    dataset: GroupDataset, tiny_model_dir: Path, argument: str, answer: str
) -> None:
    with pytest.raises(ConfigError, match=f"(?i){answer}") as error:
        GVPOTrainer(str(tiny_model_dir), train_dataset=dataset, **{argument: None})
    assert f"received {argument}." in str(error.value)


def test_a_third_argument_by_position_is_answered(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    trainer: Any = GVPOTrainer
    with pytest.raises(ConfigError, match=r"takes model, args by position.*type GroupDataset"):
        trainer(str(tiny_model_dir), config_of(tmp_path), dataset)


@pytest.mark.parametrize("args", [{"beta": 1.0}, TrainingArguments(use_cpu=True), print])
def test_another_configuration_is_answered(
    dataset: GroupDataset, tiny_model_dir: Path, args: Any
) -> None:
    with pytest.raises(
        ConfigError, match=f"args is a GVPOConfig; received a {type(args).__name__}"
    ):
        GVPOTrainer(str(tiny_model_dir), args, train_dataset=dataset)


@pytest.mark.parametrize(
    ("setting", "answer"),
    [
        ("max_length", "no response is cut in training"),
        ("max_prompt_length", "no response is cut in training"),
        ("num_generations", "`gvpo-offline sample`"),
        ("epsilon", "there is no ratio"),
        ("train_dataset", "it is an argument of GVPOTrainer"),
        ("learning_rte", "did you mean learning_rate"),
        ("zzz", "leave zzz out"),
    ],
)
def test_settings_of_other_configurations_are_answered(setting: str, answer: str) -> None:
    with pytest.raises(ConfigError, match=f"(?i){answer}"):
        GVPOConfig(**{setting: 1})


# ---- methods ----


def test_an_overridden_method_that_is_never_called_is_refused(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = config_of(tmp_path)
    for name in NEVER_CALLED:
        kind = type("Mine", (GVPOTrainer,), {name: lambda self, *args, **kwargs: None})
        with pytest.raises(ConfigError, match=f"does not call {name}; received .*class Mine"):
            kind(str(tiny_model_dir), config, train_dataset=dataset)
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path)
    trainer.compute_loss = print
    with pytest.raises(ConfigError, match=r"does not call compute_loss; .*the trainer itself"):
        trainer.train()


CALLED = {
    "training_step",
    "get_train_dataloader",
    "get_batch_samples",
    "create_optimizer",
    "create_scheduler",
    "get_decay_parameter_names",
    "floating_point_ops",
    "log",
    "evaluate",
    "predict",
    "save_model",
}


def test_the_other_methods_are_called(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A subclass overrides every method of Trainer, and notes which ones a run calls."""
    called = set()

    def noting(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return getattr(super(kind, self), name)(*args, **kwargs)

        return method

    kind: Any = GVPOTrainer
    names = [
        name
        for name, value in vars(Trainer).items()
        if callable(value) and not name.startswith("__") and name not in NEVER_CALLED
    ]
    kind = type("Noting", (GVPOTrainer,), {name: noting(name) for name in names})
    config = config_of(tmp_path, groups_per_step=4, save_strategy="epoch", eval_strategy="epoch")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    trainer = kind(model, config, train_dataset=dataset, eval_dataset=dataset)
    for name in NEVER_CALLED:  # after the check at its construction
        setattr(kind, name, noting(name))
    kind.__module__ = "gvpo_offline.tests"  # as if of this package, so that train accepts it
    trainer.train()
    trainer.predict(dataset)
    assert called >= CALLED
    assert not called & set(NEVER_CALLED)


# ---- datasets ----


def test_of_a_dataset_dict_the_test_split_is_held_out(
    in_memory: datasets.Dataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of 8 groups, 6 are trained on and 2 are held out, in one step of 8 groups."""
    caplog.set_level(logging.INFO, "gvpo_offline")
    splits = datasets.DatasetDict(
        {"train": in_memory.select(range(6)), "test": in_memory.select(range(6, 8))}
    )
    trainer = trainer_of(tiny_model_dir, splits, tmp_path)
    assert [view.n_groups for view in trainer.data.views] == [6]
    assert {name: view.n_groups for name, view in trainer.data.held_out.items()} == {"": 2}
    assert "the split train is trained on, the split test is held out" in caplog.text
    given = trainer_of(tiny_model_dir, splits, tmp_path, eval_dataset=in_memory)
    assert {name: view.n_groups for name, view in given.data.held_out.items()} == {"": 8}
    assert "trained on; not used: test" in caplog.text
    three = datasets.DatasetDict({**splits, "validation": in_memory})
    trainer_of(tiny_model_dir, three, tmp_path)
    assert "the split validation is held out; not used: test" in caplog.text
    fraction = trainer_of(tiny_model_dir, splits, tmp_path, eval_fraction=0.5)
    assert sum(view.n_groups for view in fraction.data.views) < 6


def test_splits_that_nobody_chose_are_refused(
    in_memory: datasets.Dataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    splits = datasets.DatasetDict({"train": in_memory, "test": in_memory})
    with pytest.raises(ConfigError, match="received the splits test"):
        trainer_of(tiny_model_dir, datasets.DatasetDict({"test": in_memory}), tmp_path)
    with pytest.raises(ConfigError, match="eval_dataset is one split of a DatasetDict"):
        trainer_of(tiny_model_dir, in_memory, tmp_path, eval_dataset=splits)
    with pytest.raises(ConfigError, match="received one named train and one named test"):
        trainer_of(tiny_model_dir, {"train": in_memory, "test": in_memory}, tmp_path)
    trainer = trainer_of(tiny_model_dir, in_memory, tmp_path)
    for method in (trainer.evaluate, trainer.predict):
        with pytest.raises(ConfigError, match="the dataset to evaluate is one split"):
            method(splits)


@pytest.mark.parametrize(
    ("columns", "answer"),
    [
        (("prompt", "chosen", "rejected"), "preferences in TRL's format.*--format preference"),
        (("prompt", "completion", "label"), "unpaired preferences.*--format unpaired"),
        (("prompt", "ground_truth"), "prompts without responses.*`gvpo-offline sample`"),
        (("messages",), "conversations, as for supervised training"),
    ],
)
def test_the_shapes_of_trls_datasets_are_answered(
    tiny_model_dir: Path, tmp_path: Path, columns: tuple[str, ...], answer: str
) -> None:
    data = datasets.Dataset.from_dict({name: ["a", "b"] for name in columns})
    with pytest.raises(DataError, match=answer) as error:
        trainer_of(tiny_model_dir, data, tmp_path)
    assert "in-memory.parquet" not in str(error.value)


def test_errors_of_data_in_memory_name_no_temporary_file(
    in_memory: datasets.Dataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"^the Dataset in memory: .*no column rewards"):
        trainer_of(tiny_model_dir, in_memory.remove_columns("rewards"), tmp_path)


def test_later_messages_about_data_in_memory_name_no_temporary_file(
    in_memory: datasets.Dataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The warning of the tokenizer check, and an error of the check of token ids after it."""
    beyond = in_memory.map(
        lambda row: {"prompt_token_ids": [10_000, *row["prompt_token_ids"]]},
        remove_columns=[own for own in ("prompt_length", "n_tokens") if own in in_memory.features],
    ).remove_columns([own for own in ("prompt_hash",) if own in in_memory.features])
    with pytest.raises(DataError, match=r"^the Dataset in memory, row 0, group .*10000") as error:
        trainer_of(tiny_model_dir, beyond, tmp_path)
    assert error.value.file == "the Dataset in memory"
    assert "the tokenizers of the Dataset in memory and the policy" in caplog.text
    assert "gvpo-offline-" not in caplog.text
