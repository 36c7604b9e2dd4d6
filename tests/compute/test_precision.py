"""The rounding noise of log-probs: its estimate, and what it is measured on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.builders import make_group
from support.tiny_models import ALIBI, FAMILIES, OTHER_ATTENTION, VOCAB_SIZE, tiny_model
from torch import Tensor, nn

from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.model import autocast, in_float32, outermost_layers
from gvpo_offline.compute.precision import (
    EPSILON,
    Rounding,
    measured_rounding,
    rounding_of,
)
from gvpo_offline.compute.probe import prepare_engine
from gvpo_offline.group import Group

BF16 = torch.bfloat16


def some_groups(n: int, k: int = 4, tokens: int = 30) -> list[Group]:
    return [
        make_group(i, k=k, response_tokens=tokens, vocab_size=VOCAB_SIZE, scored=False)
        for i in range(n)
    ]


def prepared(family: str = "llama", layout: str = "auto") -> tuple[nn.Module, Engine]:
    """A tiny model whose logits differ by a few nats, as those of language models do."""
    model = tiny_model(family).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model, prepare_engine(model, max_tokens=4096, gradients=False, layout=layout)  # type: ignore[arg-type]


# ---- the estimate ----


def test_the_estimate_is_the_larger_of_tokens_and_sums() -> None:
    """Errors 3, -3 in turns: the tokens' root mean square is 3, the sums are 0. Errors of 2 in each
    of 4 tokens: 2, and the sum 8 over sqrt(4) is 4.
    """
    turns = torch.tensor([3.0, -3.0] * 8, dtype=torch.float64)
    alike = torch.full((4,), 2.0, dtype=torch.float64)
    assert rounding_of([turns]) == Rounding(3.0, 1)
    assert rounding_of([alike]) == Rounding(4.0, 1)
    # Tokens: sqrt((16 * 9 + 4 * 4) / 20); sums: sqrt((0 + 16) / 2).
    both = rounding_of([turns, alike])
    assert both is not None
    assert both.per_root_token == pytest.approx(max(math.sqrt(160 / 20), math.sqrt(8)))
    assert both.n_responses == 2
    assert both.of(9) == pytest.approx(3 * both.per_root_token)


def test_no_estimate_without_responses_or_finite_errors() -> None:
    assert rounding_of([]) is None
    assert rounding_of([torch.zeros(0)]) is None
    assert rounding_of([torch.tensor([1.0, math.inf])]) is None


# ---- measured ----


def test_float16_rounds_an_eighth_as_much_as_bfloat16() -> None:
    """Epsilon is 2^-10 against 2^-7. Both estimates are over 480 tokens of 16 responses: a relative
    error of 1 / sqrt(2 * 16) each, 25% together; twice that.
    """
    model, engine = prepared()
    groups = some_groups(8, tokens=25)
    found = {
        dtype: measured_rounding(model, engine, groups, dtype) for dtype in (BF16, torch.float16)
    }
    assert found[BF16] is not None and found[torch.float16] is not None  # noqa: PT018
    ratio = found[BF16].per_root_token / found[torch.float16].per_root_token
    assert 8 / 1.5 < ratio < 8 * 1.5
    assert EPSILON["bfloat16"] / EPSILON["float16"] == 8


def test_other_groups_in_another_layout_differ_by_no_more_than_measured() -> None:
    """128 log-ratios of 30 tokens: errors of two layouts that are independent at most. The size of
    32 groups' errors is at most sqrt(1 + 2 sqrt(x / 32) + 2 x / 32) = 1.63 times as large with a
    probability of all but 1e-4 (x = ln(1e4)), and the measured size is known to 25%.
    """
    model, shared = prepared(layout="shared")
    groups = some_groups(40)
    measured = measured_rounding(model, shared, groups[:8], BF16)
    assert measured is not None
    with torch.no_grad(), autocast(torch.device("cpu"), BF16):
        one = shared.seq_logprobs(model, groups[8:])
    padded = prepare_engine(model, max_tokens=4096, gradients=False, layout="padded")
    with torch.no_grad(), autocast(torch.device("cpu"), BF16):
        other = padded.seq_logprobs(model, groups[8:])
    size = float((one - other).square().mean().sqrt())
    assert 0 < size < 1.63 * 1.25 * math.sqrt(2) * measured.of(30)


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_the_model_is_left_as_it_was(way: str) -> None:
    model, engine = prepared()
    if way == "weights":
        model = model.to(BF16)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[Tensor] = []
    found = measured_rounding(
        model,
        replace(engine, on_entropy=seen.append),
        some_groups(2),
        BF16 if way == "autocast" else None,
    )
    assert found is not None
    assert found.n_responses == 4
    assert found.per_root_token > 0
    assert model.training
    assert not seen
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {tensor.dtype for tensor in after.values()} == {t.dtype for t in before.values()}


def test_what_it_is_measured_on_is_bounded() -> None:
    """At most two responses of a group and 512 tokens, prompts included; but one response at least,
    also if it is longer.
    """
    model, engine = prepared()
    calls: list[int] = []

    class Counting(Engine):
        def token_logprobs(self, model: nn.Module, groups: object) -> list[Tensor]:
            assert isinstance(groups, list)
            calls.append(sum(group.n_tokens for group in groups))
            return super().token_logprobs(model, groups)

    counting = Counting(engine.path, engine.cost)
    found = measured_rounding(model, counting, some_groups(40), BF16)
    assert found is not None
    assert len(calls) == 2
    assert calls[0] == calls[1]
    assert 512 - 2 * 60 < calls[0] <= 512
    groups = some_groups(3)
    few = replace(engine.cost, max_tokens=len(groups[0].prompt_token_ids) + 30)
    found = measured_rounding(model, Counting(engine.path, few), groups, BF16)
    assert found is not None
    assert found.n_responses == 1


def test_a_model_that_fails_in_float32_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = prepared()
    plain = Engine.token_logprobs

    def narrow_only(self: Engine, model: nn.Module, groups: list[Group]) -> list[Tensor]:
        if not torch.is_autocast_enabled("cpu"):
            raise RuntimeError("this kernel needs 16 bits")
        return plain(self, model, groups)

    monkeypatch.setattr(Engine, "token_logprobs", narrow_only)
    assert measured_rounding(model, engine, some_groups(2), BF16) is None


def test_no_groups_give_no_measurement() -> None:
    model, engine = prepared()
    assert measured_rounding(model, engine, [], BF16) is None


@pytest.mark.parametrize("family", sorted({**FAMILIES, **OTHER_ATTENTION, **ALIBI}))
def test_a_model_in_float32_layer_by_layer_is_the_whole_one(family: str) -> None:
    """The same numbers; between passes, all layers are as narrow as they were."""
    model = tiny_model(family).eval().to(BF16)
    ids = torch.arange(3, 15)[None]
    layers = outermost_layers(model)
    assert layers
    widths: list[set[int]] = []

    def note(layer: nn.Module) -> None:
        others = [other for other in layers if other is not layer]
        widths.append({t.element_size() for o in others for t in o.parameters()})

    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        with in_float32(model):
            whole = model(input_ids=ids, use_cache=False).logits
        hooks = [own.register_forward_hook(lambda own, *_: note(own)) for own in layers]
        with in_float32(model, by_layers=True):
            found = model(input_ids=ids, use_cache=False).logits
            assert not {t.dtype for own in layers for t in own.parameters()} - {BF16}
    assert found.dtype == torch.float32
    assert torch.equal(found, whole)
    assert widths
    assert set().union(*widths) <= {2}, "another layer is wide while one computes"
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    for hook in hooks:
        hook.remove()


def test_a_layer_that_fails_is_narrow_again() -> None:
    model = tiny_model("llama").eval().to(BF16)

    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"), in_float32(model, by_layers=True):
        model(input_ids=torch.arange(3, 9)[None])
    assert {own.dtype for own in model.parameters()} == {BF16}
    assert not model.model.layers[0]._forward_pre_hooks
