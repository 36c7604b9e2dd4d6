"""The best checkpoint of a resumed run, the rotation of checkpoints, and predictions."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.training import same_weights, scored_dataset, trainer_of, weights_of
from transformers import AutoModelForCausalLM

from gvpo_offline import GVPOTrainer
from gvpo_offline.errors import ConfigError, ResumeError
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.checkpoint import rotate_sealed

# Six steps. The lowest pair_accuracy counts as the best, so that the best step is an early one.
SETTINGS: dict[str, Any] = {
    "num_train_epochs": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "pair_accuracy",
    "greater_is_better": False,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 24)


@pytest.fixture(scope="module")
def finished(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run that ended; its best checkpoint is that of step 2. Its state holds a path
    that is relative to the working directory of the run.
    """
    out = tmp_path_factory.mktemp("run") / "out"
    before = Path.cwd()
    os.chdir(out.parent)
    try:
        trainer = run_of(dataset, tiny_model_dir, Path("out"))
        trainer.train()
    finally:
        os.chdir(before)
    assert trainer.state.best_model_checkpoint == "out/checkpoint-2"
    return out


def run_of(dataset: GroupDataset, model: Path, out: Path, **changes: Any) -> GVPOTrainer:
    settings = {**SETTINGS, **changes}
    return trainer_of(model, dataset, out, eval_dataset=dataset, **settings)


def names_in(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("checkpoint-*"))


@pytest.mark.parametrize("step", [4, 6])
def test_a_moved_run_resumes_with_its_best_checkpoint(
    finished: Path, dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, step: int
) -> None:
    """From step 6 nothing is trained, and no further save looks for the best checkpoint."""
    moved = shutil.copytree(finished, tmp_path / "moved")
    trainer = run_of(dataset, tiny_model_dir, moved)
    trainer.train(resume_from_checkpoint=str(moved / f"checkpoint-{step}"))
    assert trainer.state.best_model_checkpoint == str(moved / "checkpoint-2")
    best = AutoModelForCausalLM.from_pretrained(moved / "checkpoint-2")
    assert same_weights(weights_of(trainer), best.state_dict())


def test_the_best_checkpoint_may_lie_beside_the_one_that_is_resumed(
    finished: Path, dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    trainer = run_of(dataset, tiny_model_dir, tmp_path / "new")
    trainer.train(resume_from_checkpoint=str(finished / "checkpoint-4"))
    assert trainer.state.best_model_checkpoint == str(finished / "checkpoint-2")


def test_a_lost_best_checkpoint_stops_the_run_before_it_goes_on(
    finished: Path, dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(finished, tmp_path / "moved")
    shutil.rmtree(moved / "checkpoint-2")
    trainer = run_of(dataset, tiny_model_dir, moved)
    before = weights_of(trainer)
    with pytest.raises(ResumeError, match=r"load_best_model_at_end needs .*checkpoint-2 back"):
        trainer.train(resume_from_checkpoint=str(moved / "checkpoint-4"))
    assert trainer.state.global_step == 4
    assert not same_weights(before, weights_of(trainer))  # those of step 4: nothing was trained
    other = run_of(dataset, tiny_model_dir, moved, load_best_model_at_end=False)
    other.train(resume_from_checkpoint=str(moved / "checkpoint-4"))  # the remedy in the error


# ---- rotation ----


def sealed(out: Path, *steps: int) -> None:
    """Complete checkpoints; the later the step, the older the folder."""
    for step in steps:
        folder = out / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "gvpo_checkpoint.json").write_text("{}")
        os.utime(folder, (10_000 - step, 10_000 - step))


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (None, [], [5, 10, 15, 100]),
        (0, [], [5, 10, 15, 100]),
        (2, [], [15, 100]),
        (2, ["checkpoint-5"], [5, 100]),
        (1, ["checkpoint-10", "checkpoint-5"], [5, 10]),
        (4, [], [5, 10, 15, 100]),
    ],
)
def test_rotation_goes_by_step(
    tmp_path: Path, limit: int | None, keep: list[str], left: list[int]
) -> None:
    sealed(tmp_path, 5, 10, 15, 100)
    (tmp_path / "checkpoint-3-notes").mkdir()
    (tmp_path / "checkpoint-4").mkdir()  # not a complete checkpoint
    rotate_sealed(tmp_path, limit, keep)
    expected = [f"checkpoint-{step}" for step in left] + ["checkpoint-3-notes", "checkpoint-4"]
    assert names_in(tmp_path) == sorted(expected)


