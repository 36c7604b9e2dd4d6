"""Runs on several datasets: draws, logged epochs, and refused combinations."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.builders import make_group
from support.fork_server import ForkServer
from support.training import (
    VOCAB_SIZE,
    score,
    scored_dataset,
    trainer_of,
    unscored_dataset,
    weights_of,
)

from gvpo_offline import DatasetSettings
from gvpo_offline.errors import ConfigError, GVPOError, IntegrityError, ResumeError
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.writer import publish

SIZES = {"one": 16, "two": 24}


def groups_named(name: str, n: int) -> list[Any]:
    return [
        make_group(
            i, seed=len(name) + n, vocab_size=VOCAB_SIZE, scored=False, group_id=f"{name}-{i}"
        )
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def datasets(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path
) -> dict[str, GroupDataset]:
    """Datasets of 16 and 24 groups, scored under the same reference."""
    return {
        name: scored_dataset(
            tmp_path_factory.mktemp("mix") / name, tiny_model_dir, groups=groups_named(name, n)
        )
        for name, n in SIZES.items()
    }


def settings_of(datasets: dict[str, GroupDataset], **changes: dict[str, Any]) -> list[Any]:
    return [
        DatasetSettings(path=str(dataset.root), **changes.get(name, {}))
        for name, dataset in datasets.items()
    ]


def drawn(trainer: Any) -> list[str]:
    steps = trainer.train_dataset
    return [group.group_id for step in range(len(steps)) for group in steps.global_batch(step)]


def test_without_weights_each_group_comes_once_an_epoch(
    datasets: dict[str, GroupDataset], tiny_model_dir: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(tiny_model_dir, list(datasets.values()), tmp_path, num_train_epochs=3)
    found = drawn(trainer)
    assert len(found) == 3 * 40
    for epoch in range(3):
        assert len(set(found[40 * epoch : 40 * epoch + 40])) == 40


def test_weights_share_out_the_draws_and_epochs_are_reported(
    datasets: dict[str, GroupDataset], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """With weights 3 and 1, a cycle of 128 draws has 96 of the first dataset (16 groups) and 32 of
    the second (24 groups). The order within a cycle is random, so a whole cycle is drawn.
    """
    mixed = settings_of(datasets, one={"weight": 3.0}, two={"weight": 1.0})
    trainer = trainer_of(tiny_model_dir, mixed, tmp_path, max_steps=16, learning_rate=1e-3)
    counts = Counter(name.split("-")[0] for name in drawn(trainer))
    assert counts == {"one": 96, "two": 32}
    trainer.train()
    last = [line for line in trainer.state.log_history if "epoch_one" in line][-1]
    assert last["epoch_one"] == 96 / 16
    assert last["epoch_two"] == 32 / 24
    assert last["epoch"] == pytest.approx(128 / 40)


def test_a_mix_of_one_dataset_is_a_run_on_that_dataset(
    datasets: dict[str, GroupDataset], tiny_model_dir: Path, tmp_path: Path
) -> None:
    alone = trainer_of(tiny_model_dir, datasets["two"], tmp_path / "a")
    listed = trainer_of(tiny_model_dir, settings_of({"two": datasets["two"]}), tmp_path / "b")
    assert drawn(alone) == drawn(listed)
    assert alone.identity() == listed.identity()


def test_a_mix_resumes_exactly_and_refuses_other_weights(
    datasets: dict[str, GroupDataset], tiny_model_dir: Path, tmp_path: Path
) -> None:
    mixed = settings_of(datasets, one={"weight": 1.0}, two={"weight": 1.0})
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "eval_fraction": 0.2}
    whole = trainer_of(tiny_model_dir, mixed, tmp_path, **settings)
    whole.train()
    metrics = whole.evaluate()
    assert {"eval_one_loss", "eval_two_loss"} <= metrics.keys()
    again = trainer_of(tiny_model_dir, mixed, tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    mine, theirs = weights_of(again), weights_of(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    other = settings_of(datasets, one={"weight": 1.0}, two={"weight": 2.0})
    trainer = trainer_of(tiny_model_dir, other, tmp_path, **settings)
    with pytest.raises(ResumeError, match=r"data.dataset 2: weight: 1.0 then, 2.0 now"):
        trainer.train(resume_from_checkpoint=True)


def test_a_mix_from_the_command_line(
    datasets: dict[str, GroupDataset], tiny_model_dir: Path, tmp_path: Path, server: ForkServer
) -> None:
    listed = [{"path": str(d.root), "weight": 1 + i} for i, d in enumerate(datasets.values())]
    config = tmp_path / "train.yaml"
    config.write_text(json.dumps({"datasets": listed, "eval_datasets": listed[:1]}))
    out = tmp_path / "out"
    settings = {
        "model_name_or_path": tiny_model_dir,
        "output_dir": out,
        "max_steps": 2,
        "groups_per_step": 6,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    status, output = server.run(["train", "--config", str(config), *flags])
    assert status == 0, output
    assert "one: 33.33% of the draws" in output
    saved = json.loads((out / "gvpo_run.json").read_text())
    assert [item["weight"] for item in saved["data"]["datasets"]] == [1, 2]
    state = json.loads((out / "trainer_state.json").read_text())
    assert any("eval_loss" in line for line in state["log_history"])


def refused(data: Any, model_dir: Path, out: Path) -> GVPOError:
    """The error that is raised before the first step."""
    with pytest.raises(GVPOError) as caught:
        trainer_of(model_dir, data, out)
    return caught.value


def test_a_dataset_without_the_reference_is_refused(
    datasets: dict[str, GroupDataset], tiny_model_dir: Path, tmp_path: Path
) -> None:
    bare = unscored_dataset(tmp_path / "bare", tiny_model_dir, 8)
    error = refused([datasets["one"], str(bare)], tiny_model_dir, tmp_path / "out")
    assert isinstance(error, ConfigError)
    assert "log-probs of one reference" in str(error)
    assert str(bare) in str(error)


def test_datasets_with_different_references_are_refused(
    datasets: dict[str, GroupDataset], tiny_model_dir: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    tensors = load_file(other / "model.safetensors")
    save_file(
        {k: 1.5 * v for k, v in tensors.items()}, other / "model.safetensors", {"format": "pt"}
    )
    root = unscored_dataset(tmp_path / "two", tiny_model_dir, 8)
    scored = score(root, other)
    error = refused([datasets["one"], scored], tiny_model_dir, tmp_path / "out")
    assert "scored under the same reference" in str(error)
    assert str(root) in str(error)


def test_datasets_with_different_tokenizers_are_refused(
    datasets: dict[str, GroupDataset], tiny_model_dir: Path, tmp_path: Path
) -> None:
    data = scored_dataset(tmp_path / "two", tiny_model_dir, 8)
    assert data.manifest.tokenizer is not None
    foreign = data.manifest.tokenizer.model_copy(update={"fingerprint": "0" * 64})
    publish(data.root, lambda newest: newest.model_copy(update={"tokenizer": foreign}))  # type: ignore[union-attr]
    error = refused([datasets["one"], open_dataset(data.root)], tiny_model_dir, tmp_path / "out")
    assert isinstance(error, IntegrityError)
    assert "tokenizer" in str(error)


def test_invalid_weights_and_names_are_refused(
    datasets: dict[str, GroupDataset], tiny_model_dir: Path, tmp_path: Path
) -> None:
    zero = settings_of(datasets, one={"weight": 0.0}, two={"weight": 0.0})
    assert "sum to more than zero" in str(refused(zero, tiny_model_dir, tmp_path))
    some = settings_of(datasets, one={"weight": 1.0})
    assert "every dataset of a run has a weight or none" in str(
        refused(some, tiny_model_dir, tmp_path)
    )
    twice = [datasets["one"], datasets["one"]]
    assert "datasets of a run have different names" in str(refused(twice, tiny_model_dir, tmp_path))
    assert "at least one dataset" in str(refused([], tiny_model_dir, tmp_path))
    with pytest.raises(ConfigError, match="non-negative"):
        DatasetSettings(path="x", weight=-1.0)
