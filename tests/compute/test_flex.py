"""Flex attention over a tree: block tables element by element, results against dense masks.

On CPUs torch raises an error for the backward pass of flex attention. The graph that it traces for
GPUs also runs on a CPU, so the tests disable that error. The kernels themselves are torch's.
"""

from __future__ import annotations

import contextlib
import functools
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.builders import make_group
from support.tiny_models import tiny_model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex
from torch.utils.checkpoint import checkpoint

from gvpo_offline.compute import flex
from gvpo_offline.compute.attention import (
    AttentionInputs,
    PackedRow,
    _dense,
    packed_forward,
    use_tree_attention,
)
from gvpo_offline.compute.flex import FlexPlan, flex_tree_attention
from gvpo_offline.compute.layout import PackedInput, packed
from gvpo_offline.compute.tree import AttentionRule, Tree, visible

CPU = torch.device("cpu")
RULES = (AttentionRule(), AttentionRule("window", 5), AttentionRule("chunk", 4))


def _refuse_nothing(*_: Tensor) -> None:
    """Replaces torch's check; a function, because the compiler cannot trace a mock."""


@pytest.fixture(autouse=True, scope="module")
def _backward_on_cpu() -> Iterator[None]:
    with mock.patch.object(torch_flex, "_validate_device", _refuse_nothing):
        yield


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A compiler backend that traces as for a GPU, without its kernels; counts compilations."""
    torch._dynamo.reset()
    counting = CompileCounterWithBackend("aot_eager")
    compiled = functools.cache(
        lambda: torch.compile(flex._attend, fullgraph=True, backend=counting)
    )
    monkeypatch.setattr(flex, "_compiled", compiled)
    return counting


@contextlib.contextmanager
def not_compiled() -> Iterator[None]:
    """Within it, flex attention runs eagerly, without tracing."""
    with (
        mock.patch.object(flex, "_compiled", return_value=flex._attend),
        mock.patch.object(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True),
    ):
        yield


def row_of(*seeds: int, vocab_size: int = 2, prefix_segments: int = 0, **options: Any) -> Tree:
    """The tree of random groups, whose small vocabulary makes responses share prefixes."""
    groups = [make_group(seed, vocab_size=vocab_size, **options) for seed in seeds]
    row = packed(groups, min_shared_tokens=1).input
    assert isinstance(row, PackedInput)
    prefix = int(row.tree.starts[min(prefix_segments, len(row.tree.starts) - 1)])
    return replace(row.tree, prefix=prefix)


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    seeds = draw(st.lists(st.integers(0, 999), min_size=1, max_size=4))
    return row_of(
        *seeds,
        prompt_tokens=draw(st.none() | st.integers(1, 20)),
        response_tokens=draw(st.none() | st.integers(1, 12)),
        prefix_segments=draw(st.integers(0, 3)),
    )


rules = st.builds(
    AttentionRule, st.sampled_from(["window", "chunk"]), st.integers(1, 12)
) | st.just(AttentionRule())


# ---- visibility ----


def times_met(count: Tensor, indices: Tensor, shape: tuple[int, int]) -> NDArray[np.int64]:
    """(queries, keys) in whole blocks: how often a block table lists the block of each element."""
    met = np.zeros(shape, dtype=np.int64)
    for number, (n, columns) in enumerate(zip(count[0, 0], indices[0, 0], strict=True)):
        np.add.at(met[number], columns[: int(n)].numpy(), 1)
    return met.repeat(flex._BLOCK, 0).repeat(flex._BLOCK, 1)


@given(trees(), rules, st.sampled_from([2, 4, 16]))
@settings(max_examples=150, deadline=None)
def test_blocks_cover_what_is_seen_and_nothing_else(
    tree: Tree, rule: AttentionRule, block: int
) -> None:
    with mock.patch.object(flex, "_BLOCK", block):
        blocks = FlexPlan(tree, rule, CPU).blocks
        n, m = blocks.kv_indices.shape[2:]
        partial = times_met(blocks.kv_num_blocks, blocks.kv_indices, (n, m))
        full = times_met(blocks.full_kv_num_blocks, blocks.full_kv_indices, (n, m))
        for_keys = times_met(blocks.q_num_blocks, blocks.q_indices, (m, n)).T
        full_for_keys = times_met(blocks.full_q_num_blocks, blocks.full_q_indices, (m, n)).T
    seen = visible(tree, rule)
    missing = [(0, -length % block) for length in seen.shape]
    seen = np.pad(seen, missing)  # elements of a block beyond the row's end are not visible
    assert seen.shape == (n * block, m * block)
    assert (partial + full)[seen].min() == 1
    assert (partial + full).max() == 1, "a block met twice"
    assert seen[full == 1].all()
    for_block = seen.reshape(n, block, m, block)
    met = (partial == 1).reshape(n, block, m, block)[:, 0, :, 0]
    assert (for_block.any((1, 3)) == (met | for_block.all((1, 3)))).all(), "met for nothing"
    assert not (met & for_block.all((1, 3))).any(), "seen in full, yet masked"
    assert (for_keys == partial).all()
    assert (full_for_keys == full).all()


@given(trees(), rules)
@settings(max_examples=60, deadline=None)
def test_rows_tell_what_is_seen(tree: Tree, rule: AttentionRule) -> None:
    rows = FlexPlan(tree, rule, CPU).rows
    q = torch.arange(len(rows.least_depth))[:, None]
    seen = (rows.seen_from <= q) & (q < rows.seen_until)
    seen &= rows.depth >= rows.least_depth[:, None]
    assert (seen.numpy() == visible(tree, rule)).all()


def test_a_plan_holds_nothing_of_the_size_of_queries_times_keys() -> None:
    tree = row_of(*range(20), k=8, vocab_size=9999, prompt_tokens=800, response_tokens=100)
    assert tree.n_rows == 20 * (800 + 8 * 99) == 31_840
    assert tree.row_ends.size == tree.row_depths.size == 31_840  # cached before memory is measured
    tracemalloc.start()
    plan = FlexPlan(tree, AttentionRule("window", 512), CPU)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    blocks = -(-31_840 // 128)
    # int32: 4 tables of all pairs of blocks and their counts, 3 numbers per key, 1 per query.
    expected = 4 * (4 * blocks * (blocks + 1) + 4 * 31_840)
    assert sum(tensor.nbytes for tensor in (*plan.rows, *plan.blocks)) == expected
    assert expected < 31_840**2 / 500
    assert peak < 31_840**2 / 50  # less than a bit per pair


# ---- attention ----


def inputs(
    tree: Tree,
    *,
    heads: tuple[int, int] = (4, 2),
    widths: tuple[int, int] = (16, 16),
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    n_queries = tree.n_rows - tree.prefix
    shapes = (
        (n_queries, heads[0], widths[0]),
        (tree.n_rows, heads[1], widths[0]),
        (tree.n_rows, heads[1], widths[1]),
    )
    # In the memory layout of projections: heads side by side in each row.
    made = [torch.randn(*shape, generator=dice).transpose(0, 1)[None] for shape in shapes]
    query, key, value = (tensor.requires_grad_() for tensor in made)
    return query, key, value


def flexed(tree: Tree, rule: AttentionRule, *given: Any) -> Tensor:
    query, key, value, scale, softcap, sinks = given
    plan = FlexPlan(tree, rule, CPU)
    return flex_tree_attention(query, key, value, plan, scale, softcap, sinks)


def dense(tree: Tree, rule: AttentionRule, *given: Any) -> Tensor:
    return _dense(PackedRow(tree, "dense"), rule, AttentionInputs(*given))


def assert_same(tree: Tree, rule: AttentionRule, *given: Any) -> None:
    """Assert equal results and gradients, within float32 rounding."""
    leaves = [tensor for tensor in given if isinstance(tensor, Tensor)]
    found, expected = flexed(tree, rule, *given), dense(tree, rule, *given)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    found_grads = torch.autograd.grad((found * weights).sum(), leaves)
    expected_grads = torch.autograd.grad((expected * weights).sum(), leaves)
    for mine, other in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-4)


@given(trees(), rules)
@settings(max_examples=25, deadline=None)
def test_any_tree_as_with_a_dense_mask(tree: Tree, rule: AttentionRule) -> None:
    with not_compiled():
        assert_same(tree, rule, *inputs(tree), 0.3, None, None)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize("prefix_segments", [0, 1], ids=["whole", "prefix"])
@pytest.mark.parametrize(
    ("softcap", "sinks", "heads", "widths"),
    [
        (1.5, False, (4, 2), (16, 16)),
        (None, True, (4, 4), (16, 16)),
        (1.5, True, (4, 1), (24, 16)),
        (None, False, (2, 1), (8, 8)),
        (None, True, (2, 2), (8, 4)),
    ],
    ids=["capped", "sinks", "both-unlike-widths", "narrow", "narrow-sinks"],
)
def test_what_families_ask_for(
    rule: AttentionRule,
    prefix_segments: int,
    softcap: float | None,
    sinks: bool,
    heads: tuple[int, int],
    widths: tuple[int, int],
) -> None:
    tree = row_of(1, 2, prompt_tokens=9, prefix_segments=prefix_segments)
    assert bool(tree.prefix) == bool(prefix_segments)
    sink_scores = torch.linspace(-1, 2, heads[0]).requires_grad_() if sinks else None
    with not_compiled():
        given = (*inputs(tree, heads=heads, widths=widths), 0.7, softcap, sink_scores)
        assert_same(tree, rule, *given)


def test_kernels_get_heads_of_at_least_16_numbers() -> None:
    tree = row_of(1)
    attend = mock.Mock(side_effect=flex._attend)
    with not_compiled(), mock.patch.object(flex, "_compiled", return_value=attend):
        out = flexed(tree, AttentionRule(), *inputs(tree, widths=(8, 4)), 0.25, None, None)
    assert [tensor.shape[-1] for tensor in attend.call_args.args[:3]] == [16, 16, 16]
    assert out.shape == (1, tree.n_rows, 4, 4)


def test_bfloat16_stays_within_its_rounding() -> None:
    tree = row_of(3, 4, prompt_tokens=12, response_tokens=9)
    exact = inputs(tree)
    rounded = [tensor.detach().bfloat16() for tensor in exact]
    with not_compiled():
        found = flexed(tree, AttentionRule(), *rounded, 0.25, None, torch.zeros(4))
    assert found.dtype == torch.bfloat16
    expected = dense(
        tree, AttentionRule(), *(t.float() for t in rounded), 0.25, None, torch.zeros(4)
    )
    # 8 bits of mantissa: relative steps of 2^-8, rounded once by the kernel and once by the sinks.
    torch.testing.assert_close(found.float(), expected, atol=4 * 2**-8, rtol=2 * 2**-8)


# ---- compiled ----


def test_rows_of_other_lengths_rules_and_prefixes_are_not_compiled_again(counter: Any) -> None:
    shapes = [(130, 40, 0), (300, 70, 0), (290, 50, 1), (150, 50, 1), (400, 64, 0), (20, 3, 0)]
    for number, (prompt, response, prefix_segments) in enumerate(shapes):
        tree = row_of(
            *range(1 + number % 3),
            k=4,
            vocab_size=9999,
            prompt_tokens=prompt,
            response_tokens=response,
            prefix_segments=prefix_segments,
        )
        for rule in (AttentionRule(), AttentionRule("window", 50), AttentionRule("chunk", 64)):
            assert_same(tree, rule, *inputs(tree, heads=(2, 1), seed=number), 0.25, None, None)
        # The compiler specialises on queries that all lie in one block.
        n_queries = tree.n_rows - tree.prefix
        assert (n_queries > 128) == (number < 5)
        assert counter.frame_count == (1 if n_queries > 128 else 2)


def test_recomputed_layers_without_gradient_and_under_autocast_give_the_same_bits(
    counter: Any,
) -> None:
    tree = row_of(5, 6, prompt_tokens=80, response_tokens=50, vocab_size=9999)
    plan = FlexPlan(tree, AttentionRule("window", 30), CPU)
    given = (*inputs(tree), torch.zeros(4, requires_grad=True))

    def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        return flex_tree_attention(query, key, value, plan, 0.25, None, sinks)

    out = attend(*given)
    grads = torch.autograd.grad(out.square().sum(), given)
    recomputed = checkpoint(attend, *given, use_reentrant=False)
    assert isinstance(recomputed, Tensor)
    again = torch.autograd.grad(recomputed.square().sum(), given)
    for mine, other in zip((out, *grads), (recomputed, *again), strict=True):
        assert torch.equal(mine, other)
    with torch.no_grad():
        assert torch.equal(attend(*given), out)
    as_given = [tensor.detach().bfloat16() for tensor in given]
    with torch.no_grad():
        plain = attend(*as_given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(attend(*as_given), plain)


def test_variants_are_compiled_beyond_what_the_compiler_grants(counter: Any) -> None:
    tree = row_of(1)
    plan = FlexPlan(tree, AttentionRule(), CPU)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        for width in (16, 17, 18):
            made = inputs(tree, heads=(1, 1), widths=(width, width))
            out = flex_tree_attention(*made, plan, 0.25, None, None)
            torch.testing.assert_close(out, dense(tree, AttentionRule(), *made, 0.25, None, None))
        assert counter.frame_count == 3
        assert torch._dynamo.config.recompile_limit == 1


def test_a_plan_of_another_row_is_refused(counter: Any) -> None:
    tree, other = row_of(1, prompt_tokens=9), row_of(1, prompt_tokens=8)
    plan = FlexPlan(other, AttentionRule(), CPU)
    with pytest.raises(RuntimeError):
        flex_tree_attention(*inputs(tree), plan, 0.25, None, None)


def test_a_model_with_windows_and_capped_scores_recomputing_its_layers(counter: Any) -> None:
    groups = [make_group(seed, prompt_tokens=10, response_tokens=6) for seed in (1, 2)]
    row = packed(groups, min_shared_tokens=1).input
    assert isinstance(row, PackedInput)
    model = tiny_model("gemma2")
    use_tree_attention(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    results = []
    for kernel in ("flex", "dense"):
        model.zero_grad()
        ids = torch.from_numpy(row.input_ids)
        with packed_forward():
            logits = model(
                input_ids=ids,
                position_ids=torch.from_numpy(row.position_ids),
                attention_mask=torch.ones_like(ids),
                packed_row=PackedRow(row.tree, kernel),  # type: ignore[arg-type]
                use_cache=False,
            ).logits
        torch.log_softmax(logits, -1)[..., 7].sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((logits.detach(), torch.cat([grad.flatten() for grad in grads])))
    assert counter.frame_count > 0
    (found, found_grad), (expected, expected_grad) = results
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found_grad - expected_grad).norm() < 1e-5 * expected_grad.norm()