def test_a_copied_run_keeps_its_newest_steps(
    finished: Path, dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The times of modification say the opposite of the steps. Kept: the best, and the newest."""
    moved = shutil.copytree(finished, tmp_path / "moved")
    for step in (2, 4, 6):
        os.utime(moved / f"checkpoint-{step}", (10_000 - step, 10_000 - step))
    (moved / "checkpoint-1-notes").mkdir()
    shutil.rmtree(moved / "checkpoint-6")
    trainer = run_of(dataset, tiny_model_dir, moved, save_total_limit=2)
    trainer.train(resume_from_checkpoint=True)
    assert names_in(moved) == ["checkpoint-1-notes", "checkpoint-2", "checkpoint-6"]
    shutil.rmtree(moved / "checkpoint-6")
    shutil.copytree(finished / "checkpoint-4", moved / "checkpoint-4")
    one = run_of(dataset, tiny_model_dir, moved, save_total_limit=1)
    one.train(resume_from_checkpoint=True)
    assert names_in(moved) == ["checkpoint-1-notes", "checkpoint-2"]


# ---- predict ----


def test_predict_gives_the_log_ratio_of_each_response(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The policy is the reference with larger embeddings. Of the flat arrays, each group has the
    rows of its responses in stored order; the mean log-ratio is that of the metrics, and every
    log-ratio is the engine's log-prob of the response minus that of the reference.
    """
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, eval_fraction=0.3, groups_per_step=5)
    trainer.model.get_input_embeddings().weight.data.mul_(1.2)
    found = trainer.predict(dataset)
    groups = [group for i in range(dataset.n_row_groups) for group in dataset.groups(i)]
    assert found.group_ids.tolist() == [g.group_id for g in groups for _ in g.samplers]
    assert found.samplers.tolist() == [name for g in groups for name in g.samplers]
    rewards = np.concatenate([g.rewards for g in groups if g.rewards is not None])
    assert found.label_ids.tolist() == rewards.tolist()
    assert found.predictions.dtype == found.label_ids.dtype == np.float64
    mean = found.metrics["test_log_ratio_mean"]
    # Sums of n terms in float64, in two orders, differ by at most n ulps of the largest sum.
    bound = len(rewards) * np.finfo(np.float64).eps * np.abs(found.predictions).sum()
    assert abs(found.predictions.mean() - mean) <= bound
    assert np.abs(found.predictions).max() > 0.01
    evaluated = trainer.evaluate(dataset, metric_key_prefix="test")
    assert {name: value for name, value in found.metrics.items() if "runtime" not in name} == {
        name: evaluated[name] for name in found.metrics if "runtime" not in name
    }
    for group in (groups[0], groups[-1]):
        logprobs = trainer.engine.seq_logprobs(trainer.model, [group], 1).detach().numpy()
        rows = found.group_ids == group.group_id
        # Passes with other groups sum float32 terms in another order: about 100 roundings each.
        bound = 100 * np.finfo(np.float32).eps * np.abs(logprobs).max()
        own = logprobs - group.ref_seq_logprobs
        assert np.abs(own - found.predictions[rows]).max() <= bound


def test_predict_reads_a_held_out_dataset_by_its_name(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """At the reference every log-ratio is 0, up to the rounding of a log-prob in float32."""
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, eval_dataset={"mine": dataset})
    found = trainer.predict("mine", metric_key_prefix="mine")
    assert np.abs(found.predictions).max() < 1e-4
    assert found.metrics["mine_log_ratio_std"] < 1e-4
    with pytest.raises(ConfigError, match="predict takes one dataset; received 2 datasets"):
        trainer.predict({"a": dataset, "b": dataset})
