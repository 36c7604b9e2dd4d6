"""Log-probs and gradients of the engine, compared with a bare model run on single responses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from support.hybrid_models import HYBRIDS, hybrid_model
from support.oracle import (
    Measured,
    alone,
    gradient_of,
    group_of,
    grown_group,
    measured_alone,
    measured_by,
    objective,
    sequences,
)
from support.rounding import LOGPROB_ROUNDING, ROUNDING
from support.tiny_models import ALIBI, FAMILIES, OTHER_ATTENTION, VOCAB_SIZE, tiny_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.forward import install
from gvpo_offline.compute.layout import packed
from gvpo_offline.compute.model import attention_of, disable_dropout
from gvpo_offline.compute.probe import choose_path, engine_for
from gvpo_offline.compute.settings import ComputePath, LayoutName
from gvpo_offline.errors import DataError
from gvpo_offline.group import Group
from gvpo_offline.stream.plan import CostModel, shape_of

CANCELLED = 1e-4  # the same, for random groups
ALL_FAMILIES = (*FAMILIES, *OTHER_ATTENTION, *ALIBI, *HYBRIDS)


def _tokens(*lengths: int, seed: int = 0) -> Iterator[list[int]]:
    dice = np.random.default_rng(seed)
    return (dice.integers(3, VOCAB_SIZE, n).tolist() for n in lengths)


def _large() -> Group:
    """A group whose longest row, 9 + 23 tokens, exceeds every window; some of its seven responses
    are equal or share a prefix of 18 or 20 tokens.
    """
    prompt, long, *tails = _tokens(9, 24, 5, 2, 1, 6)
    responses = [long, long[:18] + tails[0], tails[2], long, long[:20], tails[3]]
    return group_of(prompt, [*responses, long[:18] + tails[1]])


def _masked() -> Group:
    """A group with a prompt of one token and a loss mask."""
    prompt, *responses = _tokens(1, 9, 2, 1, 7, seed=1)
    masks = [[True] * 4 + [False] * 3 + [True] * 2, [False, True], [True], [False] * 6 + [True]]
    return group_of(prompt, responses, masks)


LARGE, MASKED = _large(), _masked()
# Prompt and longest response have 9 + 24 - 1 = 32 input tokens; the whole of LARGE has 9 + 79.
SMALL_BUDGET, LARGE_BUDGET = 33, 1000


def model_of(family: str, **options: Any) -> nn.Module:
    model: nn.Module = (hybrid_model if family in HYBRIDS else tiny_model)(family, **options)
    disable_dropout(model)
    return model.train()


def engine_of(model: nn.Module, max_tokens: int) -> Engine:
    return engine_for(model, choose_path(model), max_tokens=max_tokens)


def assert_near(found: Measured, truth: Measured, gradient_error: float = ROUNDING) -> None:
    nats, relative = found.errors(truth)
    assert nats <= LOGPROB_ROUNDING
    assert relative <= gradient_error
    assert float(found.loss) == pytest.approx(float(truth.loss), rel=1e-6, abs=LOGPROB_ROUNDING)


def assert_exact(model: nn.Module, groups: tuple[Group, ...] = (LARGE, MASKED)) -> Engine:
    """Check all groups in one forward pass, then each group in pieces.

    In pieces, once with the prompt computed once and once with the prompt in each piece.
    """
    # Computed before the engine modifies the model.
    together = measured_alone(model, groups)
    apart = [measured_alone(model, [g]) for g in groups] if len(groups) > 1 else [together]
    engine = engine_of(model, LARGE_BUDGET)
    assert_near(measured_by(engine, model, groups), together)
    for group, truth in zip(groups, apart, strict=True):
        budget = shape_of(group).width + 1
        small = replace(engine, cost=replace(engine.cost, max_tokens=budget))
        assert_near(measured_by(small, model, [group]), truth)
        if engine.prompt_once:
            again = replace(small, prompt_once=False)
            assert_near(measured_by(again, model, [group], n_forwards=9), truth)
    return engine


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_is_exact(family: str) -> None:
    # The float32 scan of Mamba 1 differs from float64 by 1e-4, so the order of sums matters.
    model = model_of(family)
    assert_exact(model.double() if family == "mamba" else model)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_ATTENTION, "bloom", "qwen3.5", "jamba"])
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    model = model_of(family)
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    engine = assert_exact(model, (LARGE,))
    # The `continued` layout is not used here, because gradient checkpointing drops the cache.
    assert engine.path.layout == ("shared" if family in SHARED else "padded")


SHARED = {*FAMILIES, *OTHER_ATTENTION} - {"falcon"}


def with_lora(model: Any) -> nn.Module:
    """A LoRA adapter with non-zero output on every linear module, including an untied head."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and "router" not in name
        and not (tied and module is model.get_output_embeddings())
    ]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=names))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    trained: nn.Module = adapted.train()
    return trained


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_ATTENTION, "bloom", "qwen3.5", "jamba"])
def test_adapters_get_exact_gradients(family: str) -> None:
    assert_exact(with_lora(model_of(family)), (LARGE,))


