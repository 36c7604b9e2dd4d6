"""The attention mask of a packed row: pieces against its definition, and examples by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.oracle import group_of, grown_group
from torch import Tensor
from torch.nn import functional

from gvpo_offline.compute import pieces
from gvpo_offline.compute.layout import PackedInput, packed
from gvpo_offline.compute.pieces import PiecePlan, piecewise_attention
from gvpo_offline.compute.tree import (
    AttentionPiece,
    AttentionRule,
    Tree,
    attention_pieces,
    one_segment,
    visible,
)
from gvpo_offline.group import Group

BoolArray = NDArray[np.bool_]


@pytest.fixture(autouse=True, scope="module")
def _short_strips() -> Iterator[None]:
    """Cut triangles into strips of 3 rows, so that small triangles have several strips."""
    with mock.patch.object(pieces, "_STRIP", 3):
        yield


RULES = st.one_of(
    st.just(AttentionRule()),
    st.builds(AttentionRule, st.sampled_from(["window", "chunk"]), st.integers(1, 14)),
)


def tree_of(groups: Sequence[Group], **options: int | bool) -> Tree:
    given_row = packed(groups, **options).input  # type: ignore[arg-type]
    assert isinstance(given_row, PackedInput)
    return given_row.tree


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Trees of one to three groups, prompts repeated or shared, some with a prefix."""
    groups = draw(st.lists(grown_group(), min_size=1, max_size=3))
    if draw(st.integers(0, 4)) == 0:
        return tree_of(groups, share=False)
    tree = tree_of(groups, min_shared_tokens=draw(st.integers(1, 4)), prompt_apart=draw(_BOOLEAN))
    n_before = draw(st.integers(0, len(tree.starts) - 1))
    return replace(tree, prefix=int(tree.stops[n_before - 1])) if n_before else tree


_BOOLEAN = st.booleans()


def seen_in(plan: PiecePlan, piece: AttentionPiece) -> BoolArray:
    """(queries, keys) of a piece: the mask that the attention kernel is given."""
    shape = (piece.query_stop - piece.query_start, piece.key_stop - piece.key_start)
    causal, mask = plan.mask(piece)
    if mask is None:
        everything = np.ones(shape, dtype=bool)
        return np.tril(everything) if causal else everything
    assert not causal
    assert mask.shape == shape
    assert set(mask.flatten().tolist()) <= {0.0, float("-inf")}
    return (mask == 0).numpy()


def walked(tree: Tree, rule: AttentionRule) -> BoolArray:
    """The mask computed by walking from each row to its root, one token at a time."""
    above = [-1] * tree.n_rows
    for segment, parent in enumerate(tree.parents):
        start, stop = tree.starts[segment], tree.stops[segment]
        above[start:stop] = range(start - 1, stop - 1)
        above[start] = tree.stops[parent] - 1 if parent >= 0 else -1
    seen = np.zeros((tree.n_rows, tree.n_rows), dtype=bool)
    for row, depth in enumerate(tree.row_depths):
        key, key_depth = row, depth
        while key >= 0:
            same_chunk = rule.kind == "chunk" and key_depth // rule.size == depth // rule.size
            in_window = rule.kind == "window" and depth - key_depth < rule.size
            seen[row, key] = rule.kind == "full" or same_chunk or in_window
            key, key_depth = above[key], key_depth - 1
    return seen[tree.prefix :]


@settings(max_examples=150, deadline=None)
@given(tree=trees(), rule=RULES)
def test_visible_is_the_way_to_the_root(tree: Tree, rule: AttentionRule) -> None:
    assert (visible(tree, rule) == walked(tree, rule)).all()


@settings(max_examples=400, deadline=None)
@given(tree=trees(), rule=RULES)
def test_pieces_are_what_is_visible_each_pair_once(tree: Tree, rule: AttentionRule) -> None:
    plan = PiecePlan(tree, rule, torch.float32)
    expected = visible(tree, rule)
    times = np.zeros(expected.shape, dtype=int)
    own = np.zeros(len(expected), dtype=int)
    for piece in plan.pieces:
        seen = seen_in(plan, piece)
        assert seen.any(axis=1).all(), "a row that sees nothing has no softmax"
        queries = slice(piece.query_start, piece.query_stop)
        keys = slice(piece.key_start, piece.key_stop)
        times[queries, keys] += seen
        if piece.diagonal:
            own[queries] += 1
            rows = np.arange(piece.query_start, piece.query_stop)
            assert seen[rows - piece.query_start, rows + tree.prefix - piece.key_start].all()
    assert (times == expected).all()
    assert (own == 1).all()


