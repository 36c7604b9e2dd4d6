"""Log-probs from hidden states, compared with the log-softmax of explicit logits."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from support.tiny_models import FAMILIES, VOCAB_SIZE, tiny_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from gvpo_offline.compute import head as head_module
from gvpo_offline.compute import vocabulary
from gvpo_offline.compute.fused import LogitTerm, fused_pair_logprobs
from gvpo_offline.compute.head import UnsupportedHeadError, find_head, pair_logprobs

PLENTY = 1 << 30
IDS = torch.arange(24).reshape(2, 12) * 4 % VOCAB_SIZE
# Pairs of the 24 rows of IDS: out of order, one row three times, one pair twice, some rows never.
ROWS = torch.tensor([7, 0, 23, 7, 7, 11, 0, 0])
TOKENS = torch.tensor([3, 99, 0, 50, 3, 42, 99, 1])
WEIGHTS = torch.tensor([0.5, -1.0, 2.0, 0.25, -0.75, 1.5, 1.0, -0.3], dtype=torch.float64)
_SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
OTHER_HEADS: dict[str, Callable[[], nn.Module]] = {
    "multiplied": lambda: CohereForCausalLM(CohereConfig(**_SMALL, logit_scale=0.0625)),
    "multiplied by the decoder's": lambda: FalconH1ForCausalLM(
        FalconH1Config(**_SMALL, **_MAMBA, num_key_value_heads=4, lm_head_multiplier=0.3)
    ),
    "with a bias": lambda: PhiForCausalLM(PhiConfig(**_SMALL)),
}


def model_of(name: str) -> nn.Module:
    if name in FAMILIES:
        return tiny_model(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OTHER_HEADS[name]().eval()
        with torch.no_grad():
            for parameter in model.get_output_embeddings().parameters():
                parameter.normal_(std=1.0)
    return model


def hidden_of(model: nn.Module) -> Tensor:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.get_decoder()(input_ids=IDS, use_cache=False)[0].flatten(0, 1)


def own_logprobs(model: nn.Module) -> Tensor:
    """(8,) float64 log-probs of the pairs from the model's own logits, nats."""
    logits = model(input_ids=IDS, use_cache=False).logits.flatten(0, 1)
    return torch.log_softmax(logits.double(), dim=-1)[ROWS, TOKENS]


def our_logprobs(model: nn.Module, *, kept_bytes: int = PLENTY) -> Tensor:
    head = find_head(model)
    return pair_logprobs(
        head, hidden_of(model), ROWS, TOKENS, kept_bytes=kept_bytes
    ).logprobs_N.double()


def gradients(model: nn.Module, logprobs: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((logprobs * WEIGHTS).sum(), list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, grads, strict=True) if g is not None}


def relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[n].double() - theirs[n].double()).square().sum()) for n in ours)
    return (difference / sum(float(g.double().square().sum()) for g in theirs.values())) ** 0.5


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_HEADS])
def test_families_agree_with_their_own_logits(family: str) -> None:
    model = model_of(family)
    ours, own = our_logprobs(model), own_logprobs(model)
    assert ours.min() < -3.0  # large enough that a wrong scale or cap is noticed
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=0)
    assert relative_difference(gradients(model, ours), gradients(model, own)) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_tied_and_untied_heads(family: str, tied: bool) -> None:
    model = tiny_model(family)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    else:
        model.get_output_embeddings().weight = nn.Parameter(torch.randn(VOCAB_SIZE, 32))
    ours, own = gradients(model, our_logprobs(model)), gradients(model, own_logprobs(model))
    assert relative_difference(ours, own) < 1e-5