def test_adapters_under_gradient_checkpointing() -> None:
    model = model_of("olmo3")
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    adapted = with_lora(model)
    assert any("lm_head.lora_B" in name for name, _ in adapted.named_parameters())
    assert assert_exact(adapted).path.layout == "shared"


def test_windows_that_are_shorter_than_the_sequences_matter() -> None:
    # The same weights with and without a window of 5: ignoring it changes log-probs by nats.
    with torch.no_grad():
        sums = [alone(model_of(name), [LARGE]) for name in ("mistral", "mistral-window")]
    assert (sums[0] - sums[1]).abs().max() > 1


# ---- random groups, with padded rows as the oracle ----

# Full attention, a sliding window, chunks.
RANDOM_FAMILIES = ("qwen3", "olmo3", "llama4")


@functools.cache
def exact_model(family: str) -> nn.Module:
    # In float64, because the gradients of a few groups cancel down to float32 rounding. Log-softmax
    # stays in float32, so some of this rounding remains: CANCELLED.
    model = model_of(family).double()
    choose_path(model)
    return model


@pytest.fixture(scope="module")
def _tries() -> Iterator[None]:
    """Within it, responses share prefixes of two tokens or more."""
    defaults: Any = packed.__kwdefaults__
    with mock.patch.dict(defaults, min_shared_tokens=2):
        yield


@pytest.mark.usefixtures("_tries")
@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(grown_group(max_response=20), min_size=1, max_size=3),
    family=st.sampled_from(RANDOM_FAMILIES),
    prompt_once=st.booleans(),
    data=st.data(),
)
def test_random_groups_are_what_padded_rows_make_of_them(
    groups: list[Group], family: str, prompt_once: bool, data: st.DataObject
) -> None:
    model = exact_model(family)
    head = "logits" if family == "llama4" else "fused"
    implementation = attention_of(model)
    budget = LARGE_BUDGET
    if len(groups) == 1:
        shape = shape_of(groups[0])
        budget = data.draw(st.integers(shape.width, shape.width + 20))
    padded = ComputePath("padded", implementation, head)  # type: ignore[arg-type]
    shared = ComputePath("shared", "pieces", head)  # type: ignore[arg-type]
    oracle = measured_by(Engine(padded, CostModel("padded", LARGE_BUDGET)), model, groups)
    engine = Engine(shared, CostModel("shared", budget), prompt_once=prompt_once)
    found = measured_by(engine, model, groups)
    assert_near(found, oracle, CANCELLED)


@settings(max_examples=20, deadline=None)
@given(groups=st.lists(grown_group(max_response=20), min_size=1, max_size=3))
def test_padded_rows_are_what_a_bare_model_makes_of_single_ones(groups: list[Group]) -> None:
    model = exact_model("olmo3")
    padded = Engine(ComputePath("padded", "sdpa", "fused"), CostModel("padded", LARGE_BUDGET))
    assert_near(measured_by(padded, model, groups), measured_alone(model, groups), CANCELLED)


# ---- data types ----


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt2", "qwen3.5"])
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_low_precision_errs_no_more_than_the_bare_model_does(family: str, how: str) -> None:
    model = model_of(family)
    exact = measured_alone(model, [LARGE])
    engine = engine_of(model, SMALL_BUDGET)
    around: Callable[[], Any] | None = None
    if how == "bfloat16":
        model.bfloat16()
    else:
        around = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    with around() if around else torch.enable_grad():
        own_nats, own_relative = measured_alone(model, [LARGE]).errors(exact)
    nats, relative = measured_by(engine, model, [LARGE], around=around).errors(exact)
    # Rounding differs between paths; a wrong path changes log-probs by nats, gradients by 100%.
    assert nats <= 2 * own_nats + 0.05
    assert relative <= 2 * own_relative + 0.01


# ---- other guarantees of the engine ----


def shared_engine(model: nn.Module, max_tokens: int = LARGE_BUDGET, **options: Any) -> Engine:
    return replace(engine_of(model, max_tokens), **options)


@pytest.mark.parametrize("max_tokens", [SMALL_BUDGET, LARGE_BUDGET])
def test_without_gradients_the_numbers_are_the_same_bits(max_tokens: int) -> None:
    model = model_of("qwen3")
    engine = shared_engine(model, max_tokens)
    with torch.no_grad():
        before = engine.seq_logprobs(model, [LARGE])
    assert torch.equal(before, measured_by(engine, model, [LARGE]).sums_R)


