"""Loss, gradient and metrics of the trainer equal those of a plain loop over responses."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.builders import make_group
from support.oracle import response_alone
from support.training import (
    VOCAB_SIZE,
    Recorder,
    largest_difference,
    lines_of,
    load,
    same_weights,
    scored_dataset,
    trainer_of,
    weights_of,
)
from transformers import AutoModelForCausalLM

from gvpo_offline import GVPOTrainer
from gvpo_offline.group import Group
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.stream.steps import MicroBatch

N_GROUPS = 24
METRICS = {
    "loss",
    "explained_variance",
    "log_ratio_mean",
    "log_ratio_std",
    "best_log_ratio_mean",
    "weight_std",
    "weight_abs_mean",
    "reward_mean",
    "reward_std",
    "pair_accuracy",
    "group_reward_mean",
    "reweighted_reward_mean",
    "log_mass_mean",
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    """24 groups with k from 2 to 5, a third of them with loss masks; scored by the tiny model."""
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, N_GROUPS)


def plain_loss(
    model: torch.nn.Module, groups: list[Group], beta: float, anchor: float = 0.0
) -> torch.Tensor:
    """The objective as in the paper, one response at a time, and its gradient."""
    losses = []
    for group in groups:
        sums = []
        for number in range(group.group_size):
            prompt, response = group.prompt_token_ids, group.response_token_ids[number]
            ids = torch.from_numpy(np.concatenate([prompt, response])).long()
            logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
            tokens = torch.log_softmax(logits, -1)[torch.arange(len(response)), ids[len(prompt) :]]
            if group.loss_mask is not None:
                tokens = tokens[torch.tensor(group.loss_mask[number])]
            sums.append(tokens.sum())
        log_ratios = torch.stack(sums) - torch.tensor(group.ref_seq_logprobs)
        rewards = torch.tensor(group.rewards)
        k = group.group_size
        weights = (rewards - rewards.mean()) - beta * (log_ratios - log_ratios.mean())
        squares = weights.square().sum() + anchor * k * beta**2 * log_ratios.mean() ** 2
        losses.append(squares / (2 * (k - 1)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("anchor", [0.0, 0.5])
def test_loss_and_gradient_are_those_of_a_plain_loop(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, anchor: float
) -> None:
    """At the first step, and at step 3, where log-ratios are no longer zero."""
    recorder = Recorder()
    settings = {"max_grad_norm": 0.0, "anchor": anchor, "learning_rate": 0.2, "optim": "sgd"}
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, callbacks=[recorder], **settings)
    model = load(tiny_model_dir)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 3)
    trainer.train()
    assert len(recorder.gradients) == 3
    assert abs(lines_of(trainer, "log_ratio_std")[2]) > 0.01
    for step, gradients in enumerate(recorder.gradients):
        optimizer.zero_grad()
        loss = plain_loss(model, trainer.train_dataset.global_batch(step), 0.5, anchor)
        loss.backward()
        assert lines_of(trainer)[step] == pytest.approx(loss.item(), rel=1e-5)
        largest = max(float(g.abs().max()) for g in gradients.values())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                gradients[name], parameter.grad, atol=1e-5 * largest, rtol=1e-4
            )
        optimizer.step()
        schedule.step()
    assert largest_difference(weights_of(trainer), dict(model.state_dict())) < 1e-6


def test_evaluating_does_not_change_the_run(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    plain = trainer_of(tiny_model_dir, dataset, tmp_path / "plain")
    plain.train()
    evaluated = trainer_of(
        tiny_model_dir,
        dataset,
        tmp_path / "evaluated",
        eval_dataset=dataset,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
    )
    evaluated.train()
    assert same_weights(weights_of(plain), weights_of(evaluated))
    assert len(lines_of(evaluated, "eval_loss")) == 4


def test_how_steps_are_read_does_not_change_the_run(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Steps are read by the main process, by a thread, or by data loader workers."""
    runs = []
    for ahead, workers in ((0, 0), (2, 0), (2, 2)):
        out = tmp_path / f"{ahead}-{workers}"
        options = {"read_ahead": ahead, "dataloader_num_workers": workers}
        trainer = trainer_of(tiny_model_dir, dataset, out, **options)
        trainer.train()
        runs.append(weights_of(trainer))
    assert all(same_weights(runs[0], run) for run in runs[1:])


