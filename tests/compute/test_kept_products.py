"""Activation checkpointing that keeps matrix products: the same gradients, no product twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.rounding import ROUNDING, relative_error
from support.training import Recorder, longest_row, scored_dataset, trainer_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from gvpo_offline.compute.kept_products import keep_products
from gvpo_offline.errors import ConfigError


def test_no_product_is_computed_twice(tiny_model_dir: Path) -> None:
    """Operations of products and attention, forward and backward: those of a step without
    checkpointing, which are fewer than with whole layers computed again."""
    ids = torch.arange(3, 40)[None]

    def operations(checkpointing: str) -> tuple[int, dict[str, torch.Tensor]]:
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if checkpointing == "products":
            assert keep_products(model) > 0
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return counter.get_total_flops(), gradients

    (none, exact), (products, own), (layers, _) = map(operations, ("", "products", "layers"))
    assert products == none < layers
    assert relative_error(own, exact) <= ROUNDING


@pytest.mark.parametrize("pieces", [False, True], ids=["whole groups", "pieces"])
def test_a_run_keeps_products_and_has_the_same_gradients(
    tiny_model_dir: Path, tmp_path: Path, pieces: bool
) -> None:
    """transformers enables checkpointing once more when training starts."""
    dataset = scored_dataset(tmp_path / "data", tiny_model_dir, 12)
    gradients = []
    own_settings = {"activation_checkpointing": True, "keep_products": True}
    for number, settings in enumerate([{}, own_settings]):
        recorder = Recorder()
        changes: dict[str, Any] = dict(settings)
        if pieces:
            changes["max_tokens_per_micro_batch"] = longest_row(dataset)[0]
        trainer = trainer_of(
            tiny_model_dir,
            dataset,
            tmp_path / str(number),
            callbacks=[recorder],
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            **changes,
        )
        trainer.train()
        gradients.append(recorder.gradients)
    assert trainer.engine.prompt_once
    assert _contexts_of(trainer.model)
    for own, exact in zip(gradients[1], gradients[0], strict=True):
        assert relative_error(own, exact) <= ROUNDING


def _contexts_of(model: nn.Module) -> list[object]:
    functions = (getattr(m, "_gradient_checkpointing_func", None) for m in model.modules())
    return [
        f.keywords["context_fn"] for f in functions if "context_fn" in getattr(f, "keywords", {})
    ]


def test_it_needs_checkpointing_that_is_not_reentrant(tiny_model_dir: Path, tmp_path: Path) -> None:
    dataset = scored_dataset(tmp_path / "data", tiny_model_dir, 4)
    with pytest.raises(ConfigError, match="is for runs with activation checkpointing"):
        trainer_of(tiny_model_dir, dataset, tmp_path / "a", keep_products=True)
    with pytest.raises(ConfigError, match="checkpointing that is not reentrant"):
        trainer_of(
            tiny_model_dir,
            dataset,
            tmp_path / "b",
            keep_products=True,
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": True},
        )
