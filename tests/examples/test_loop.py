"""`examples/loop.py`: a hand-written loop computes what GVPOTrainer computes."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gvpo_offline import (
    Group,
    GVPOConfig,
    GVPOTrainer,
    disable_dropout,
    open_dataset,
    prepare_engine,
    training_steps,
)

EXAMPLES = Path(__file__).parents[2] / "examples"
BETA, GROUPS_PER_STEP, SEED = 0.1, 8, 3
EPSILON = torch.finfo(torch.float32).eps


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The example's dataset and model."""
    dataset, model = _module("tiny").make_tiny(tmp_path_factory.mktemp("examples"))
    return dataset, model


def _model(folder: str) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def _flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


class _KeepsGradient(torch.optim.SGD):
    """SGD at rate 0 that keeps the gradient of its first step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.0)
        self.model = model
        self.first: Tensor | None = None

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        if self.first is None:
            self.first = _flat_gradient(self.model)


def _gradients_by_group(folder: str, groups: Sequence[Group]) -> list[Tensor]:
    """The part of each group in the step's gradient, each from a backward pass of its own."""
    loop = _module("loop")
    model = _model(folder)
    disable_dropout(model.train())
    engine = prepare_engine(model, max_tokens=4096)
    parts = []
    for group in groups:
        model.zero_grad()
        engine.accumulate(
            model,
            [group],
            partial(loop.batch_loss, groups=[group], beta=BETA, n_groups=len(groups)),
            torch.Tensor.backward,
        )
        parts.append(_flat_gradient(model))
    return parts


def test_the_first_gradient_is_the_trainers(made: tuple[str, str], tmp_path: Path) -> None:
    """Both take the same groups and differ by the rounding of float32 sums.

    A sum of n float32 terms in any order errs by at most n eps times the sum of the terms'
    magnitudes. The step's gradient is a sum over its n tokens; in norm, the sum of magnitudes is
    bounded by the groups' parts: sum of |g_i| = condition * |sum of g_i|.
    """
    dataset, folder = made
    by_hand = _model(folder)
    hand_optimizer = _KeepsGradient(by_hand)
    _module("loop").train(
        by_hand,
        open_dataset(dataset),
        hand_optimizer,
        beta=BETA,
        groups_per_step=GROUPS_PER_STEP,
        num_epochs=GROUPS_PER_STEP / 24,  # 24 groups: one step
        seed=SEED,
    )
    policy = _model(folder)
    optimizer = _KeepsGradient(policy)
    args = GVPOConfig(
        output_dir=str(tmp_path / "run"),
        beta=BETA,
        groups_per_step=GROUPS_PER_STEP,
        max_tokens_per_micro_batch=4096,
        max_steps=1,
        max_grad_norm=0.0,
        seed=SEED,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = GVPOTrainer(policy, args, train_dataset=dataset, optimizers=(optimizer, scheduler))
    trainer.train()
    assert hand_optimizer.first is not None
    assert optimizer.first is not None

    share = training_steps(
        open_dataset(dataset), trainer.engine.cost, groups_per_step=GROUPS_PER_STEP, seed=SEED
    )[0]
    parts = _gradients_by_group(folder, share.groups)
    norm = float(optimizer.first.norm())
    condition = sum(float(part.norm()) for part in parts) / norm
    bound = share.n_tokens * EPSILON * condition
    assert bound < 1e-2  # far below 1: another order, loss or beta is seen
    # The order is the trainer's too: the parts of its groups sum to its gradient.
    assert float((torch.stack(parts).sum(0) - optimizer.first).norm()) <= bound * norm
    assert float((hand_optimizer.first - optimizer.first).norm()) <= bound * norm
    # Another step's groups have another gradient, by far more than the bound.
    other = training_steps(
        open_dataset(dataset), trainer.engine.cost, groups_per_step=GROUPS_PER_STEP, seed=SEED + 1
    )[0]
    elsewhere = torch.stack(_gradients_by_group(folder, other.groups)).sum(0)
    assert float((elsewhere - optimizer.first).norm()) > 10 * bound * norm


def test_the_loop_runs_by_itself_and_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without arguments but a folder; the last epoch's loss is under half of the first's."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["loop.py", "--output_dir", str(tmp_path)])
    _module("loop").main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    losses = [float(line.split()[-1]) for line in lines]
    assert len(losses) == 30  # 10 epochs of 24 groups, 8 a step
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    assert (tmp_path / "policy" / "config.json").is_file()


def _python_blocks(page: str) -> list[str]:
    text = (EXAMPLES.parent / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [block for block in blocks if "training_steps" in block or "batch_loss" in block]


@pytest.mark.parametrize("page", ["README.md", "docs/start/loop.md"])
def test_the_loop_that_the_documentation_shows_runs(
    page: str, made: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands on the page, beside imports, a model and an optimizer; the loss falls."""
    dataset, folder = made
    (tmp_path / "data").symlink_to(dataset)
    monkeypatch.chdir(tmp_path)
    model = _model(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    names = {"torch": torch, "np": np, "partial": partial, "model": model, "optimizer": optimizer}
    blocks = sorted(_python_blocks(page), key=lambda block: "training_steps" in block)
    before = _loss(model, dataset)
    for block in blocks:
        exec(block, names)
    assert _loss(model, dataset) < 0.5 * before


def _loss(model: nn.Module, dataset: str) -> float:
    """Mean loss over all groups."""
    opened = open_dataset(dataset)
    engine = prepare_engine(model, max_tokens=4096, gradients=False)
    groups = [group for number in range(opened.n_row_groups) for group in opened.groups(number)]
    with torch.no_grad():
        logprobs = engine.seq_logprobs(model, groups)
    return float(_module("loop").batch_loss(logprobs, groups, BETA, len(groups)))
