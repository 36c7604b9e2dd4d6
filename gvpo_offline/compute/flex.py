"""Attention over a tree on a GPU, with torch's flex attention and a block mask.

The block mask gives for each block of 128 queries the blocks of 128 keys that are visible to it in
full, in part, or not at all. It is computed from the tree's segments, cut at block boundaries, so
that no tensor of shape (queries, keys) is allocated on the host or the device. Within a partly
visible block the kernel evaluates `_RowVisibility`: three numbers per key and one per query.

One kernel handles trees of any depth and width, windows, soft-capping and sinks. With flash
attention's variable-length functions, a prompt with responses would need two calls (own segment,
prompt) and a merge of their results, and a deeper tree one more call per level; and `varlen_attn`
has no gradient of the log-sum-exp, which the merge needs. Flex attention has this gradient, and its
backward pass uses no atomic additions, so it is deterministic.

Rows differ in length from step to step. Their dimensions are marked dynamic, and the data of the
mask is passed as tensors and made into a mask inside the compiled function, so that only the first
step compiles.
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

from gvpo_offline.compute.devices import to_device
from gvpo_offline.compute.tree import AttentionRule, Int64Array, Tree

# A multiple of the tile sizes of every forward and backward kernel configuration.
_BLOCK = 128
# The smallest head dimension that the kernels' matrix products support.
_LEAST_WIDTH = 16
# Without this, rows shorter than a block would use the decoding kernel.
_KERNEL_OPTIONS: Any = {"BACKEND": "TRITON"}
# One model needs several variants: with and without gradient, frozen keys, sinks, head dimensions,
# short rows.
_MAX_COMPILED = 64


class _RowVisibility(NamedTuple):
    """Decides whether query q sees key k; int32 tensors. Query 0 is the first row after the prefix.

    q sees k if seen_from[k] <= q < seen_until[k] and depth[k] >= least_depth[q].
    """

    seen_from: Tensor  # (P + T,)
    seen_until: Tensor  # (P + T,)
    depth: Tensor  # (P + T,)
    least_depth: Tensor  # (T,)


class _BlockTables(NamedTuple):
    """Visibility between blocks, as the int32 arguments of `BlockMask`, with two leading 1s.

    For each of n query blocks: the number of visible key blocks, (1, 1, n), and their indices,
    first in each row of (1, 1, n, m). For each of m key blocks the same with query blocks.
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
    """Mask tensors for a tree and a rule; shared by all layers with that rule.

    Attributes:
        rows: visibility of single rows, on the device.
        blocks: visibility of blocks, on the device.
    """

    def __init__(self, tree: Tree, rule: AttentionRule, device: torch.device) -> None:
        partial, full = _visible_blocks(tree, rule)
        tables = [*_ordered(partial), *_ordered(full), *_ordered(partial.T), *_ordered(full.T)]
        keys = np.arange(tree.n_rows)
        rows = [
            *(keys - tree.prefix, tree.row_ends - tree.prefix, tree.row_depths),
            _least_depths(tree, rule),
        ]
        self.rows = _RowVisibility(*(_dynamic(_on(device, array), 0) for array in rows))
        self.blocks = _BlockTables(
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
    """Attention of a packed row, compiled on first use. There is no backward pass on CPUs.

    Args:
        query: (1, H, T, D), in a floating-point data type that the device supports.
        key, value: (1, Hkv, P + T, D) and (1, Hkv, P + T, Dv) in the same data type, H a multiple
            of Hkv; the first P rows belong to the prefix, which was computed before.
        plan: the mask.
        scale: factor of the scores.
        softcap: c of c tanh(score / c), or None.
        sinks: (H,) attention sinks: scores in the softmax without a value; or None.

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
    # Without `fullgraph` the compiler could silently fall back to scores of (T, P + T).
    return torch.compile(_attend, fullgraph=True)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: _RowVisibility,
    blocks: _BlockTables,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The function to compile; returns (1, H, T, Dv)."""
    n_queries, n_keys = query.shape[2], key.shape[2]
    # Rejects the plan of another row, and tells the compiler which dimensions are equal.
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
    # The keys' share of the softmax is exp(lse) / (exp(lse) + exp(sink)).
    share = torch.sigmoid(aux.lse - sinks.float().view(1, -1, 1))
    return (out * share.unsqueeze(-1)).to(out.dtype)


def _cap(limit: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.tanh(score / limit) * limit

    return capped


# ---- visibility between blocks ----


def _visible_blocks(tree: Tree, rule: AttentionRule) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(n, m) bool twice: key blocks that a query block sees in part, and those it sees in full.

    Computed from runs; a run is the part of a block that lies in one segment. Within a run of keys
    the last is the deepest; within a run of queries the first has the smallest least visible depth.
    The kernels require that a block that the row does not fill is visible in part only. That is
    the last query block, and the last key block, which only the last query block could see in full.
    """
    least = _least_depths(tree, rule)
    ends, depths = tree.row_ends, tree.row_depths
    query, query_stop, query_blocks = _runs(tree, tree.prefix)
    key, key_stop, key_blocks = _runs(tree, 0)
    query, query_stop = query[:, None], query_stop[:, None]
    least_of_first, least_of_last = least[query - tree.prefix], least[query_stop - 1 - tree.prefix]
    some = (key < query_stop) & (query < ends[key])
    # Two runs that overlap share a row, which sees itself.
    some &= (query < key_stop) | (depths[key_stop - 1] >= least_of_first)
    full = (key_stop <= query + 1) & (query_stop <= ends[key]) & (depths[key] >= least_of_last)
    some = np.logical_or.reduceat(np.logical_or.reduceat(some, query_blocks), key_blocks, axis=1)
    full = np.logical_and.reduceat(np.logical_and.reduceat(full, query_blocks), key_blocks, axis=1)
    if len(least) % _BLOCK:
        full[-1] = False
    return some & ~full, full


def _runs(tree: Tree, start: int) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Of the runs from row `start` on: first rows, stop rows, and the first run of each block."""
    blocks = np.arange(start, tree.n_rows, _BLOCK)
    first = np.union1d(blocks, tree.starts[tree.starts >= start])
    return first, np.append(first[1:], tree.n_rows), np.searchsorted(first, blocks)


def _least_depths(tree: Tree, rule: AttentionRule) -> Int64Array:
    """(T,) the smallest depth visible to each query."""
    depths = tree.row_depths[tree.prefix :]
    if rule.kind == "window":
        return np.maximum(depths - rule.size + 1, 0)
    return depths // rule.size * rule.size if rule.kind == "chunk" else np.zeros_like(depths)


def _ordered(met: NDArray[np.bool_]) -> tuple[Int64Array, Int64Array]:
    """For each row of (n, m): the number of true columns; the columns, true ones first, sorted."""
    return met.sum(1), np.argsort(~met, axis=1, kind="stable")


# ---- tensors ----


def _on(device: torch.device, array: Int64Array) -> Tensor:
    return to_device(np.ascontiguousarray(array, dtype=np.int32), device)


def _dynamic(tensor: Tensor, *dims: int) -> Tensor:
    """The tensor, with some dimensions marked as dynamic for the compiler."""
    torch._dynamo.maybe_mark_dynamic(tensor, dims)
    return tensor


def _at_least_wide(tensor: Tensor) -> Tensor:
    missing = _LEAST_WIDTH - tensor.shape[-1]
    return functional.pad(tensor, (0, missing)) if missing > 0 else tensor