class Case:
    """Random float64 inputs and weights, and log-probs from their explicit logits."""

    def __init__(self, n_rows: int, vocab: int, widths: list[int], n_pairs: int, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.parts = [
            LogitTerm(
                torch.randn(n_rows, width, dtype=torch.float64, generator=random) * 2,
                torch.randn(vocab, width, dtype=torch.float64, generator=random),
            )
            for width in widths
        ]
        self.rows = torch.randint(n_rows, (n_pairs,), generator=random)
        self.tokens = torch.randint(vocab, (n_pairs,), generator=random)
        self.grad = torch.randn(n_pairs, dtype=torch.float64, generator=random)

    def logits(self, scale: float, soft_cap: float | None) -> Tensor:
        sums = scale * sum(x @ weight.T for x, weight in self.parts)
        return sums if soft_cap is None else soft_cap * torch.tanh(sums / soft_cap)

    def gradients(self, logprobs: Tensor) -> list[Tensor]:
        leaves = [t for part in self.parts for t in part if t.requires_grad]
        return list(torch.autograd.grad((logprobs * self.grad).sum(), leaves)) if leaves else []


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_factors_agree_with_logits_written_out(data: st.DataObject) -> None:
    n_rows, vocab = data.draw(st.integers(1, 9), "rows"), data.draw(st.integers(1, 12), "vocab")
    widths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3), "widths")
    case = Case(n_rows, vocab, widths, data.draw(st.integers(0, 15), "pairs"), seed=n_rows + vocab)
    for part in case.parts:
        for tensor in part:
            tensor.requires_grad_(data.draw(st.booleans(), "needs a gradient"))
    scale = data.draw(st.sampled_from([1.0, 0.3, 2.0]), "scale")
    soft_cap = data.draw(st.sampled_from([None, 1.5, 30.0]), "soft-cap")
    kept_bytes = data.draw(st.integers(0, vocab + 1), "kept columns") * n_rows * 8
    columns = data.draw(st.integers(1, 12), "columns of a block")
    with (
        patch.object(vocabulary, "_COLUMN_MULTIPLE", 1),
        patch.object(vocabulary, "_MIN_COLUMNS", 1),
        patch.object(vocabulary, "CPU_BLOCK_BYTES", columns * n_rows * 4),
    ):
        ours = fused_pair_logprobs(
            case.parts,
            case.rows,
            case.tokens,
            scale=scale,
            soft_cap=soft_cap,
            matmul_dtype=torch.float64,
            kept_bytes=kept_bytes,
            entropy=True,
        )
    logprobs = torch.log_softmax(case.logits(scale, soft_cap), dim=-1)
    expected = logprobs[case.rows, case.tokens]
    torch.testing.assert_close(ours.logprobs_N, expected, atol=1e-12, rtol=1e-12)
    assert ours.entropy_H is not None
    assert not ours.entropy_H.requires_grad
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    torch.testing.assert_close(ours.entropy_H, entropy.detach(), atol=1e-12, rtol=0)
    pairs = zip(case.gradients(ours.logprobs_N), case.gradients(expected), strict=True)
    for our_grad, grad in pairs:
        torch.testing.assert_close(our_grad, grad, atol=1e-11, rtol=1e-11)


