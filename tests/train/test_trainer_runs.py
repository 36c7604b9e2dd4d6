"""Epochs and callbacks of a run, forms of datasets, adapters, and damaged data."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.builders import training_table
from support.training import (
    lines_of,
    same_weights,
    scored_dataset,
    trainer_of,
    weights_of,
)
from transformers import AutoModelForCausalLM, TrainerCallback

from gvpo_offline import GVPOConfig, GVPOTrainer
from gvpo_offline.errors import ConfigError, DataError, IntegrityError, ResumeError
from gvpo_offline.group import Group
from gvpo_offline.store.dataset import GroupDataset

N_GROUPS = 24
LORA = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.5, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, N_GROUPS)


@pytest.fixture(scope="module")
def parquet_file(tmp_path_factory: pytest.TempPathFactory, dataset: GroupDataset) -> Path:
    """The same groups in one self-contained Parquet file, as another program would write it."""
    path = tmp_path_factory.mktemp("file") / "groups.parquet"
    pq.write_table(training_table(groups_of(dataset)), path, row_group_size=4)
    return path


def groups_of(dataset: GroupDataset) -> list[Group]:
    return [group for index in range(dataset.n_row_groups) for group in dataset.groups(index)]


class Diary(TrainerCallback):
    """Records events with their step and epoch."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, float | None]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            epoch = None if state.epoch is None else round(state.epoch, 4)
            self.events.append((name, state.global_step, epoch))

        return note

    def steps(self, name: str) -> list[int]:
        """The steps of an event."""
        return [step for event, step, _ in self.events if event == name]


# ---- epochs and callbacks ----


