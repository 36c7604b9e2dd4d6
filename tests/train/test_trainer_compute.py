"""How a trainer's log-probs are computed: no way of it changes the run."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from support.rounding import ROUNDING, relative_error
from support.training import Recorder, lines_of, load, longest_row, scored_dataset, trainer_of

from gvpo_offline import GVPOConfig
from gvpo_offline.group import Group
from gvpo_offline.store.dataset import GroupDataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> GroupDataset:
    """24 groups, k from 2 to 5, a third with loss masks, scored by the tiny model."""
    return scored_dataset(tmp_path_factory.mktemp("data"), tiny_model_dir, 24)


@pytest.mark.parametrize("layout", ["shared", "packed", "continued", "padded"])
def test_micro_batches_and_pieces_change_neither_loss_nor_gradient(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, layout: str
) -> None:
    """From hardly more than one response at a time to the whole step at once."""
    longest, _ = longest_row(dataset)
    runs = []
    for budget in (longest, 100, 10**6):
        recorder = Recorder()
        trainer = trainer_of(
            tiny_model_dir,
            dataset,
            tmp_path / str(budget),
            callbacks=[recorder],
            layout=layout,
            max_tokens_per_micro_batch=budget,
            # Adam would make updates of full size of gradients that are nothing but rounding.
            optim="sgd",
            learning_rate=0.1,
            max_steps=2,  # in the second, log-ratios are not zero any more
        )
        plans = [trainer.train_dataset[step].micro_batches for step in range(2)]
        trainer.train()
        runs.append((plans, recorder.gradients, lines_of(trainer)))
    pieces, several, whole = ([[own.n_forwards for own in step] for step in run[0]] for run in runs)
    assert all(sum(count > 1 for count in step) >= 3 for step in pieces)
    assert all(set(step) == {1} and 1 < len(step) < 8 for step in several)
    assert whole == [[1]] * 2
    for _, gradients, losses in runs[:-1]:
        assert losses == pytest.approx(runs[-1][2], rel=ROUNDING)
        for mine, theirs in zip(gradients, runs[-1][1], strict=True):
            assert relative_error(mine, theirs) <= ROUNDING


def test_layouts_change_neither_loss_nor_gradient(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Each as it is forced; what is chosen by itself is the shared one."""
    runs = {}
    for layout in ("auto", "shared", "packed", "continued", "padded"):
        recorder = Recorder()
        settings = {"layout": layout, "max_steps": 1, "max_grad_norm": 0.0}
        trainer = trainer_of(
            tiny_model_dir, dataset, tmp_path / layout, callbacks=[recorder], **settings
        )
        assert trainer.engine.path.layout == ("shared" if layout == "auto" else layout)
        assert (
            trainer.train_dataset.cost.layout == trainer.policy.layout == trainer.engine.path.layout
        )
        trainer.train()
        runs[layout] = (recorder.gradients[0], lines_of(trainer))
    gradients, losses = runs["padded"]
    for mine, own_losses in runs.values():
        assert own_losses == pytest.approx(losses, rel=1e-5)
        assert relative_error(mine, gradients) <= ROUNDING


def test_logits_that_are_not_kept_change_neither_loss_nor_gradient(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    runs = []
    for megabytes in (1024, 0):
        recorder = Recorder()
        settings = {"kept_logits_mb": megabytes, "max_steps": 1, "callbacks": [recorder]}
        trainer = trainer_of(tiny_model_dir, dataset, tmp_path / str(megabytes), **settings)
        assert trainer.engine.kept_bytes == megabytes * 2**20
        trainer.train()
        runs.append(recorder.gradients[0])
    assert relative_error(*runs) <= ROUNDING


def mean_entropy(model: torch.nn.Module, groups: list[Group]) -> float:
    """Nats, over the distributions that tokens which count were scored under."""
    entropies = []
    for group in groups:
        prompt = group.prompt_token_ids
        for number, response in enumerate(group.response_token_ids):
            ids = torch.from_numpy(np.concatenate([prompt, response])).long()
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].double()
            log_p = torch.log_softmax(logits, -1)
            mask = slice(None) if group.loss_mask is None else group.loss_mask[number]
            entropies.append(-(log_p.exp() * log_p).sum(-1)[mask])
    return float(torch.cat(entropies).mean())


@pytest.mark.parametrize("pieces", [False, True])
def test_entropy_is_logged_on_request(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, pieces: bool
) -> None:
    """Of each scored token once, though groups in pieces are computed twice."""
    budget = longest_row(dataset)[0] if pieces else 10**6
    settings = {"max_tokens_per_micro_batch": budget, "max_steps": 1}
    trainer = trainer_of(tiny_model_dir, dataset, tmp_path / "a", log_entropy=True, **settings)
    expected = mean_entropy(load(tiny_model_dir), trainer.train_dataset.global_batch(0))
    trainer.train()
    assert lines_of(trainer, "entropy") == pytest.approx([expected], abs=1e-4)
    silent = trainer_of(tiny_model_dir, dataset, tmp_path / "b", **settings)
    silent.train()
    assert lines_of(silent, "entropy") == []


@pytest.mark.parametrize("pieces", [False, True])
def test_recomputing_activations_does_not_change_the_gradient(
    dataset: GroupDataset, tiny_model_dir: Path, tmp_path: Path, pieces: bool
) -> None:
    names = {field.name for field in fields(GVPOConfig)}
    setting = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names)
    budget = longest_row(dataset)[0] if pieces else 10**6
    runs = []
    for recompute in (False, True):
        recorder = Recorder()
        trainer = trainer_of(
            tiny_model_dir,
            dataset,
            tmp_path / str(recompute),
            callbacks=[recorder],
            max_tokens_per_micro_batch=budget,
            max_steps=1,
            **{setting: recompute},
        )
        assert trainer.engine.path.layout == "shared"
        trainer.train()
        runs.append(recorder.gradients[0])
    assert relative_error(*runs) <= ROUNDING
