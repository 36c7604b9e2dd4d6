"""Fresh answers at each evaluation of a run: metrics, best checkpoint, resuming, loggers, refusals.

The reward of the runs is the length of an answer's text in characters.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.fork_server import ForkServer
from support.sampled_answers import LENGTH, reward_file
from support.training import (
    lines_of,
    same_weights,
    scored_dataset,
    train_command,
    trainer_of,
    weights_of,
)
from transformers import EarlyStoppingCallback
from transformers.integrations import WandbCallback

from gvpo_offline.errors import ConfigError, GVPOError
from gvpo_offline.sampled_eval.result import METRICS
from gvpo_offline.sampled_eval.shown import COLUMNS
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.train.record.tables import log_table
from gvpo_offline.train.trainer import GVPOTrainer

RUN: dict[str, Any] = {
    "num_train_epochs": 2,
    "eval_fraction": 0.3,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "eval_samples": 2,
    "eval_max_new_tokens": 6,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 20)


@pytest.fixture(scope="module")
def length(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return reward_file(tmp_path_factory.mktemp("rewards"), LENGTH)


@pytest.fixture(scope="module")
def whole(
    dataset: GroupDataset,
    length: dict[str, Any],
    tiny_model_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> GVPOTrainer:
    """A run with checkpoints, which keeps the one with the largest objective."""
    out = tmp_path_factory.mktemp("run") / "out"
    trainer = run_of(dataset, length, tiny_model_dir, out, **BEST)
    trainer.train()
    return trainer


BEST: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "sampled_objective",
    "greater_is_better": True,
}


def run_of(
    dataset: GroupDataset, reward: dict[str, Any] | None, model: Path, out: Path, **changes: Any
) -> GVPOTrainer:
    return trainer_of(model, dataset, out, **{**RUN, "eval_reward": reward, **changes})


def test_each_evaluation_has_the_metrics(whole: GVPOTrainer) -> None:
    """Three steps, and the policy leaves the reference."""
    lines = [line for line in whole.state.log_history if "eval_sampled_reward" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert {f"eval_{name}" for name in METRICS} <= set(line)
        assert "eval_explained_variance" in line
        assert line["eval_sampled_objective"] == pytest.approx(
            line["eval_sampled_reward"] - 0.5 * line["eval_sampled_kl"], rel=1e-9
        )
    assert len(set(lines_of(whole, "eval_sampled_kl"))) == 3


def test_the_best_checkpoint_is_the_one_with_the_largest_objective(whole: GVPOTrainer) -> None:
    values = lines_of(whole, "eval_sampled_objective")
    assert whole.state.best_metric == max(values)
    assert whole.state.best_model_checkpoint is not None
    assert whole.state.best_model_checkpoint.endswith(f"-{1 + values.index(max(values))}")


def test_sampling_changes_nothing_in_training(
    whole: GVPOTrainer, dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Every logged loss and gradient norm is that of a run without it, to the last bit."""
    plain = run_of(dataset, None, tiny_model_dir, tmp_path, eval_samples=0)
    plain.train()
    for key in ("loss", "grad_norm", "eval_loss"):
        assert lines_of(plain, key) == lines_of(whole, key)
    assert not lines_of(plain, "eval_sampled_reward")