@settings(max_examples=100, deadline=None)
@given(tree=trees(), rule=RULES)
def test_diagonal_pieces_come_first(tree: Tree, rule: AttentionRule) -> None:
    # A diagonal piece writes the first result of a query; the others are merged into it.
    for found in (attention_pieces(tree, rule), PiecePlan(tree, rule, torch.float32).pieces):
        diagonal = [piece.diagonal for piece in found]
        assert diagonal == sorted(diagonal, reverse=True)


@settings(max_examples=100, deadline=None)
@given(tree=trees())
def test_without_a_limit_nothing_is_computed_in_vain(tree: Tree) -> None:
    plan = PiecePlan(tree, AttentionRule(), torch.float32)
    assert all(plan.mask(piece)[1] is None for piece in plan.pieces)
    # At most one triangle and one rectangle per segment.
    assert len(attention_pieces(tree, AttentionRule())) <= 2 * len(tree.starts)


@settings(max_examples=100, deadline=None)
@given(tree=trees(), size=st.integers(1, 8), kind=st.sampled_from(["window", "chunk"]))
def test_masks_are_no_larger_than_a_limit_asks_for(tree: Tree, size: int, kind: str) -> None:
    rule = AttentionRule(kind, size)  # type: ignore[arg-type]
    plan = PiecePlan(tree, rule, torch.float32)
    if tree.is_full(rule):
        return
    for piece in plan.pieces:
        # At most `size` queries, each of which sees `size` keys: 2 * size - 1 distinct keys.
        assert piece.query_stop - piece.query_start <= size
        assert piece.key_stop - piece.key_start <= 2 * size - 1


def example() -> Tree:
    """Prompt 1 2 3; responses 4 5 6 7 and 4 5 8 9 9, which diverge after two tokens; and 9.

    Without their last tokens: 4 5 6; 4 5 8 9; empty. As a tree:

        row      0  1  2 | 3  4 | 5 | 6  7
        token    1  2  3 | 4  5 | 6 | 8  9
        depth    0  1  2 | 3  4 | 5 | 5  6
        segment  prompt  | both | left| right
    """
    group = group_of([1, 2, 3], [[4, 5, 6, 7], [4, 5, 8, 9, 9], [9]])
    return tree_of([group], min_shared_tokens=1)


def test_an_example_by_hand() -> None:
    tree = example()
    assert tree.starts.tolist() == [0, 3, 5, 6]
    assert tree.stops.tolist() == [3, 5, 6, 8]
    assert tree.ends.tolist() == [8, 8, 6, 8]
    assert tree.depths.tolist() == [0, 3, 5, 5]
    assert tree.parents.tolist() == [-1, 0, 1, 1]
    assert tree.max_depth == 6
    # The right branch does not see row 5, which is the left branch.
    assert [np.flatnonzero(row).tolist() for row in visible(tree, AttentionRule())][5:] == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 6],
        [0, 1, 2, 3, 4, 6, 7],
    ]
    # From depth 6 a window of 3 hides depths of 6 - 3 or less: rows 0 to 3.
    assert np.flatnonzero(visible(tree, AttentionRule("window", 3))[7]).tolist() == [4, 6, 7]
    # Chunks of 4 hold depths 0..3 and 4..7.
    assert np.flatnonzero(visible(tree, AttentionRule("chunk", 4))[7]).tolist() == [4, 6, 7]
    assert np.flatnonzero(visible(tree, AttentionRule("chunk", 4))[3]).tolist() == [0, 1, 2, 3]


