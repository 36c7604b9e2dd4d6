"""Log-probs of responses in every layout, compared with single unpadded responses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.builders import make_group
from support.oracle import response_alone
from support.tiny_models import FAMILIES, VOCAB_SIZE, tiny_model
from torch import Tensor, nn

from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.model import autocast
from gvpo_offline.compute.probe import prepare_engine
from gvpo_offline.compute.settings import LayoutName
from gvpo_offline.errors import DataError
from gvpo_offline.group import Group
from gvpo_offline.train.objective import LossInputs

GROUPS = [make_group(i, masked=i == 2, vocab_size=VOCAB_SIZE) for i in range(5)]
LAYOUTS: tuple[LayoutName, ...] = ("shared", "packed", "continued", "padded")
CPU = torch.device("cpu")


def tokens_alone(model: nn.Module, groups: list[Group]) -> list[Tensor]:
    """`response_alone` of every response of every group."""
    return [response_alone(model, group, i) for group in groups for i in range(group.group_size)]


def counted(tokens: list[Tensor], groups: list[Group]) -> Tensor:
    """(R,) float64 sums over the counted tokens of each response."""
    masks = [
        slice(None) if group.loss_mask is None else torch.from_numpy(group.loss_mask[number])
        for group in groups
        for number in range(group.group_size)
    ]
    sums = [own.double()[mask].sum() for own, mask in zip(tokens, masks, strict=True)]
    return torch.stack(sums)


def engine_of(model: nn.Module, layout: LayoutName, max_tokens: int = 10**6) -> Engine:
    """An engine probed for forward passes only, as in the reference stage."""
    return prepare_engine(model, max_tokens=max_tokens, layout=layout, gradients=False)


@pytest.mark.parametrize("max_tokens", [40, 10**6])
@pytest.mark.parametrize("layout", ["auto", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_one_response_at_a_time(
    family: str, layout: LayoutName, max_tokens: int
) -> None:
    """For whole micro-batches, and for a group of nine responses in pieces."""
    model = tiny_model(family)
    large = make_group(7, k=9, masked=True, vocab_size=VOCAB_SIZE)
    groups = GROUPS if max_tokens > 40 else [large]
    expected = tokens_alone(model, groups)
    engine = engine_of(model, layout, max_tokens)
    with torch.no_grad():
        found = engine.token_logprobs(model, groups)
        sums = engine.seq_logprobs(model, groups)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs, atol=1e-4, rtol=0)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, counted(expected, groups), atol=1e-4, rtol=0)
    torch.testing.assert_close(sums, counted(found, groups), atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_company_in_the_micro_batch_changes_nothing(layout: LayoutName) -> None:
    """A response's log-prob does not depend on layout, order or other groups."""
    model = tiny_model("qwen3")
    engine = engine_of(model, layout)
    long_group = make_group(9, prompt_tokens=20, response_tokens=30, vocab_size=VOCAB_SIZE)
    with torch.no_grad():
        together = engine.seq_logprobs(model, GROUPS)
        apart = torch.cat([engine.seq_logprobs(model, [group]) for group in GROUPS])
        beside = engine.seq_logprobs(model, [long_group, *GROUPS])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    torch.testing.assert_close(beside[long_group.group_size :], together, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_tokens_are_read_but_not_counted(layout: LayoutName) -> None:
    """All but the last token of each response masked: the sum is the last token's log-prob."""
    model, group = tiny_model("llama"), GROUPS[1]
    last = torch.stack([own[-1] for own in tokens_alone(model, [group])])
    masks = tuple(np.arange(n) == n - 1 for n in group.response_lengths)
    engine = engine_of(model, layout)
    with torch.no_grad():
        sums = engine.seq_logprobs(model, [replace(group, loss_mask=masks)])
    torch.testing.assert_close(sums, last, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2"])
def test_bfloat16_is_near(family: str) -> None:
    """bfloat16 has 8 bits of significand, so a token's log-prob changes by hundredths of a nat. The
    result is float32, from a float32 log-softmax.
    """
    model = tiny_model(family)
    engine = engine_of(model, "auto")
    with torch.no_grad():
        exact = engine.seq_logprobs(model, GROUPS)
        with autocast(CPU, torch.bfloat16):
            cast = engine.token_logprobs(model, GROUPS)
        low = engine.seq_logprobs(model.to(torch.bfloat16), GROUPS)
    assert all(own.dtype == torch.float32 for own in cast)
    lengths = torch.tensor([n for group in GROUPS for n in group.response_lengths])
    for rough in (counted(cast, GROUPS), low):
        difference = (rough - exact).abs()
        assert difference.max() > 0
        assert (difference <= 0.06 * lengths).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_forwards", [1, 3])
def test_the_empty_micro_batch_touches_every_weight_and_moves_none(
    layout: LayoutName, n_forwards: int
) -> None:
    """A rank without groups makes as many forward passes as the other ranks."""
    model = tiny_model("qwen3")
    engine = engine_of(model, layout)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))

    def objective(logprobs: Tensor) -> Tensor:
        raise AssertionError("there is no loss of nothing")

    loss = engine.accumulate(model, [], objective, torch.autograd.backward, n_forwards=n_forwards)
    assert loss == 0.0
    # The last piece runs once; each earlier one once without and once with a graph.
    assert len(calls) == 2 * n_forwards - 1
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_the_constants_of_groups() -> None:
    groups = [make_group(0, k=2), make_group(1, k=3)]
    found = LossInputs.of(groups)
    assert found.group_index.tolist() == [0, 0, 1, 1, 1]
    assert found.rewards.tolist() == [*groups[0].rewards, *groups[1].rewards]
    assert found.rewards.dtype == found.ref_seq_logprobs.dtype == torch.float64
    expected = [*groups[0].ref_seq_logprobs, *groups[1].ref_seq_logprobs]
    assert found.ref_seq_logprobs.tolist() == expected


def test_groups_of_which_some_lack_a_reference_are_refused() -> None:
    without = make_group(4, scored=False)
    with pytest.raises(DataError, match=r"group 'group-00004': every group has ref_seq_logprobs"):
        LossInputs.of([GROUPS[0], without])
    assert LossInputs.of([without]).ref_seq_logprobs.shape == (0,)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_response_over_the_budget_is_refused_with_its_group(layout: LayoutName) -> None:
    """A prompt of 6 and a response of 9 tokens need 6 + 9 - 1 = 14 input tokens; 13 are allowed."""
    model = tiny_model("qwen3")
    group = make_group(3, k=2, prompt_tokens=6, response_tokens=9, vocab_size=VOCAB_SIZE)
    with torch.no_grad():
        engine_of(model, layout, 14).seq_logprobs(model, [group])
        with pytest.raises(DataError, match=r"group 'group-00003': .*14 tokens, more than 13"):
            engine_of(model, layout, 13).seq_logprobs(model, [group])