def test_the_gradient_of_one_pair_by_hand() -> None:
    # Logits (1, 0): p = e / (e + 1) for token 0, so d log p_0 / d x = W_0 - p W_0 - (1 - p) W_1.
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0]], requires_grad=True)
    out = fused_pair_logprobs(
        [LogitTerm(x, weight)],
        torch.tensor([0]),
        torch.tensor([0]),
        matmul_dtype=torch.float32,
        kept_bytes=PLENTY,
    )
    p = 0.7310585786300049
    torch.testing.assert_close(out.logprobs_N, torch.tensor([p]).log())
    out.logprobs_N.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[1 - p, 0.0]]))
    torch.testing.assert_close(weight.grad, (1 - p) * torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_large_vocabulary_in_float32(frozen: bool) -> None:
    case = Case(40, 151_936, [48], 60, seed=3)
    x, weight = 0.2 * case.parts[0].input_HK.float(), case.parts[0].weight_VK.float()
    single = [LogitTerm(x.requires_grad_(), weight.requires_grad_(not frozen))]
    ours = fused_pair_logprobs(
        single, case.rows, case.tokens, matmul_dtype=torch.float32, kept_bytes=PLENTY
    )
    assert ours.logprobs_N.dtype == torch.float32
    # The same float32 numbers, in float64.
    case.parts = [
        LogitTerm(*(t.detach().double().requires_grad_(t.requires_grad) for t in single[0]))
    ]
    expected = torch.log_softmax(case.logits(1.0, None), dim=-1)[case.rows, case.tokens]
    assert expected.min() < -18.0
    assert (ours.logprobs_N - expected).abs().max() < 1e-5
    grads = torch.autograd.grad(
        (ours.logprobs_N * case.grad).sum(), [t for t in single[0] if t.requires_grad]
    )
    for our_grad, grad in zip(grads, case.gradients(expected), strict=True):
        assert (our_grad - grad).norm() < 1e-5 * grad.norm()


@contextlib.contextmanager
def saved_shapes() -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the tensors that forward passes save for the backward pass."""
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield shapes


@pytest.mark.parametrize(
    ("trained", "kept_columns", "expected"),
    [
        ("hidden and weight", 777, 777),
        ("hidden and weight", 776, 768),  # blocks of 64 columns, the last of 9
        ("hidden and weight", 63, 0),
        ("hidden", 777, 777),  # with a frozen head the backward pass needs no logits
    ],
)
def test_what_is_kept_for_the_backward_pass(trained: str, kept_columns: int, expected: int) -> None:
    n_rows, vocab, width = 200, 777, 8
    x = torch.randn(n_rows, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad="weight" in trained)
    with small_blocks():
        out = fused_pair_logprobs(
            [LogitTerm(x, weight)],
            torch.arange(n_rows),
            torch.arange(n_rows),
            matmul_dtype=torch.float32,
            kept_bytes=kept_columns * n_rows * 4,
        ).logprobs_N
    leaves = [leaf for leaf in (x, weight) if leaf.requires_grad]
    per_column = 2 * n_rows * width
    needed = len(leaves) if weight.requires_grad else 0
    grads = []
    # Kept blocks are released in the first backward pass; a second one recomputes all of them.
    for kept in (expected, 0 if needed else vocab):
        with FlopCounterMode(display=False) as counter:
            grads.append(torch.autograd.grad(out.sum(), leaves, retain_graph=True))
        assert counter.get_total_flops() == per_column * (needed * vocab + vocab - kept)
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """Blocks of 64 columns."""
    with (
        patch.object(vocabulary, "CPU_BLOCK_BYTES", 1),
        patch.object(vocabulary, "_MIN_COLUMNS", 1),
    ):
        yield


@pytest.mark.parametrize(
    ("trained", "kept_bytes", "products"),
    [
        ("hidden and weight", PLENTY, 3),  # logits, and a gradient of each factor
        ("hidden and weight", 0, 4),  # the logits are recomputed
        ("weight", PLENTY, 2),
        ("hidden", 0, 2),
        ("nothing", 0, 1),
        ("all, but under no_grad", 0, 1),
        ("hidden and weight, but no pairs", PLENTY, 0),
    ],
)
def test_floating_point_operations(trained: str, kept_bytes: int, products: int) -> None:
    n_rows, vocab, width = 150, 300, 8
    x = torch.randn(n_rows, width, requires_grad="hidden" in trained or "all" in trained)
    weight = torch.randn(vocab, width, requires_grad="weight" in trained or "all" in trained)
    rows = torch.arange(0 if "no pairs" in trained else n_rows)
    with (
        FlopCounterMode(display=False) as counter,
        torch.set_grad_enabled("no_grad" not in trained),
        small_blocks(),
    ):
        out = fused_pair_logprobs(
            [LogitTerm(x, weight)], rows, rows, matmul_dtype=torch.float32, kept_bytes=kept_bytes
        )
        if out.logprobs_N.requires_grad:
            out.logprobs_N.sum().backward()
    assert counter.get_total_flops() == products * 2 * n_rows * vocab * width


def test_nothing_is_kept_without_gradients() -> None:
    model = tiny_model("llama")
    with torch.no_grad(), saved_shapes() as saved:
        without = our_logprobs(model)
    assert not saved
    assert not without.requires_grad
    torch.testing.assert_close(without, our_logprobs(model).detach(), atol=0, rtol=0)


def test_runs_repeat_exactly_and_the_order_of_pairs_does_not_matter() -> None:
    model = tiny_model("gemma2")
    first, second = our_logprobs(model), our_logprobs(model)
    grads, again = gradients(model, first), gradients(model, second)
    assert torch.equal(first, second)
    assert all(torch.equal(grads[name], again[name]) for name in grads)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    head, hidden = find_head(model), hidden_of(model)
    shuffled = pair_logprobs(head, hidden, ROWS[order], TOKENS[order], kept_bytes=0)
    assert torch.equal(shuffled.logprobs_N.double(), first[order])


@pytest.mark.parametrize("n_rows", [0, 5])
@pytest.mark.parametrize("frozen", [True, False])
def test_no_pairs_give_zero_gradients_not_none(n_rows: int, frozen: bool) -> None:
    model = model_of("with a bias")
    model.get_output_embeddings().requires_grad_(not frozen)
    nothing = torch.zeros(0, dtype=torch.int64)
    hidden = hidden_of(model)[:n_rows]
    for entropy in (False, True):
        out = pair_logprobs(
            find_head(model), hidden, nothing, nothing, kept_bytes=PLENTY, entropy=entropy
        )
        assert out.logprobs_N.shape == (0,)
        assert (out.entropy_H is None) != entropy
        model.zero_grad()
        out.logprobs_N.sum().backward(retain_graph=True)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert not parameter.grad.any(), name


@pytest.mark.parametrize("kept_bytes", [PLENTY, 0])
def test_gradient_checkpointing_around_it(kept_bytes: int) -> None:
    model = tiny_model("granite")
    head, hidden = find_head(model), hidden_of(model).detach().requires_grad_()
    leaves = [hidden, model.get_output_embeddings().weight]

    def logprobs(states: Tensor) -> Tensor:
        return pair_logprobs(head, states, ROWS, TOKENS, kept_bytes=kept_bytes).logprobs_N

    with saved_shapes() as saved:
        again = checkpoint(logprobs, hidden, use_reentrant=False)
    assert all(VOCAB_SIZE not in shape for shape in saved)  # recomputed
    inside = torch.autograd.grad((again * WEIGHTS).sum(), leaves)
    outside = torch.autograd.grad((logprobs(hidden) * WEIGHTS).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize("kept_bytes", [PLENTY, 0])
@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_bf16_is_as_good_as_the_models_own(way: str, kept_bytes: int) -> None:
    model = tiny_model("granite")
    exact = own_logprobs(model).detach()
    exact_grads = gradients(model, own_logprobs(model))
    if way == "weights":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast"):
        ours, own = our_logprobs(model, kept_bytes=kept_bytes), own_logprobs(model)
    assert (ours - exact).norm() < 1.2 * (own - exact).norm()
    grads = gradients(model, ours)
    assert {g.dtype for g in grads.values()} == {p.dtype for p in model.parameters()}
    off = relative_difference(grads, exact_grads)
    assert off < 1.2 * relative_difference(gradients(model, own), exact_grads)


def test_autocast_leaves_the_head_in_float32_without_bfloat16_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CPU would round the products of bfloat16 factors, the logits, to bfloat16 too."""
    monkeypatch.setattr(head_module, "multiplies_bfloat16", lambda device: False)
    head, hidden = find_head(tiny_model("granite")), hidden_of(tiny_model("granite"))

    def logprobs() -> Tensor:
        return pair_logprobs(head, hidden, ROWS, TOKENS, kept_bytes=0).logprobs_N

    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = logprobs()
    assert torch.equal(under_autocast, logprobs())


def test_with_bfloat16_instructions_the_factors_are_rounded_and_products_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The log-probs and gradients are those of float32 on factors that were rounded before.

    oneDNN's setting is what it was afterwards.
    """
    monkeypatch.setattr(head_module, "multiplies_bfloat16", lambda device: True)
    model = tiny_model("granite")
    head, hidden = find_head(model), hidden_of(model).detach().requires_grad_()
    before = torch.backends.mkldnn.matmul.fp32_precision
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pair_logprobs(head, hidden, ROWS, TOKENS, kept_bytes=0).logprobs_N
    with torch.no_grad():
        rounded = copy.deepcopy(model)
        layer = rounded.get_output_embeddings()
        layer.weight.copy_(layer.weight.bfloat16())
        expected = pair_logprobs(
            find_head(rounded), hidden.bfloat16().float(), ROWS, TOKENS, kept_bytes=0
        ).logprobs_N
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_bfloat16_products_round_the_factors() -> None:
    """As on CUDA. The expected logits are those of the same factors, divided by 3 after one more
    rounding of 2^-9, at most 0.03 for the logits below 15 nats here.
    """
    model = tiny_model("granite")
    hidden = (20 * hidden_of(model)).detach()  # logits of a few nats
    weight = model.get_output_embeddings().weight

    def logprobs(dtype: torch.dtype) -> Tensor:
        return fused_pair_logprobs(
            [LogitTerm(hidden, weight)], ROWS, TOKENS, scale=1 / 3, matmul_dtype=dtype, kept_bytes=0
        ).logprobs_N

    rounded = logprobs(torch.bfloat16)
    logits = hidden.bfloat16() @ weight.bfloat16().T / 3.0
    expected = torch.log_softmax(logits.double(), dim=-1)[ROWS, TOKENS]
    assert rounded.dtype == torch.float32
    assert (rounded - logprobs(torch.float32)).abs().max() > 1e-3
    torch.testing.assert_close(rounded.double(), expected, atol=0.03, rtol=0)


def with_lora(model: nn.Module, **changes: Any) -> PeftModel:
    """LoRA on the head and elsewhere, with weights large enough to affect log-probs."""
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]}
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(**(options | changes)))
    show_adapters(adapted)
    return adapted.eval()


def show_adapters(adapted: PeftModel) -> None:
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)


def two_adapters() -> PeftModel:
    adapted = with_lora(tiny_model("llama"))
    adapted.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"]))
    show_adapters(adapted)
    adapted.base_model.set_adapter(["default", "other"])
    return adapted


ADAPTED: dict[str, Callable[[], PeftModel]] = {
    "lora": lambda: with_lora(tiny_model("llama")),
    "lora, scaled logits": lambda: with_lora(tiny_model("granite")),
    "lora, soft-cap": lambda: with_lora(tiny_model("gemma2")),
    "lora with bias": lambda: with_lora(model_of("with a bias"), lora_bias=True),
    "head's bias trained": lambda: with_lora(model_of("with a bias"), bias="all"),
    "two adapters": two_adapters,
    "head left alone": lambda: with_lora(tiny_model("llama"), target_modules=["q_proj"]),
    "modules_to_save": lambda: with_lora(
        tiny_model("llama"), target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_adapters_on_the_head(kind: str) -> None:
    model = ADAPTED[kind]()
    ours, own = our_logprobs(model), own_logprobs(model)
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=0)
    grads = gradients(model, ours)
    assert relative_difference(grads, gradients(model, own)) < 1e-5
    assert any("lm_head" in name for name in grads) == (kind != "head left alone")


def test_adapters_are_asked_at_every_call() -> None:
    model = with_lora(
        tiny_model("llama"), target_modules=["q_proj", "lm_head"], modules_to_save=None
    )
    head = find_head(model)

    def ours() -> Tensor:
        return pair_logprobs(head, hidden_of(model), ROWS, TOKENS, kept_bytes=0).logprobs_N.double()

    active = ours()
    torch.testing.assert_close(active, own_logprobs(model), atol=1e-5, rtol=0)
    with model.disable_adapter():
        torch.testing.assert_close(ours(), own_logprobs(model), atol=1e-5, rtol=0)
        assert (ours() - active).abs().max() > 0.1
    model.merge_adapter()
    torch.testing.assert_close(ours(), active, atol=1e-4, rtol=0)


def test_a_disabled_copy_of_the_head_gives_way_to_the_original() -> None:
    model = ADAPTED["modules_to_save"]()
    with torch.no_grad():
        model.get_base_model().get_output_embeddings().weight.mul_(1.5)
    with model.disable_adapter():
        torch.testing.assert_close(our_logprobs(model), own_logprobs(model), atol=1e-5, rtol=0)


def test_float32_adapters_on_a_bf16_head() -> None:
    model = with_lora(tiny_model("llama").to(torch.bfloat16))
    exact = gradients(model.float(), own_logprobs(model))
    model = with_lora(tiny_model("llama").to(torch.bfloat16))
    grads = gradients(model, our_logprobs(model))
    assert {g.dtype for g in grads.values()} == {torch.float32}
    assert relative_difference(grads, exact) < 0.05


def hooked() -> nn.Module:
    model = tiny_model("llama")
    model.get_output_embeddings().register_forward_hook(lambda *_: None)
    return model


def changed(name: str, value: Any) -> nn.Module:
    model = tiny_model("llama")
    setattr(model.config, name, value)
    return model


class Quieter(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


def with_layer(layer: nn.Module) -> nn.Module:
    model = tiny_model("llama")
    model.lm_head = layer
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no model of transformers": (lambda: nn.Linear(2, 2), "transformers causal language model"),
    "no head": (lambda: tiny_model("llama").get_decoder(), "."),
    "encoder and decoder": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        ),
        "decoder only",
    ),
    "layers in between": (
        lambda: ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**_SMALL, cls_token_id=1)),
        "nothing but the output layer",
    ),
    "another kind of layer": (lambda: with_layer(nn.Sequential(nn.Linear(32, 100))), "nn.Linear"),
    "a layer with ways of its own": (lambda: with_layer(Quieter(32, 100)), "Quieter"),
    "a hook": (hooked, "without hooks"),
    "tokens that are none": (lambda: changed("unpadded_vocab_size", 90), "90 tokens"),
    "a scale of 0": (lambda: changed("logit_scale", 0), "logit_scale=0"),
    "a negative soft-cap": (lambda: changed("final_logit_softcapping", -1.0), "soft-cap"),
    "DoRA": (lambda: with_lora(tiny_model("llama"), use_dora=True), "plain LoRA"),
    "tokens trained in a tied head": (
        lambda: with_lora(tiny_model("gemma2"), trainable_token_indices=[3, 4]),
        ".",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_heads_that_are_refused(kind: str) -> None:
    make, words = REFUSED[kind]
    with pytest.raises(UnsupportedHeadError, match=words) as caught:
        find_head(make())
    assert "the model's own logits" in str(caught.value)


def test_merged_and_disabled_is_refused() -> None:
    model = with_lora(tiny_model("llama"))
    head, hidden = find_head(model), hidden_of(model)
    model.merge_adapter()
    with model.disable_adapter(), pytest.raises(UnsupportedHeadError, match="not merged"):
        pair_logprobs(head, hidden, ROWS, TOKENS, kept_bytes=0)


@pytest.mark.parametrize(
    ("row", "token", "words"),
    [
        (-1, 3, r"row is not in \[0, 24\)"),
        (24, 3, r"row is not in \[0, 24\)"),
        (3, -100, r"token is not in \[0, 100\)"),  # a masked label
        (3, 100, r"token is not in \[0, 100\)"),
    ],
)
def test_pairs_out_of_range(row: int, token: int, words: str) -> None:
    model = tiny_model("llama")
    rows, tokens = torch.tensor([0, row, 5]), torch.tensor([7, token, 7])
    with pytest.raises(IndexError, match=words):
        pair_logprobs(find_head(model), hidden_of(model), rows, tokens, kept_bytes=0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
