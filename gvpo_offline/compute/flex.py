"""Attention over a tree on a GPU: torch's flex attention, told block by block what is seen.

A block mask says for every 128 queries which blocks of 128 keys they see in full, in part, or not
at all. It follows from the tree's segments, cut where blocks end, so that neither here nor on the
device anything of size (queries, keys) is ever made; within a block seen in part the kernel asks
`_Rows`, three numbers a key and one a query.

One kernel takes whatever depth and breadth the tree has, windows, soft-capping and sinks. Flash
attention's calls for sequences of varying length would take two calls (own segment, prompt) and
their merge for a prompt with responses, one call more for every level of a deeper tree, and
`varlen_attn` drops the gradient of the log-sum-exp that the merge rests on. Flex attention's
kernels give that gradient, and their backward adds nothing atomically: same input, same bits.

Rows differ in length from step to step. Their dimensions are declared dynamic, and what a mask
refers to is handed over as tensors and made into a mask inside the compiled function, so that a
first step compiles once and later ones do not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from gvpo_offline.compute.tree import Int64Array, Rule, Tree

# What every configuration of the kernels, forward and backward, cuts into whole tiles.
_BLOCK = 128
# The narrowest head that the kernels' matrix products take.
_LEAST_WIDTH = 16
# Rows shorter than a block would go to a kernel made for decoding.
_KERNEL_OPTIONS: Any = {"BACKEND": "TRITON"}
# A model asks for several: with and without gradient, frozen keys, sinks, widths, short rows.
_MAX_COMPILED = 64


class _Rows(NamedTuple):
    """What tells whether query q sees key k, int32; queries count from the first after the prefix.

    seen_from[k] <= q < seen_until[k] and depth[k] >= least_depth[q].
    """

    seen_from: Tensor  # (P + T,)
    seen_until: Tensor  # (P + T,)
    depth: Tensor  # (P + T,)
    least_depth: Tensor  # (T,)


class _Blocks(NamedTuple):
    """Which blocks see which, in the terms of `BlockMask`: int32, with two dimensions of 1 before.

    For each of n blocks of queries, and for each of m blocks of keys, how many blocks of the other
    kind it is to meet, and their numbers first among (n, m) or (m, n).
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor


class FlexPlan:
    """A tree under a rule, as the kernels read it; the same for all layers with that rule.

    Attributes:
        rows, blocks: on the device.
    """

    def __init__(self, tree: Tree, rule: Rule, device: torch.device) -> None:
        partial, full = _met_blocks(tree, rule)
        tables = [*_ordered(partial), *_ordered(full), *_ordered(partial.T), *_ordered(full.T)]
        keys = np.arange(tree.n_rows)
        rows = [
            *(keys - tree.prefix, tree.row_ends - tree.prefix, tree.row_depths),
            _least_depths(tree, rule),
        ]
        self.rows = _Rows(*(_dynamic(_on(device, array), 0) for array in rows))
        self.blocks = _Blocks(
            *(_dynamic(_on(device, t)[None, None], *range(2, 2 + t.ndim)) for t in tables)
        )