def test_a_resumed_run_evaluates_as_the_whole_one(
    whole: GVPOTrainer,
    dataset: GroupDataset,
    length: dict[str, Any],
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    """The same answers, the same best checkpoint, the same weights at the end."""
    settings = {**BEST, "save_total_limit": None}
    resumed = run_of(dataset, length, tiny_model_dir, tmp_path / "out", **settings)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    for name in METRICS:
        key = f"eval_{name}"
        assert lines_of(resumed, key) == lines_of(whole, key)
    assert resumed.state.best_metric == whole.state.best_metric
    assert same_weights(weights_of(resumed), weights_of(whole))


def test_a_run_stops_when_the_objective_no_longer_rises(
    dataset: GroupDataset, length: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """With patience 1, at the first evaluation that is not better than the best before it."""
    trainer = run_of(
        dataset,
        length,
        tiny_model_dir,
        tmp_path,
        **{**BEST, "num_train_epochs": 6, "save_total_limit": 1},
        learning_rate=1e-9,
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    trainer.train()
    values = lines_of(trainer, "eval_sampled_objective")
    assert len(values) < trainer.args.max_steps
    assert values[-1] <= max(values[:-1])
    assert all(later > max(values[:i]) for i, later in enumerate(values[1:-1], 1))


def test_answers_are_shown_beside_the_best_logged_ones(
    whole: GVPOTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "gvpo_offline.train.sampled"):
        found = whole.sampled_metrics("eval")
    assert found["eval_sampled_failed"] == 0
    shown = [r.getMessage() for r in caplog.records if "sampled answer" in r.getMessage()]
    assert len(shown) == 3
    assert "| answer (reward " in shown[0]
    assert "| best logged (reward " in shown[0]
    summary = next(r.getMessage() for r in caplog.records if " fresh answers to " in r.getMessage())
    assert f"reward {found['eval_sampled_reward']:.5g} ± " in summary
    assert f"KL {found['eval_sampled_objective']:.5g} ± " in summary


def test_failures_are_said_with_their_causes(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every fresh answer fails, and no logged one does: no metric is a zero."""
    code = (
        "def score(completions, **kwargs):\n"
        "    if not all(text.startswith('response') for text in completions):\n"
        "        raise ValueError('not understood')\n"
        "    return [1.0] * len(completions)\n"
    )
    trainer = run_of(dataset, reward_file(tmp_path, code), tiny_model_dir, tmp_path / "out")
    metrics = trainer.evaluate()
    assert metrics["eval_sampled_failed"] == 2 * len(trainer.sampled_evaluator().prompts)
    assert math.isnan(metrics["eval_sampled_reward"])
    assert metrics["eval_sampled_kl"] == pytest.approx(0, abs=1e-4)
    assert "answers have no reward and are left out" in caplog.text
    assert "in score: ValueError: not understood" in caplog.text


def test_another_dataset_is_evaluated_without_sampling(whole: GVPOTrainer) -> None:
    assert not any("sampled" in name for name in whole.evaluate(whole.data.views[0].dataset))


def test_the_prompts_are_those_of_the_groups_held_out_now(
    dataset: GroupDataset, length: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Another rule holds out other groups; the scorers and the reference stay."""
    trainer = run_of(dataset, length, tiny_model_dir, tmp_path)
    before = trainer.sampled_evaluator()
    trainer.hold_out_by("group")
    after = trainer.sampled_evaluator()
    (view,) = trainer.data.held_out.values()
    assert view.selection is not None
    ids = [
        view.dataset.groups(i)[int(row)].group_id
        for i in range(view.dataset.n_row_groups)
        for row in view.selection.rows(i)
    ]
    assert [own.logged.group_id for own in after.prompts] == ids
    assert [own.key for own in after.prompts] != [own.key for own in before.prompts]
    assert after.reference is before.reference
    assert after.reward is before.reward


# ---- loggers ----


class FakeWandb:
    """What the callback of W&B holds: a module with a run."""

    run = object()

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def Table(self, columns: list[str], data: list[Any]) -> dict[str, Any]:
        return {"columns": columns, "data": data}

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)


def test_tables_of_answers(whole: GVPOTrainer, tmp_path: Path) -> None:
    """For W&B and TensorBoard; other callbacks are left alone."""
    from transformers.integrations import TensorBoardCallback

    from gvpo_offline.sampled_eval.shown import shown_answers

    answers = shown_answers(whole.sampled_result(), most=16)
    assert len(answers) == len(whole.sampled_evaluator().prompts)
    wandb = WandbCallback.__new__(WandbCallback)
    wandb._wandb = FakeWandb()
    board = TensorBoardCallback.__new__(TensorBoardCallback)
    texts: list[tuple[Any, ...]] = []
    board.tb_writer = SimpleNamespace(add_text=lambda *given: texts.append(given))
    log_table([object(), wandb, board], answers, 7)
    ((logged),) = wandb._wandb.logged
    assert logged["train/global_step"] == 7
    table = logged["eval/sampled/answers"]
    assert table["columns"] == list(COLUMNS)
    assert table["data"] == [each.row() for each in answers]
    ((name, text, step),) = texts
    assert (name, step) == ("eval/sampled/answers", 7)
    assert len(text.split("\n")) == 2 + len(answers)


# ---- refused before training ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_reward": None}, "received eval_samples: 2 without eval_reward"),
        ({"eval_samples": 0}, "received eval_reward without eval_samples"),
        ({"eval_reward": "nowhere.yaml"}, "nowhere.yaml: eval_reward is the path of a YAML file"),
        (
            {"eval_reward": {"scorers": {"a": {"kind": "reward", "reward": "b"}}}},
            "received scorers.a, kind reward",
        ),
        ({"eval_fraction": 0.0, "eval_strategy": "no"}, "received no held-out groups"),
        ({"eval_max_new_tokens": 600}, "a prompt and an answer fit"),
    ],
)
def test_a_run_that_cannot_sample_is_refused(
    dataset: GroupDataset,
    length: dict[str, Any],
    tiny_model_dir: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(GVPOError) as error:
        run_of(dataset, settings.pop("eval_reward", length), tiny_model_dir, tmp_path, **settings)
    assert message in str(error.value)


def test_a_best_metric_needs_what_gives_it(
    dataset: GroupDataset,
    length: dict[str, Any],
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without samples there is no such metric; without a reference no objective."""
    with pytest.raises(ConfigError, match="metric_for_best_model is a metric that evaluation"):
        run_of(dataset, None, tiny_model_dir, tmp_path / "a", **BEST, eval_samples=0)
    from gvpo_offline.sampled_eval import evaluator
    from gvpo_offline.sampled_eval.reference import SampledReference

    gone = SampledReference("none", unavailable="the reference is gone")
    monkeypatch.setattr(evaluator, "find_reference", lambda *given: gone)
    with pytest.raises(ConfigError, match=r"needs the KL divergence.*received the reference is"):
        run_of(dataset, length, tiny_model_dir, tmp_path / "b", **BEST)
    reward = {**BEST, "metric_for_best_model": "sampled_reward"}
    trainer = run_of(dataset, length, tiny_model_dir, tmp_path / "c", **reward)
    assert "eval_sampled_kl" not in trainer.evaluate()


def test_zero3_is_refused(
    dataset: GroupDataset, length: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    trainer = run_of(dataset, length, tiny_model_dir, tmp_path)
    trainer._evaluator = None
    trainer.accelerator = SimpleNamespace(  # type: ignore[assignment]
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    )
    with pytest.raises(ConfigError, match="received eval_samples with DeepSpeed ZeRO-3"):
        trainer.sampled_evaluator()


# ---- the commands ----


def test_train_and_evaluate_sample_from_the_command_line(
    dataset: GroupDataset,
    length: dict[str, Any],
    tiny_model_dir: Path,
    tmp_path: Path,
    server: ForkServer,
) -> None:
    """`evaluate --sample` takes the reward of the run. The report has the means of each prompt."""
    reward = tmp_path / "reward.yaml"
    reward.write_text(json.dumps({"dataset": "data", "name": "length", **length}))
    out = tmp_path / "out"
    settings = {"eval_samples": 2, "eval_reward": reward, "eval_max_new_tokens": 6}
    command = train_command(dataset, tiny_model_dir, out, eval_prompts=5, **settings)
    status, text = server.run(command)
    assert status == 0, text
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [line["eval_sampled_reward"] for line in history if "eval_sampled_reward" in line]
    report = tmp_path / "report.json"
    command = ["evaluate", "--model_name_or_path", str(out), "--sample", "--use_cpu", "true"]
    status, text = server.run([*command, "--output_file", str(report)])
    assert status == 0, text
    assert "40 fresh answers to 5 prompts:" in text
    assert "nats, reward - 0.5 KL " in text
    assert "| best logged (reward " in text
    last = json.loads(text.strip().split("\n")[-1])
    assert set(METRICS) <= set(last)
    held = json.loads(report.read_text())
    assert held["sampled"]["metrics"]["sampled_reward"] == last["sampled_reward"]
    prompts = held["sampled"]["prompts"]
    assert [own["samples"] for own in prompts] == [8] * 5
    mean = sum(own["reward"] for own in prompts) / 5
    assert mean == pytest.approx(last["sampled_reward"], rel=1e-12)
    plain = ["evaluate", "--model_name_or_path", str(out), "--use_cpu", "true"]
    status, text = server.run([*plain, "--eval_reward", str(reward)])
    assert status != 0
    assert "received eval_reward without eval_samples" in " ".join(text.split())