def test_actions_of_each_epoch_happen_at_its_last_step(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """24 groups in steps of 7 for 2.5 epochs, which are 60 draws. The first epoch is complete at
    step 4 (28 draws), the second at step 7 (49 draws), and the run ends at step 9.
    """
    diary = Diary()
    each = {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}
    trainer = trainer_of(
        tiny_model_dir,
        dataset,
        tmp_path,
        eval_dataset=dataset,
        callbacks=[diary],
        groups_per_step=7,
        num_train_epochs=2.5,
        **each,
    )
    trainer.train()
    for event in ("on_evaluate", "on_save"):
        assert diary.steps(event) == [4, 7, 9]
    assert len(lines_of(trainer)) == 3
    assert len(lines_of(trainer, "eval_loss")) == 3
    names = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert names == {"checkpoint-4", "checkpoint-7", "checkpoint-9"}


def test_an_epoch_that_ends_with_the_run_is_handled_once(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    diary = Diary()
    trainer = trainer_of(
        tiny_model_dir,
        dataset,
        tmp_path,
        eval_dataset=dataset,
        callbacks=[diary],
        num_train_epochs=2,
        eval_strategy="epoch",
        save_strategy="epoch",
        eval_delay=2,
    )
    trainer.train()
    assert diary.steps("on_save") == [3, 6]
    assert diary.steps("on_evaluate") == [6]  # not before epoch 2


def test_callbacks_see_epochs_as_fractions_of_the_groups(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    diary = Diary()
    trainer = trainer_of(
        tiny_model_dir, dataset, tmp_path, callbacks=[diary], num_train_epochs=2, groups_per_step=9
    )
    trainer.train()
    ends = [(step, epoch) for event, step, epoch in diary.events if event == "on_step_end"]
    assert ends == [(s, round(min(9 * s, 48) / 24, 4)) for s in range(1, 7)]
    assert {event for event, _, _ in diary.events} >= {
        "on_init_end",
        "on_train_begin",
        "on_epoch_begin",
        "on_step_begin",
        "on_pre_optimizer_step",
        "on_optimizer_step",
        "on_log",
        "on_train_end",
    }


def test_a_callback_may_end_the_run(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    class Enough(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= 2

    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, callbacks=[Enough()])
    assert trainer.train().global_step == 2


def test_the_best_model_is_loaded_at_the_end(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The metric is the lowest explained variance, so that the best model is not the last."""
    trainer = trainer_of(
        tiny_model_dir,
        dataset,
        tmp_path,
        eval_dataset=dataset,
        num_train_epochs=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="pair_accuracy",
        greater_is_better=False,
    )
    trainer.train()
    found = lines_of(trainer, "eval_pair_accuracy")
    assert found.index(min(found)) == 0
    assert trainer.state.best_metric == min(found)
    assert Path(trainer.state.best_model_checkpoint or "").name == "checkpoint-2"
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2", dtype=torch.float32)
    assert same_weights(weights_of(trainer), best.state_dict())
    assert trainer.evaluate()["eval_pair_accuracy"] == min(found)


# ---- forms of datasets ----


def test_all_forms_of_a_dataset_train_alike(
    dataset: GroupDataset, parquet_file: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The same groups in the same row groups, as a folder (str or Path), an open dataset, a file,
    and a dataset in memory.
    """
    in_memory = datasets.Dataset.from_parquet(str(parquet_file), cache_dir=str(tmp_path / "cache"))
    losses = {}
    for name, data in {
        "opened": dataset,
        "path": dataset.root,
        "text": str(dataset.root),
        "file": str(parquet_file),
        "memory": in_memory,
    }.items():
        trainer = trainer_of(tiny_model_dir, data, tmp_path / name, groups_per_step=N_GROUPS)
        trainer.train()
        losses[name] = lines_of(trainer)
    for found in losses.values():
        assert found == pytest.approx(losses["opened"], rel=1e-6)


def test_temporary_files_are_for_data_in_memory_alone(
    dataset: GroupDataset,
    parquet_file: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run on a folder has no temporary files; a trainer removes its own at its end."""
    in_memory = datasets.Dataset.from_parquet(str(parquet_file), cache_dir=str(tmp_path / "cache"))
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))

    def folders_of(data: Any) -> tuple[int, int]:
        """Temporary folders of this package while a trainer exists, and after it."""
        trainer = trainer_of(tiny_model_dir, data, tmp_path / "out")
        during = len(list((tmp_path / "scratch").glob("gvpo-offline-*")))
        del trainer
        gc.collect()
        return during, len(list((tmp_path / "scratch").glob("gvpo-offline-*")))

    assert folders_of(dataset) == (0, 0)
    assert folders_of(str(parquet_file)) == (0, 0)
    assert folders_of(in_memory) == (1, 0)


def test_other_types_of_datasets_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a dataset is a folder or its URL, a Parquet file"):
        trainer_of(tiny_model_dir, [1, 2], tmp_path)
    with pytest.raises(DataError, match="folder that holds a manifest"):
        trainer_of(tiny_model_dir, str(tmp_path / "nowhere"), tmp_path)


def test_evaluation_of_several_datasets(
    dataset: GroupDataset, parquet_file: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    named = {"mine": dataset, "theirs": str(parquet_file)}
    trainer = trainer_of(
        tiny_model_dir, dataset, tmp_path, eval_dataset=named, eval_strategy="epoch"
    )
    trainer.train()
    (mine,) = lines_of(trainer, "eval_mine_loss")
    (theirs,) = lines_of(trainer, "eval_theirs_loss")
    assert mine == pytest.approx(theirs, rel=1e-6)
    assert trainer.evaluate("mine")["eval_loss"] == mine
    assert trainer.evaluate(dataset, metric_key_prefix="test")["test_loss"] == mine
    with pytest.raises(ConfigError, match="evaluation needs held-out groups"):
        trainer_of(tiny_model_dir, dataset, tmp_path / "other").evaluate()


def test_evaluation_without_groups_is_refused_before_training(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    for options, message in (
        ({"eval_strategy": "epoch"}, "set eval_fraction, or pass an eval_dataset"),
        ({"eval_fraction": 1e-9}, "eval_fraction holds out at least one group"),
    ):
        with pytest.raises(ConfigError, match=message[1:]):
            trainer_of(tiny_model_dir, dataset, tmp_path, **options)
    with pytest.raises(DataError, match="a run has at least one group"):
        trainer_of(tiny_model_dir, dataset, tmp_path, eval_fraction=1 - 1e-9)


def test_model_and_data_are_enough_for_a_trainer(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The trainer does not change the caller's arguments, so that a second trainer with the same
    arguments runs like the first.
    """
    args = GVPOConfig(output_dir=str(tmp_path), groups_per_step=7, use_cpu=True, save_strategy="no")
    before = args.to_dict()
    draws = []
    for _ in range(2):
        trainer = GVPOTrainer(str(tiny_model_dir), args, train_dataset=dataset)
        draws.append(trainer.data.n_draws)
        assert trainer.train().global_step == 11  # 72 groups in steps of 7
        assert args.to_dict() == before
    assert draws == [72, 72]


# ---- adapters ----


def test_an_adapter_alone_is_trained_and_starts_at_the_reference(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    trainer = trainer_of(
        tiny_model_dir, dataset, tmp_path, peft_config=LoraConfig(**LORA), learning_rate=0.05
    )
    start = weights_of(trainer)
    trainer.train()
    assert lines_of(trainer, "log_ratio_std")[0] < 1e-5
    assert lines_of(trainer, "log_ratio_std")[2] > 1e-3
    changed = {name for name, t in weights_of(trainer).items() if not torch.equal(t, start[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    saved = {k: v for k, v in loaded.state_dict().items() if "lora_" in k}
    mine = {k: v for k, v in weights_of(trainer).items() if "lora_" in k}
    assert saved.keys() == mine.keys()
    assert all(torch.equal(saved[k], mine[k]) for k in saved)
    # The base weights have other names inside the PEFT model.
    inner = {k.replace("base_layer.", "").split("model.", 1)[1]: v for k, v in start.items()}
    assert all(torch.equal(inner[k], v) for k, v in before.items() if k in inner)


def test_an_adapter_resumes_exactly(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    def lora(**changes: Any) -> GVPOTrainer:
        settings = LoraConfig(**{**LORA, **changes})
        options = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
        out = tmp_path / "out"
        return trainer_of(tiny_model_dir, dataset, out, peft_config=settings, **options)

    whole = lora()
    whole.train()
    resumed = lora()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert same_weights(weights_of(whole), weights_of(resumed))
    with pytest.raises(ResumeError, match=r"adapter\.default\.lora_alpha: '16' then, '32' now"):
        lora(lora_alpha=32).train(resume_from_checkpoint=True)
    # The same adapter on another base is another policy, which must not resume.
    other = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1.0
    options = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    trainer = trainer_of(
        other, dataset, tmp_path / "out", peft_config=LoraConfig(**LORA), **options
    )
    with pytest.raises(ResumeError, match=r"model\.frozen_weights"):
        trainer.train(resume_from_checkpoint=True)


def test_a_peft_model_can_be_passed(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(**LORA))
    trainer = trainer_of(model, dataset, tmp_path, learning_rate=0.05)
    trainer.train()
    assert lines_of(trainer, "log_ratio_std")[0] < 1e-5
    assert lines_of(trainer, "log_ratio_std")[2] > 1e-3


def test_a_trained_policy_loads_as_a_model(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert same_weights(loaded.state_dict(), weights_of(trainer))
    assert (tmp_path / "tokenizer.json").is_file()


# ---- invalid or damaged data ----


def test_token_ids_beyond_the_models_are_named(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A file of another program has no tokenizer fingerprint; row 5 has the token id 5,000."""
    groups = groups_of(dataset)[:8]
    table = training_table(groups).drop_columns(["prompt_hash"])
    ids = table.column("prompt_token_ids").to_pylist()
    ids[5][0] = 5000
    at = table.column_names.index("prompt_token_ids")
    field = table.schema.field("prompt_token_ids")
    path = tmp_path / "foreign.parquet"
    pq.write_table(table.set_column(at, field, pa.array(ids, field.type)), path)
    with pytest.raises(DataError, match=r"foreign\.parquet, row 5, group .*5000") as error:
        trainer_of(tiny_model_dir, str(path), tmp_path / "out")
    assert error.value.group == groups[5].group_id


@pytest.mark.parametrize("workers", [0, 1])
def test_a_flipped_bit_in_the_middle_of_a_run_is_named(
    tiny_model_dir: Path, tmp_path: Path, workers: int
) -> None:
    """The bit is in the tokens, which nothing reads before the first step with verify: size. It is
    found in the main process or in a data loader worker.
    """
    data = scored_dataset(tmp_path / "data", tiny_model_dir, 8)
    path = data.root / data.manifest.groups[0].path
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(1)
    tokens = next(
        column.column(i)
        for i in range(column.num_columns)
        if column.column(i).path_in_schema.startswith("response_token_ids")
    )
    content[tokens.data_page_offset + tokens.total_compressed_size - 2] ^= 1
    path.write_bytes(bytes(content))
    options = {"verify": "size", "dataloader_num_workers": workers}
    trainer = trainer_of(tiny_model_dir, data.root, tmp_path / "out", **options)
    with pytest.raises(IntegrityError, match="row group 1") as error:
        trainer.train()
    assert error.value.file == str(path)
