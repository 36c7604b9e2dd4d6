"""Layouts on device "meta", as in counting memory and shapes: forward, backward, losses.

Tensors without numbers refuse every read on the host, and every operand of another device: what
passes here neither waits for a device nor mixes devices, in the forward and in the backward pass.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.builders import make_group
from support.tiny_models import tiny_model
from torch import Tensor
from transformers import masking_utils

from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.forward import install
from gvpo_offline.compute.settings import ComputePath
from gvpo_offline.losses import group_loss
from gvpo_offline.losses.checks import deferred_checks
from gvpo_offline.stream.plan import CostModel
from gvpo_offline.train.objective import LossInputs, counted_tokens

META = torch.device("meta")
LAYOUTS = ("shared", "packed", "continued", "padded")


@pytest.fixture(autouse=True)
def _nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads the mask of padded rows, and whether positions begin anew in packed ones,
    unless it is traced."""
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)


def on_meta(layout: Any, dtype: torch.dtype, *, lora: bool = False) -> tuple[Any, Engine]:
    model: Any = tiny_model("qwen3")
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    model.train()
    if layout == "shared":
        from gvpo_offline.compute.attention import use_tree_attention

        use_tree_attention(model.get_base_model() if lora else model)
    install(model)
    model.to(META, dtype)
    attention = "dense" if layout == "shared" else "sdpa"
    return model, Engine(ComputePath(layout, attention, "fused"), CostModel(layout, 10_000, 100))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "lora", "budget"),
    [
        (torch.float32, False, 10_000),
        (torch.bfloat16, True, 10_000),
        (torch.float16, False, 40),
    ],
)
def test_a_step_runs_without_numbers(
    layout: Any, dtype: torch.dtype, lora: bool, budget: int
) -> None:
    model, engine = on_meta(layout, dtype, lora=lora)
    engine = Engine(engine.path, CostModel(layout, budget, 100))
    groups = [make_group(i, k=4, vocab_size=100, response_tokens=9, masked=True) for i in range(2)]
    groups = groups if budget > 1_000 else groups[:1]  # one group, in pieces
    n = sum(group.group_size for group in groups)
    own = LossInputs.of(groups)

    def objective(logprobs_R: Tensor) -> Tensor:
        assert logprobs_R.shape == (n,)
        assert logprobs_R.dtype == torch.float64
        with deferred_checks():
            result = group_loss(
                "gvpo",
                *(logprobs_R, own.ref_seq_logprobs, own.rewards, own.group_index),
                beta=0.1,
                token_counts=counted_tokens(groups),
            )
        assert result.statistics.sums.device == META
        return result.loss

    loss = engine.accumulate(model, groups, objective, Tensor.backward)

    assert loss.shape == ()
    assert loss.device == META
    trained = {n: own for n, own in model.named_parameters() if own.requires_grad}
    assert trained
    for name, weight in trained.items():
        assert weight.grad is not None, name
        assert weight.grad.shape == weight.shape
        assert (weight.grad.device, weight.grad.dtype) == (META, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_reference_is_scored_without_numbers(layout: Any) -> None:
    model, engine = on_meta(layout, torch.bfloat16)
    groups = [make_group(i, k=3, vocab_size=100) for i in range(2)]
    with torch.no_grad():
        found = engine.token_logprobs(model.eval(), groups)
    lengths = [len(ids) for group in groups for ids in group.response_token_ids]
    assert [tuple(own.shape) for own in found] == [(n,) for n in lengths]
    assert {own.device for own in found} == {META}


def test_cpu_attention_by_pieces_makes_its_tensors_where_the_queries_are() -> None:
    from gvpo_offline.compute.pieces import PiecePlan, piecewise_attention
    from gvpo_offline.compute.tree import AttentionRule, one_segment

    plan = PiecePlan(one_segment(6), AttentionRule(), torch.float32)
    query, key, value = (
        torch.empty(1, heads, 6, 8, device=META, requires_grad=True) for heads in (4, 2, 2)
    )
    out = piecewise_attention(query, key, value, plan, 1.0, None)
    assert out.shape == (1, 6, 4, 8)
    out.sum().backward()
    assert query.grad is not None
    assert (key.grad.device, key.grad.shape) == (META, key.shape)  # type: ignore[union-attr]
