"""Runs that hold out prompts, and runs of earlier versions, which held out groups by their ids."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.builders import make_group
from support.training import (
    VOCAB_SIZE,
    config_of,
    same_weights,
    scored_dataset,
    trainer_of,
    weights_of,
)

from gvpo_offline import GVPOTrainer
from gvpo_offline.commands.run_file import with_run_settings
from gvpo_offline.commands.settings import EvaluateConfig
from gvpo_offline.commands.train import run_train
from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError, ResumeError
from gvpo_offline.group import Group
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.stream.settings import DataSettings
from gvpo_offline.stream.view import DatasetView
from gvpo_offline.train.checkpoint import RUN_FILE, SEAL_NAME
from gvpo_offline.train.settings import LoraSettings, RunSettings

BEFORE = Path(__file__).parents[1] / "data" / "before"
# Epochs rather than steps, so that the number of steps depends on the rule.
RUN: dict[str, Any] = {
    "eval_fraction": 0.3,
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 2,
}


def prompted(number: int, prompt: int, name: str = "group") -> Group:
    ids = np.array([prompt, 100 + prompt, 7], np.int32)
    group = make_group(number, vocab_size=VOCAB_SIZE, scored=False, prompt_token_ids=ids)
    return replace(group, group_id=f"{name}-{number}")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    """Three steps of a trainer's log: 12 prompts, each in three groups."""
    groups = [prompted(number, number % 12) for number in range(36)]
    return scored_dataset(tmp_path_factory.mktemp("data") / "d", tiny_model_dir, groups=groups)


def prompts_of(view: DatasetView) -> set[bytes]:
    rows = [view.summary_table(number)[1] for number in range(view.dataset.n_row_groups)]
    return {
        view.groups(number)[row].prompt_token_ids.tobytes()
        for number, own in enumerate(rows)
        for row in (range(len(view.groups(number))) if own is None else own)
    }


def both_sides(trainer: GVPOTrainer) -> set[bytes]:
    """The prompts that are trained on and held out."""
    trained = set[bytes]().union(*map(prompts_of, trainer.data.views))
    return trained & set[bytes]().union(*map(prompts_of, trainer.data.held_out.values()))


def messages(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if words in r.getMessage()]


def test_a_run_says_how_many_groups_share_a_prompt(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, eval_fraction=0.3)
    assert not both_sides(trainer)
    (view,) = trainer.data.held_out.values()
    n_held = len(prompts_of(view))
    assert view.n_groups == 3 * n_held
    with caplog.at_level(logging.INFO, "gvpo_offline"):
        trainer.preflight()
    (line,) = messages(caplog, "share their prompt")
    assert f"by prompt: {n_held} of 12 prompts are held out, {3 * n_held} of 36 groups" in line
    assert "36 of 36 groups share their prompt with another group" in line