@pytest.mark.parametrize("max_tokens", [SMALL_BUDGET, LARGE_BUDGET])
def test_every_token_has_its_logprob_counted_or_not(max_tokens: int) -> None:
    model = model_of("qwen3")
    engine = shared_engine(model, max_tokens)
    for group in (LARGE, MASKED):
        with torch.no_grad():
            tokens = engine.token_logprobs(model, [group])
            # A token's log-prob is the difference of the sums with and without it.
            unmasked = replace(group, loss_mask=None)
            sums = alone(model, [unmasked])
            counted = alone(model, [group])
        assert [len(own) for own in tokens] == group.response_lengths
        masks = [torch.from_numpy(mask) for _, _, mask in sequences([group])]
        whole = torch.stack([own.double().sum() for own in tokens])
        part = torch.stack([own[m].double().sum() for own, m in zip(tokens, masks, strict=True)])
        torch.testing.assert_close(whole, sums, rtol=0, atol=LOGPROB_ROUNDING)
        torch.testing.assert_close(part, counted, rtol=0, atol=LOGPROB_ROUNDING)


def read_tokens(model: Any, compute: Callable[[], object]) -> list[int]:
    """Numbers of input tokens of the forward passes, in order."""
    seen: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].numel())
    )
    compute()
    hook.remove()
    return seen


def test_passes_keep_to_the_budget_and_read_the_prompt_once() -> None:
    model = model_of("qwen3")
    engine = shared_engine(model, 30)
    # The prompt has 4 tokens, the responses 20, 12, 10 and 8 input tokens. 30 - 4 = 26 fit beside
    # the prompt. First fit, longest first: 20 | 12 + 10 | 8. The largest piece comes last.
    prompt, *responses = _tokens(4, 21, 13, 11, 9)
    group = group_of(prompt, responses)
    passes = read_tokens(model, lambda: measured_by(engine, model, [group]))
    # The prompt; 8 and 20 without a graph; 22 with a graph; 8 and 20 again with a graph.
    assert passes == [4, 8, 20, 22, 8, 20]
    again = replace(engine, prompt_once=False)
    passes = read_tokens(model, lambda: measured_by(again, model, [group]))
    assert passes == [12, 24, 26, 12, 24]
    assert max(passes) <= 30


def test_equal_responses_are_read_once() -> None:
    model = model_of("qwen3")
    prompt, response, other = _tokens(5, 9, 4)
    group = group_of(prompt, [response, response, other, response])
    engine = shared_engine(model)
    passes = read_tokens(model, lambda: measured_by(engine, model, [group]))
    assert passes == [5 + 8 + 3]
    # Each of them still contributes to the gradient: see test_every_family_is_exact.


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
def test_what_is_kept_of_the_logits_changes_nothing(kept_bytes: int) -> None:
    model = model_of("granite")
    truth = measured_alone(model, [LARGE, MASKED])
    engine = shared_engine(model, kept_bytes=kept_bytes)
    assert_near(measured_by(engine, model, [LARGE, MASKED]), truth)


@pytest.mark.parametrize("layout", ["shared", "packed", "continued", "padded"])
@pytest.mark.parametrize("n_forwards", [1, 3])
def test_no_groups_are_passes_over_nothing(layout: LayoutName, n_forwards: int) -> None:
    model = model_of("qwen3")
    path = choose_path(model, layout=layout).path
    engine = Engine(path, CostModel(layout, LARGE_BUDGET), prompt_once=False)
    seen = read_tokens(
        model, lambda: engine.accumulate(model, [], objective, Tensor.backward, n_forwards)
    )
    # Every rank calls the model equally often: n - 1 passes without a graph, then n with one.
    calls = {"continued": 2}.get(layout, 1)
    assert len(seen) == calls * (1 if n_forwards == 1 else 2 * n_forwards - 1)
    assert gradient_of(model).abs().max() == 0
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("max_tokens", [SMALL_BUDGET, LARGE_BUDGET])
def test_entropies_are_told_once(max_tokens: int) -> None:
    model = model_of("qwen3")
    told: list[Tensor] = []
    engine = shared_engine(model, max_tokens, on_entropy=told.append)
    measured_by(engine, model, [LARGE])
    expected = []
    for prompt, response, _ in sequences([LARGE]):
        ids = torch.from_numpy(np.concatenate([prompt, response])).long()
        log_p = torch.log_softmax(model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1], -1)
        expected.append(-(log_p.exp() * log_p).sum(-1).detach())
    # In pieces the order differs.
    ordered, true = torch.cat(told).sort().values, torch.cat(expected).sort().values
    torch.testing.assert_close(ordered, true, rtol=0, atol=1e-5)


def test_a_response_that_does_not_fit_with_its_prompt() -> None:
    model = model_of("qwen3")
    engine = shared_engine(model, 31)
    with pytest.raises(DataError, match=r"'group'.*received 32 tokens, more than 31.*[Rr]aise"):
        engine.seq_logprobs(model, [LARGE])


def test_installing_twice_is_installing_once() -> None:
    model = model_of("qwen3")
    install(model)
    taught = model.forward
    install(model)
    assert model.forward == taught