def flex_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: FlexPlan,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of a packed row, compiled on its first use.

    On a CPU there is no backward.

    Args:
        query: (1, H, T, D), of any floating data type that the device multiplies.
        key, value: (1, Hkv, P + T, D) and (1, Hkv, P + T, Dv) in the same data type, H a multiple
            of Hkv; the first P are keys computed before.
        plan: what sees what.
        scale: factor of the scores.
        softcap: c of c tanh(score / c), or None.
        sinks: (H,) scores that take part in the softmax and have no value, or None.

    Returns:
        (1, T, H, Dv), in the queries' data type.
    """
    width = value.shape[-1]
    inputs = [_dynamic(_at_least_wide(tensor), 2) for tensor in (query, key, value)]
    with torch._dynamo.config.patch(recompile_limit=_MAX_COMPILED):
        out = _compiled()(*inputs, plan.rows, plan.blocks, scale, softcap, sinks)
    return out[..., :width].transpose(1, 2)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    # Without `fullgraph` the compiler could fall back on scores of (T, P + T), unasked.
    return torch.compile(_attend, fullgraph=True)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: _Rows,
    blocks: _Blocks,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """(1, H, T, Dv); what is compiled."""
    n_queries, n_keys = query.shape[2], key.shape[2]
    # Besides a plan made for another row this rules out that the kernel is told of a size twice.
    per_key = (value.shape[2], *(tensor.shape[0] for tensor in rows[:3]))
    torch._check(rows.least_depth.shape[0] == n_queries)  # type: ignore[no-untyped-call]
    for size in per_key:
        torch._check(size == n_keys)  # type: ignore[no-untyped-call]

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        below = (rows.seen_from[k] <= q) & (q < rows.seen_until[k])
        return below & (rows.depth[k] >= rows.least_depth[q])

    mask = BlockMask(
        seq_lengths=(n_queries, n_keys),
        BLOCK_SIZE=(_BLOCK, _BLOCK),
        mask_mod=sees,
        **blocks._asdict(),
    )
    out, aux = flex_attention(
        *(query, key, value),
        score_mod=_cap(softcap) if softcap else None,
        block_mask=mask,
        scale=scale,
        enable_gqa=True,
        kernel_options=_KERNEL_OPTIONS,
        return_aux=AuxRequest(lse=sinks is not None),
    )
    if sinks is None or aux.lse is None:
        return out
    # exp(lse) / (exp(lse) + exp(sink)) is the share of the softmax that the keys keep.
    share = torch.sigmoid(aux.lse - sinks.float().view(1, -1, 1))
    return (out * share.unsqueeze(-1)).to(out.dtype)


def _cap(limit: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.tanh(score / limit) * limit

    return capped


# ---- what sees what, block by block ----


def _met_blocks(tree: Tree, rule: Rule) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(n, m) bool: blocks of keys that a block of queries sees, but not in full, and in full.

    Worked out on runs, what a block holds of one segment: within two of these the last key is the
    deepest, and the first query sees furthest up. The kernels count on it that a block which the
    row leaves unfilled is met in part: the last one of queries, and of keys, as no block of queries
    but the last could see that in full.
    """
    least = _least_depths(tree, rule)
    ends, depths = tree.row_ends, tree.row_depths
    query, query_stop, query_blocks = _runs(tree, tree.prefix)
    key, key_stop, key_blocks = _runs(tree, 0)
    query, query_stop = query[:, None], query_stop[:, None]
    least_of_first, least_of_last = least[query - tree.prefix], least[query_stop - 1 - tree.prefix]
    some = (key < query_stop) & (query < ends[key])
    # Runs that overlap hold a row that sees itself.
    some &= (query < key_stop) | (depths[key_stop - 1] >= least_of_first)
    full = (key_stop <= query + 1) & (query_stop <= ends[key]) & (depths[key] >= least_of_last)
    some = np.logical_or.reduceat(np.logical_or.reduceat(some, query_blocks), key_blocks, axis=1)
    full = np.logical_and.reduceat(np.logical_and.reduceat(full, query_blocks), key_blocks, axis=1)
    if len(least) % _BLOCK:
        full[-1] = False
    return some & ~full, full


def _runs(tree: Tree, start: int) -> tuple[Int64Array, Int64Array, Int64Array]:
    """First rows of runs from `start` on, the rows after their last, and each block's first run."""
    blocks = np.arange(start, tree.n_rows, _BLOCK)
    first = np.union1d(blocks, tree.starts[tree.starts >= start])
    return first, np.append(first[1:], tree.n_rows), np.searchsorted(first, blocks)


def _least_depths(tree: Tree, rule: Rule) -> Int64Array:
    """(T,) the smallest depth that each query sees."""
    depths = tree.row_depths[tree.prefix :]
    if rule.kind == "window":
        return np.maximum(depths - rule.size + 1, 0)
    return depths // rule.size * rule.size if rule.kind == "chunk" else np.zeros_like(depths)


def _ordered(met: NDArray[np.bool_]) -> tuple[Int64Array, Int64Array]:
    """For each row of (n, m): how many are set, and their columns, ascending, before the others."""
    return met.sum(1), np.argsort(~met, axis=1, kind="stable")


# ---- tensors ----


def _on(device: torch.device, array: Int64Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)).to(device)


def _dynamic(tensor: Tensor, *dims: int) -> Tensor:
    """The tensor, with dimensions of which the compiler is not to note the size."""
    torch._dynamo.maybe_mark_dynamic(tensor, dims)
    return tensor


def _at_least_wide(tensor: Tensor) -> Tensor:
    missing = _LEAST_WIDTH - tensor.shape[-1]
    return functional.pad(tensor, (0, missing)) if missing > 0 else tensor
