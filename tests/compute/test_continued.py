"""The `continued` layout, compared with one forward pass per unpadded sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from support.hybrid_models import CONTINUED, FORGETFUL, HYBRIDS, hybrid_model
from support.rounding import LOGPROB_ROUNDING, ROUNDING
from support.tiny_models import FAMILIES, VOCAB_SIZE, tiny_model
from torch import Tensor, nn

from gvpo_offline.compute.continued import PromptCache, continued_hidden
from gvpo_offline.errors import ConfigError, DataError

LENGTHS = (1, 2, 7, 5, 2)


@dataclass(frozen=True)
class Case:
    """The token ids of a group, and a weight per response for the gradient."""

    prompt_P: Tensor
    responses: tuple[Tensor, ...]
    weights_K: Tensor

    def padded(self, pad: int = 0) -> tuple[Tensor, Tensor]:
        """Responses as right-padded rows, and their lengths."""
        rows = nn.utils.rnn.pad_sequence(list(self.responses), True, pad)
        return rows, torch.tensor([len(row) for row in self.responses])


def make_case(n_prompt: int = 9, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> Case:
    dice = torch.Generator().manual_seed(seed)
    return Case(
        prompt_P=torch.randint(3, VOCAB_SIZE, (n_prompt,), generator=dice),
        responses=tuple(torch.randint(3, VOCAB_SIZE, (n,), generator=dice) for n in lengths),
        weights_K=torch.randn(len(lengths), generator=dice, dtype=torch.float64),
    )


def chosen(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of log-probs of `targets` (T,) under logits (T, V): a float64 scalar, nats."""
    return torch.log_softmax(logits.double(), -1)[torch.arange(len(targets)), targets].sum()


def alone(model: nn.Module, case: Case) -> Tensor:
    """(K,) log-probs, from one forward pass of the bare model per response."""
    sums = []
    for row in case.responses:
        ids = torch.cat([case.prompt_P, row])[None]
        sums.append(chosen(model(input_ids=ids, use_cache=False).logits[0, -len(row) - 1 :], row))
    return torch.stack(sums)


def padded(model: nn.Module, case: Case) -> Tensor:
    """(K,) log-probs, from one forward pass over right-padded rows of prompt and response."""
    n_prompt = len(case.prompt_P)
    rows, lengths = case.padded()
    ids = torch.cat([case.prompt_P.expand(len(rows), -1), rows], dim=1)
    mask = (torch.arange(ids.shape[1]) < n_prompt + lengths[:, None]).long()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, n_prompt - 1 :]
    return torch.stack([chosen(logits[i], row) for i, row in enumerate(case.responses)])


def own_logits(model: nn.Module, hidden_KLD: Tensor) -> Tensor:
    """The model's own logits for hidden states, including scaling and soft-capping."""

    def replaced(module: nn.Module, given: Any, output: Any) -> Any:
        output.last_hidden_state = hidden_KLD
        return output

    hook = model.get_decoder().register_forward_hook(replaced)
    try:
        ids = torch.zeros(hidden_KLD.shape[:2], dtype=torch.int64)
        return model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()


def continued(model: nn.Module, case: Case, pad: int = 0) -> Tensor:
    """(K,) log-probs from `continued_hidden`."""
    prompt_PD, hidden_KLD = continued_hidden(model.get_decoder(), case.prompt_P, *case.padded(pad))
    last = prompt_PD[-1].expand(len(case.responses), 1, -1)
    logits = own_logits(model, torch.cat([last, hidden_KLD], dim=1))
    return torch.stack([chosen(logits[i], row) for i, row in enumerate(case.responses)])


def measured(
    model: nn.Module, case: Case, run: Callable[[nn.Module, Case], Tensor]
) -> tuple[Tensor, Tensor]:
    """(K,) log-probs, and the gradient of their weighted sum in all trained parameters, flat."""
    model.zero_grad()
    sums = run(model, case)
    (sums * case.weights_K).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    flat = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in trained]
    return sums.detach(), torch.cat(flat).double()


def assert_same(
    model: nn.Module, case: Case, run: Callable[[nn.Module, Case], Tensor] = continued
) -> None:
    expected, gradient = measured(model, case, alone)
    sums, found = measured(model, case, run)
    assert (sums - expected).abs().max() <= LOGPROB_ROUNDING
    assert gradient.norm() > 0
    assert (found - gradient).norm() / gradient.norm() <= ROUNDING


@pytest.mark.parametrize("family", CONTINUED)
def test_hybrids_are_exact(family: str) -> None:
    model, case = hybrid_model(family), make_case()
    assert_same(model, case)
    # A lost prompt state would be noticed: with only the last prompt token as context, log-probs
    # differ by nats.
    with torch.no_grad():
        cut = Case(case.prompt_P[-1:], case.responses, case.weights_K)
        assert (alone(model, case) - alone(model, cut)).abs().max() > 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_alone_is_exact_too(family: str) -> None:
    # 9 prompt tokens and windows of 4: windows begin in the prompt and in the responses.
    assert_same(tiny_model(family), make_case())


@pytest.mark.parametrize("family", HYBRIDS)
def test_padded_rows_are_exact_for_every_hybrid(family: str) -> None:
    assert_same(hybrid_model(family), make_case(), padded)


@pytest.mark.parametrize("family", ["qwen3.5", "falcon-h1", "lfm2"])
def test_eager_attention_is_exact(family: str) -> None:
    assert_same(hybrid_model(family, attn_implementation="eager"), make_case())