def test_a_prompt_of_two_datasets_of_a_mix_is_on_one_side(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The second dataset has prompts 6 to 17, of which 6 to 11 are in the first as well."""
    groups = [prompted(number, 6 + number % 12, "other") for number in range(24)]
    other = scored_dataset(tmp_path / "other", tiny_model_dir, groups=groups)
    mix = {"one": dataset, "two": other}
    trainer = trainer_of(tiny_model_dir, mix, tmp_path / "out", eval_fraction=0.4)
    assert set(trainer.data.held_out) == {"one", "two"}
    assert not both_sides(trainer)
    by_group = trainer_of(
        tiny_model_dir, mix, tmp_path / "by", eval_fraction=0.4, held_out_by="group"
    )
    assert both_sides(by_group)


def test_prompts_of_a_separate_dataset_that_are_trained_on_are_counted(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """10 prompts for evaluation, 8 to 17, of which 8 to 11 are trained on; and 3 others."""
    some = [prompted(number, 8 + number % 10, "seen") for number in range(20)]
    none = [prompted(number, 50 + number, "new") for number in range(3)]
    seen, new = (
        scored_dataset(tmp_path / str(number), tiny_model_dir, groups=groups)
        for number, groups in enumerate((some, none))
    )
    held_out = {"seen": seen, "new": new}
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path / "out", eval_dataset=held_out)
    trainer.preflight()
    (line,) = messages(caplog, "are trained on as well")
    assert line.startswith("seen: 4 of 10 prompts for evaluation are trained on as well")
    caplog.clear()
    trainer.evaluate(eval_dataset=seen)
    assert len(messages(caplog, "4 of 10 prompts for evaluation")) == 1


# ---- runs of earlier versions ----


@pytest.fixture(scope="module")
def earlier(
    tmp_path_factory: pytest.TempPathFactory, dataset: GroupDataset, tiny_model_dir: Path
) -> GVPOTrainer:
    """A finished run by group ids. Its seals say no more than those of earlier versions."""
    out = tmp_path_factory.mktemp("earlier")
    trainer = trainer_of(tiny_model_dir, dataset, out, held_out_by="group", **RUN)
    trainer.train()
    return trainer


def last_but_one(out: Path) -> Path:
    steps = sorted(int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*"))
    return out / f"checkpoint-{steps[-2]}"


def test_a_seal_by_group_is_that_of_an_earlier_version(earlier: GVPOTrainer) -> None:
    out = Path(str(earlier.args.output_dir))
    now = json.loads((last_but_one(out) / SEAL_NAME).read_text())["identity"]["data"]
    then = json.loads((BEFORE / "run" / "checkpoint-2" / SEAL_NAME).read_text())["identity"]["data"]
    assert now.keys() == then.keys()
    assert both_sides(earlier)


def test_an_earlier_run_resumes_by_its_own_rule(
    earlier: GVPOTrainer,
    dataset: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It ends in the same weights, after the same number of steps, with the same metrics."""
    checkpoint = str(last_but_one(Path(str(earlier.args.output_dir))))
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, **RUN)
    assert trainer.data.held_out_by == "prompt"
    steps_by_prompt = trainer.args.max_steps
    with caplog.at_level(logging.INFO, "gvpo_offline"):
        result = trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.data.held_out_by == "group"
    assert result.global_step == earlier.state.global_step != steps_by_prompt
    assert trainer.state.epoch == earlier.state.epoch
    assert same_weights(weights_of(trainer), weights_of(earlier))
    assert trainer.evaluate()["eval_loss"] == earlier.evaluate()["eval_loss"]
    assert messages(caplog, "held-out prompts are trained on as well")
    # Its own checkpoints go on by the same rule.
    again = trainer_of(tiny_model_dir, dataset, tmp_path, **RUN)
    again.train(resume_from_checkpoint=True)
    assert again.data.held_out_by == "group"


def test_a_rule_that_is_given_is_not_replaced(
    earlier: GVPOTrainer, dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    checkpoint = str(last_but_one(Path(str(earlier.args.output_dir))))
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, held_out_by="prompt", **RUN)
    with pytest.raises(ResumeError, match=r"data.held_out_by: 'group' then, 'prompt' now"):
        trainer.train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ConfigError, match="held_out_by is auto, prompt or group"):
        config_of(tmp_path, held_out_by="hash")


def run_command(model: Path, data: Path, out: Path, resume: Any = False, **changes: Any) -> None:
    run_train(
        model=ModelSettings(str(model)),
        data=DataSettings(dataset=str(data)),
        lora=LoraSettings(),
        run=RunSettings(resume_from_checkpoint=resume),
        args=config_of(out, **RUN, **changes),
    )


def recorded(out: Path) -> tuple[str, str | None]:
    content = json.loads((out / RUN_FILE).read_text())
    return content["training"]["held_out_by"], content["identity"]["data"].get("held_out_by")


def test_the_run_file_says_which_rule(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """`evaluate` follows it; a run file that does not say is of an earlier version."""
    new, old = tmp_path / "new", tmp_path / "old"
    run_command(tiny_model_dir, dataset.folder, new)
    assert recorded(new) == ("prompt", "prompt")
    assert with_run_settings(EvaluateConfig(str(new))).held_out_by == "prompt"
    run_command(tiny_model_dir, dataset.folder, old, held_out_by="group")
    content = json.loads((old / RUN_FILE).read_text())
    del content["training"]["held_out_by"]
    (old / RUN_FILE).write_text(json.dumps(content))
    assert with_run_settings(EvaluateConfig(str(old))).held_out_by == "group"
    run_command(tiny_model_dir, dataset.folder, old, resume=True)
    assert recorded(old) == ("group", None)