def test_each_step_logs_its_metrics(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """At step 1 the policy is the reference: all log-ratios are 0, so explained variance is 0 and
    the loss depends on the rewards alone.
    """
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, include_num_input_tokens_seen="all")
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 3
    for line in lines:
        assert line.keys() >= {*METRICS, "grad_norm", "learning_rate", "epoch"}
        assert line["tokens_per_second"] > 0
        assert 0 <= line["data_wait_share"] <= 1
        assert all(math.isfinite(line[key]) for key in METRICS)
    first = trainer.train_dataset.global_batch(0)
    rewards = [group.rewards for group in first if group.rewards is not None]
    expected = np.mean([row.var(ddof=1) / 2 for row in rewards])
    assert lines[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert lines[0]["reward_mean"] == pytest.approx(np.concatenate(rewards).mean())
    for key in ("explained_variance", "log_ratio_mean", "log_ratio_std", "best_log_ratio_mean"):
        assert lines[0][key] == pytest.approx(0, abs=1e-5)
    assert abs(lines[2]["log_ratio_std"]) > 0.01
    drawn = [group for step in range(3) for group in trainer.train_dataset.global_batch(step)]
    assert trainer.state.num_input_tokens_seen == sum(group.n_tokens for group in drawn)


def test_a_log_line_over_several_steps_has_their_mean(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    single = trainer_of(tiny_model_dir, dataset, tmp_path / "single")
    single.train()
    triple = trainer_of(tiny_model_dir, dataset, tmp_path / "triple", logging_steps=3)
    triple.train()
    for key in ("loss", "log_ratio_mean", "reward_mean"):
        mean = np.mean(lines_of(single, key))
        if key == "loss":  # all steps have the same number of groups
            assert lines_of(triple, key) == pytest.approx([mean], rel=1e-5)
    responses = [
        sum(group.group_size for group in single.train_dataset.global_batch(step))
        for step in range(3)
    ]
    weighted = np.average(lines_of(single, "log_ratio_mean"), weights=responses)
    assert lines_of(triple, "log_ratio_mean") == pytest.approx([weighted], rel=1e-5)


def test_training_fits_the_rewards(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Explained variance on the training groups rises from 0 towards 1."""
    settings = {"num_train_epochs": 12, "learning_rate": 2e-2, "lr_scheduler_type": "constant"}
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, eval_dataset=dataset, **settings)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_explained_variance"] == pytest.approx(0, abs=1e-4)
    assert after["eval_explained_variance"] > 0.7
    assert after["eval_pair_accuracy"] > 0.9
    assert after["eval_loss"] < 0.5 * before["eval_loss"]


def test_held_out_metrics_are_those_of_the_held_out_groups(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, eval_fraction=0.3, anchor=0.5)
    trainer.train()
    found = trainer.evaluate()
    (view,) = trainer.data.held_out.values()
    selection = view.selection
    assert selection is not None
    groups = [
        dataset.groups(index)[row]
        for index in range(dataset.n_row_groups)
        for row in selection.rows(index)
    ]
    trained = {
        group.group_id for step in range(2) for group in trainer.train_dataset.global_batch(step)
    }
    assert (len(groups), len(trained)) == (10, 14)
    assert not trained & {group.group_id for group in groups}
    with torch.no_grad():
        expected = plain_loss(trainer.model.eval(), groups, 0.5, anchor=0.5).item()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-4)
    ratios = [
        sum_of(trainer.model, group, number) - group.ref_seq_logprobs[number]
        for group in groups
        if group.ref_seq_logprobs is not None
        for number in range(group.group_size)
    ]
    assert found["eval_log_ratio_mean"] == pytest.approx(np.mean(ratios), abs=1e-4)
    assert found["eval_log_ratio_std"] == pytest.approx(np.std(ratios), abs=1e-4)
    assert {f"eval_{key}" for key in METRICS} <= found.keys()


def sum_of(model: torch.nn.Module, group: Group, number: int) -> float:
    tokens = response_alone(model, group, number)
    return float(tokens[slice(None) if group.loss_mask is None else group.loss_mask[number]].sum())


def drawn_by(trainer: GVPOTrainer, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Ids of the groups of each step, recorded when their loss is computed."""
    steps: list[list[str]] = []
    compute = trainer._accumulate

    def noting(model: Any, micro_batch: MicroBatch, scale: float) -> Any:
        while len(steps) <= trainer.state.global_step:
            steps.append([])
        steps[trainer.state.global_step] += [group.group_id for group in micro_batch.groups]
        return compute(model, micro_batch, scale)

    monkeypatch.setattr(trainer, "_accumulate", noting)
    return steps


@pytest.mark.parametrize(
    ("epochs", "sizes"),
    [(1, [7, 7, 7, 3]), (2, [7] * 6 + [6]), (0.5, [7, 5]), (1.25, [7, 7, 7, 7, 2])],
)
def test_every_group_is_seen_as_often_as_asked(
    dataset: GroupDataset,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    epochs: float,
    sizes: list[int],
) -> None:
    """24 groups in steps of 7; the last step has the remaining groups."""
    options = {"groups_per_step": 7, "num_train_epochs": epochs}
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, **options)
    steps = drawn_by(trainer, monkeypatch)
    result = trainer.train()
    assert [len(ids) for ids in steps] == sizes
    assert result.global_step == len(sizes)
    counts = Counter(group_id for ids in steps for group_id in ids)
    assert sum(counts.values()) == math.ceil(epochs * N_GROUPS)
    assert max(counts.values()) == math.ceil(epochs)
    assert sum(count == math.ceil(epochs) for count in counts.values()) == (
        N_GROUPS if epochs == int(epochs) else round(epochs % 1 * N_GROUPS)
    )
    assert trainer.state.epoch == epochs
    assert trainer.state.num_train_epochs == math.ceil(epochs)


def test_max_steps_overrides_epochs(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path, groups_per_step=7, max_steps=5)
    steps = drawn_by(trainer, monkeypatch)
    trainer.train()
    assert [len(ids) for ids in steps] == [7] * 5
    assert trainer.state.epoch == pytest.approx(35 / N_GROUPS)


def test_groups_of_equal_rewards_train_unless_dropped(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Their target is the reference: if the policy differs from it, their gradient is not zero."""
    rewards = [np.array([0.5, 0.5, 0.5 if i % 2 else 0.1]) for i in range(8)]
    groups = [
        make_group(i, k=3, vocab_size=VOCAB_SIZE, scored=False, rewards=row)
        for i, row in enumerate(rewards)
    ]
    data = scored_dataset(tmp_path / "data", tiny_model_dir, groups=groups)
    kept = trainer_of(tiny_model_dir, data, tmp_path / "kept")
    dropped = trainer_of(tiny_model_dir, data, tmp_path / "dropped", drop_equal_rewards=True)
    assert kept.data.order.n_groups == 8
    assert dropped.data.order.n_groups == 4
    assert kept.preflight()[0].equal_reward_groups == 4
    assert dropped.preflight()[0].equal_reward_groups == 0
    with torch.no_grad():
        for parameter in kept.model.parameters():
            parameter.mul_(1.5)
    pull = plain_loss(kept.model, [groups_of(data)[1]], 0.5)
    pull.backward()
    assert max(float(p.grad.abs().max()) for p in kept.model.parameters() if p.grad is not None) > 0


def groups_of(dataset: GroupDataset) -> list[Group]:
    return [group for index in range(dataset.n_row_groups) for group in dataset.groups(index)]


def test_group_sizes_may_differ_within_a_step(tmp_path: Path, tiny_model_dir: Path) -> None:
    groups = [
        make_group(i, k=k, vocab_size=VOCAB_SIZE, scored=False)
        for i, k in enumerate((2, 9, 3, 17, 2, 5))
    ]
    data = scored_dataset(tmp_path / "data", tiny_model_dir, groups=groups)
    trainer = trainer_of(tiny_model_dir, data, tmp_path / "out", groups_per_step=6)
    expected = plain_loss(load(tiny_model_dir), groups_of(data), 0.5).item()
    trainer.train()
    assert lines_of(trainer)[0] == pytest.approx(expected, rel=1e-5)


def test_the_reference_model_is_never_loaded(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    original = AutoModelForCausalLM.from_pretrained

    def counting(*args: Any, **kwargs: Any) -> Any:
        loaded.append(args)
        return original(*args, **kwargs)

    model = load(tiny_model_dir)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counting)
    trainer_of(model, dataset, tmp_path / "object").train()
    assert loaded == []
    trainer_of(tiny_model_dir, dataset, tmp_path / "path").train()
    assert len(loaded) == 1