@pytest.mark.parametrize("family", ["qwen3.5", "mamba2"])
@pytest.mark.parametrize("n_prompt", [1, 2, 3, 4, 70])
def test_prompts_shorter_than_a_convolution_and_longer_than_a_chunk(
    family: str, n_prompt: int
) -> None:
    # Convolutions span 4 tokens; qwen3.5 computes in chunks of 64, this mamba2 in chunks of 4.
    assert_same(hybrid_model(family), make_case(n_prompt))


@settings(max_examples=40, deadline=None)
@given(
    n_prompt=st.integers(1, 12),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    seed=st.integers(0, 999),
)
def test_any_lengths(n_prompt: int, lengths: list[int], seed: int) -> None:
    # In float64, because the gradients of a few groups cancel down to float32 rounding.
    assert_same(hybrid_model("qwen3.5", seed=seed).double(), make_case(n_prompt, lengths, seed))


@pytest.mark.parametrize(("lengths", "n_inputs"), [((1, 1, 1), 0), ((2, 1), 1), ((3, 1), 2)])
def test_shapes_for_the_shortest_responses(lengths: tuple[int, ...], n_inputs: int) -> None:
    # The last token of a response is not an input, so a response of 1 token has no input.
    model, case = hybrid_model("qwen3.5"), make_case(4, lengths)
    prompt_PD, hidden_KLD = continued_hidden(model.get_decoder(), case.prompt_P, *case.padded())
    assert prompt_PD.shape == (4, 32)
    assert hidden_KLD.shape == (len(lengths), n_inputs, 32)
    assert_same(model, case)


def test_padding_and_its_width_change_nothing() -> None:
    model, case = hybrid_model("qwen3.5"), make_case()
    rows, lengths = case.padded(pad=0)
    others, _ = case.padded(pad=77)
    wider = nn.functional.pad(others, (0, 3), value=5)
    results = [
        continued_hidden(model.get_decoder(), case.prompt_P, ids, lengths)[1]
        for ids in (rows, others, wider)
    ]
    counts = torch.arange(results[0].shape[1]) < lengths[:, None] - 1
    for result in results[1:]:
        error = (result[counts] - results[0][counts]).norm()
        assert error <= ROUNDING * results[0][counts].norm()


def test_the_prompt_is_computed_once() -> None:
    model, case, seen = hybrid_model("qwen3.5"), make_case(9, (4, 6, 2)), []
    model.get_input_embeddings().register_forward_hook(
        lambda module, given, output: seen.append(tuple(given[0].shape))
    )
    continued_hidden(model.get_decoder(), case.prompt_P, *case.padded())
    # 9 prompt tokens, then 3 rows as wide as the longest response, 6 - 1 inputs.
    assert seen == [(1, 9), (3, 5)]


def test_what_the_prompt_left_is_not_overwritten() -> None:
    decoder = hybrid_model("qwen3.5").get_decoder()
    cache = PromptCache(decoder.config)
    decoder(input_ids=torch.arange(3, 12)[None], past_key_values=cache, use_cache=True)
    cache.fork(2)
    layer = cache.layers[0]
    held = [layer.conv_states[0], layer.recurrent_states[0]]
    values = [state.clone() for state in held]
    ids = torch.arange(20, 30).view(2, 5)
    decoder(input_ids=ids, past_key_values=cache, use_cache=True)
    assert layer.conv_states[0] is held[0]
    assert layer.recurrent_states[0] is held[1]
    assert all(torch.equal(*pair) for pair in zip(held, values, strict=True))
    assert values[1].abs().max() > 0


@pytest.mark.parametrize(("family", "target"), [("qwen3.5", "all-linear"), ("mamba2", ["in_proj"])])
def test_adapters_get_exact_gradients(family: str, target: str | list[str]) -> None:
    adapted = get_peft_model(hybrid_model(family), LoraConfig(r=2, target_modules=target))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    assert_same(adapted.train(), make_case())


@pytest.mark.parametrize("family", FORGETFUL)
def test_a_scan_without_initial_state_is_wrong_and_a_comparison_sees_it(family: str) -> None:
    # If this fails, transformers now supports an initial state: move the family to CONTINUED.
    model, case = hybrid_model(family), make_case()
    with torch.no_grad():
        assert (continued(model, case) - alone(model, case)).abs().max() > 10 * LOGPROB_ROUNDING


@pytest.mark.parametrize(
    ("family", "error", "message"),
    [
        ("rwkv", ConfigError, "takes a cache as past_key_values or cache_params; received Rwkv"),
        ("recurrent-gemma", ConfigError, "nothing from layer 0"),
        ("minimax", ValueError, "cache of its own"),
    ],
)
def test_states_kept_elsewhere_are_refused(
    family: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        continued(hybrid_model(family), make_case())


def test_gradient_checkpointing_is_refused_only_where_it_acts() -> None:
    model, case = hybrid_model("qwen3.5"), make_case()
    model.gradient_checkpointing_enable()
    assert_same(model.eval(), case)
    with pytest.raises(ConfigError, match=r"gradient checkpointing drops the prompt's state.*off"):
        continued(model.train(), case)


@pytest.mark.parametrize(
    ("prompt", "lengths", "message"),
    [
        ([], [2, 3], "a prompt has at least 1 token; received 0"),
        ([5], [0, 3], r"between 1 and 3 tokens.*received \[0, 3\]"),
        ([5], [2, 4], r"between 1 and 3 tokens.*received \[2, 4\]"),
        ([5], [3], r"each of 2 responses.*received \[3\]"),
    ],
)
def test_bad_groups(prompt: list[int], lengths: list[int], message: str) -> None:
    decoder = hybrid_model("qwen3.5").get_decoder()
    ids = torch.full((2, 3), 7)
    with pytest.raises(DataError, match=message):
        continued_hidden(decoder, torch.tensor(prompt).long(), ids, torch.tensor(lengths))