def test_the_example_in_pieces() -> None:
    # Prompt, both and left are one causal triangle of 6 rows; right is one of 2 and sees 5 others.
    assert attention_pieces(example(), AttentionRule()) == [
        AttentionPiece(0, 6, 0, 6, 0, True),
        AttentionPiece(6, 8, 6, 8, 0, True),
        AttentionPiece(6, 8, 0, 5, None, False),
    ]
    # If the prompt is the prefix, its rows are keys only.
    assert attention_pieces(replace(example(), prefix=3), AttentionRule()) == [
        AttentionPiece(0, 3, 3, 6, 0, True),
        AttentionPiece(3, 5, 6, 8, 0, True),
        AttentionPiece(0, 5, 0, 3, None, False),
        AttentionPiece(3, 5, 3, 5, None, False),
    ]


@pytest.mark.parametrize(
    ("rule", "depth", "first", "last"),
    [
        (AttentionRule(), 7, 0, None),
        (AttentionRule("window", 3), 7, 5, 9),  # 7 sees 5 6 7; 9 sees 7 8 9
        (AttentionRule("window", 1), 7, 7, 7),
        (AttentionRule("chunk", 4), 7, 4, 7),  # 4..7
        (AttentionRule("chunk", 4), 8, 8, 11),
    ],
)
def test_rules(rule: AttentionRule, depth: int, first: int, last: int | None) -> None:
    assert rule.first_visible(depth) == first
    assert rule.last_seeing(depth) == last


@pytest.mark.parametrize("kind", ["window", "chunk"])
def test_a_limit_that_reaches_everything_is_none(kind: str) -> None:
    # Depths 0 to 6: a limit of 7 hides nothing, one of 6 does.
    assert example().is_full(AttentionRule(kind, 7))  # type: ignore[arg-type]
    assert not example().is_full(AttentionRule(kind, 6))  # type: ignore[arg-type]
    assert one_segment(7).is_full(AttentionRule(kind, 7))  # type: ignore[arg-type]


# ---- numbers ----


def reference(
    q: Tensor, k: Tensor, v: Tensor, seen: BoolArray, scale: float, sinks: Tensor | None
) -> Tensor:
    """(1, T, H, Dv) softmax attention by its definition."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~torch.from_numpy(seen), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return (torch.softmax(scores, -1)[..., : k.shape[2]] @ v).transpose(1, 2)


@settings(max_examples=60, deadline=None)
@given(
    tree=trees(),
    rule=RULES,
    key_heads=st.sampled_from([1, 2, 4]),
    width=st.sampled_from([4, 8]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_pieces_merge_to_the_whole_softmax(
    tree: Tree, rule: AttentionRule, key_heads: int, width: int, with_sinks: bool, seed: int
) -> None:
    # 4 heads of 8; values may be narrower than keys, as in latent attention.
    dice = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        # Standard deviation 2 gives scores of several nats, so that merge weights differ.
        return (2 * torch.randn(shape, generator=dice)).requires_grad_()

    n_keys = tree.n_rows
    n_queries = n_keys - tree.prefix
    q, k = random(1, 4, n_queries, 8), random(1, key_heads, n_keys, 8)
    v, sinks = random(1, key_heads, n_keys, width), random(4) if with_sinks else None
    weights = torch.randn(1, n_queries, 4, width, generator=dice)
    plan = PiecePlan(tree, rule, torch.float32)
    found = piecewise_attention(q, k, v, plan, 0.3, sinks)
    expected = reference(q, k, v, visible(tree, rule), 0.3, sinks)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    inputs = [q, k, v] if sinks is None else [q, k, v, sinks]
    grads = torch.autograd.grad((found * weights).sum(), inputs)
    truths = torch.autograd.grad((expected * weights).sum(), inputs)
    for grad, true in zip(grads, truths, strict=True):
        torch.testing.assert_close(grad, true, rtol=1e-4, atol=1e-4)


def test_bfloat16_loses_no_more_than_one_softmax_does() -> None:
    tree = tree_of([group_of(range(40), [range(50, 90), [50, *range(20)]])], min_shared_tokens=1)
    dice = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, tree.n_rows, 16, generator=dice) for _ in range(3))
    seen = torch.from_numpy(visible(tree, AttentionRule()))
    exact = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    once = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
    plan = PiecePlan(tree, AttentionRule(), torch.bfloat16)
    merged = piecewise_attention(q, k, v, plan, 0.25, None)
    assert merged.dtype is torch.bfloat16
    # Two more roundings (a piece's result, the merge) may each add the same error.
    assert (merged - exact).abs().max() <= 3 * (once - exact).abs().max()
