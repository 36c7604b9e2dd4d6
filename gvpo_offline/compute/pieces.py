"""Attention over a tree on the CPU: one flash attention call per piece, merged exactly.

Each piece is a call of torch's CPU flash attention kernel. The output of a query that occurs in
several pieces is the sum of their outputs, each weighted by exp(lse_piece - lse), where lse is the
log-sum-exp over all keys of the query. The backward pass of a piece needs only the merged output
and lse. With s the scores of the piece,

    p = exp(s - lse),  dp = d_out v^T,  ds = p * (dp - sum(d_out * out))

are the piece's entries of the gradient of the whole softmax, so torch's backward kernel, called for
each piece with the merged output and lse, gives the exact gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gvpo_offline.compute.tree import AttentionPiece, AttentionRule, Tree, attention_pieces

_STRIP = 128  # tokens
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class PiecePlan:
    """The attention pieces of a tree and a rule, and the masks of those that need one."""

    def __init__(self, tree: Tree, rule: AttentionRule, dtype: torch.dtype) -> None:
        self.pieces = list(_in_strips(attention_pieces(tree, rule)))
        self._window = 0 if tree.is_full(rule) or rule.kind != "window" else rule.size
        self._dtype = dtype
        self._masks: dict[tuple[int, int, int], Tensor] = {}

    def mask(self, piece: AttentionPiece) -> tuple[bool, Tensor | None]:
        """The kernel's arguments for a piece: `is_causal`, and an additive mask or None."""
        if piece.shift is None:
            return False, None
        n_queries = piece.query_stop - piece.query_start
        n_keys = piece.key_stop - piece.key_start
        if piece.shift == 0 and not 0 < self._window < n_queries:
            return True, None
        key = (piece.shift, n_queries, n_keys)
        if key not in self._masks:
            back = piece.shift + torch.arange(n_queries)[:, None] - torch.arange(n_keys)
            seen = back >= 0
            if self._window:
                seen &= back < self._window
            hidden = torch.zeros(n_queries, n_keys, dtype=self._dtype)
            self._masks[key] = hidden.masked_fill_(~seen, float("-inf"))
        return False, self._masks[key]


def _in_strips(pieces: list[AttentionPiece]) -> Iterator[AttentionPiece]:
    """Cut large causal triangles into small triangles and the rectangles left of them.

    The kernel computes whole blocks of about a hundred keys, even if half of them are masked.
    """
    rectangles = []
    for piece in pieces:
        length = piece.query_stop - piece.query_start
        if not (piece.diagonal and piece.shift == 0) or length < 2 * _STRIP:
            yield piece
            continue
        for start in range(0, length, _STRIP):
            first, stop = piece.query_start + start, piece.query_start + min(start + _STRIP, length)
            key, key_stop = piece.key_start + start, piece.key_start + stop - piece.query_start
            yield AttentionPiece(first, stop, key, key_stop, 0, True)
            if start:
                rectangles.append(AttentionPiece(first, stop, piece.key_start, key, None, False))
    yield from rectangles


def piecewise_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: PiecePlan, scale: float, sinks: Tensor | None
) -> Tensor:
    """Attention of a packed row.

    Args:
        query: (1, H, T, D).
        key, value: (1, Hkv, P + T, D) and (1, Hkv, P + T, Dv), with Dv <= D and H a multiple of
            Hkv; the first P rows belong to the prefix, which was computed before.
        plan: the pieces.
        scale: factor of the scores.
        sinks: (H,) attention sinks: scores in the softmax without a value; or None.

    Returns:
        (1, T, H, Dv), in the queries' dtype.
    """
    width = value.shape[-1]
    if width < query.shape[-1]:
        value = functional.pad(value, (0, query.shape[-1] - width))
    attend: Any = _PiecewiseAttention.apply
    out: Tensor = attend(query, key, value, sinks, plan, scale)
    return out[..., :width]


class _PiecewiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        plan: PiecePlan,
        scale: float,
    ) -> Tensor:
        _, n_heads, length, width = query.shape
        q, k, v = _by_key_head(query, key, value)
        rows = query.new_empty(length, n_heads, width)
        out = _heads_of(rows, key.shape[1])
        # The kernel's lse is float32 for 16-bit types too.
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for piece in plan.pieces:
            queries, keys = _slices(piece)
            causal, mask = plan.mask(piece)
            part, part_lse = _forward(
                q[queries], k[keys], v[keys], 0.0, causal, attn_mask=mask, scale=scale
            )
            if piece.diagonal:
                out[queries], lse[queries[:3]] = part, part_lse
                continue
            before = lse[queries[:3]]
            merged = torch.logaddexp(before, part_lse)
            kept = (before - merged).exp_().unsqueeze(-1)
            added = (part_lse - merged).exp_().unsqueeze(-1)
            out[queries] = (out[queries] * kept).addcmul_(part, added.to(part.dtype))
            lse[queries[:3]] = merged
        if sinks is not None:
            merged = torch.logaddexp(lse, _sink_scores(sinks, lse))
            out.mul_((lse - merged).exp_().unsqueeze(-1))
            lse = merged
        ctx.save_for_backward(query, key, value, sinks, rows, lse)
        ctx.plan, ctx.scale = plan, scale
        return rows.unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, rows, lse = ctx.saved_tensors
        n_key_heads = key.shape[1]
        q, k, v = _by_key_head(query, key, value)
        out, grad_out = _heads_of(rows, n_key_heads), _heads_of(grads[0][0], n_key_heads)
        grad_rows = torch.empty_like(rows)
        grad_q = _heads_of(grad_rows, n_key_heads)
        grad_k = key.new_zeros(key.shape[1:])
        grad_v = value.new_zeros(value.shape[1:])
        for piece in ctx.plan.pieces:
            queries, keys = _slices(piece)
            causal, mask = ctx.plan.mask(piece)
            part_q, part_k, part_v = _backward(
                *(grad_out[queries], q[queries], k[keys], v[keys], out[queries]),
                *(lse[queries[:3]], 0.0, causal),
                attn_mask=mask,
                scale=ctx.scale,
            )
            if piece.diagonal:
                grad_q[queries] = part_q
            else:
                grad_q[queries] += part_q
            key_rows = keys[2]
            grad_k[:, key_rows] += part_k.sum(1)
            grad_v[:, key_rows] += part_v.sum(1)
        grad_sinks = None
        if sinks is not None:
            share = (_sink_scores(sinks, lse) - lse).exp_()
            delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
            grad_sinks = -(share * delta).sum(-1).flatten().to(sinks.dtype)
        grad_query = grad_rows.transpose(0, 1).unsqueeze(0)
        return grad_query, grad_k.unsqueeze(0), grad_v.unsqueeze(0), grad_sinks, None, None


def _by_key_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Hkv, H / Hkv, rows, D) views, grouped by key head; keys are expanded without a copy."""
    n_key_heads = key.shape[1]
    q = query.view(n_key_heads, -1, *query.shape[2:])
    k = key[0].unsqueeze(1).expand(-1, q.shape[1], -1, -1)
    v = value[0].unsqueeze(1).expand(-1, q.shape[1], -1, -1)
    return q, k, v


def _heads_of(rows: Tensor, n_key_heads: int) -> Tensor:
    """(T, H, D) as a (Hkv, H / Hkv, T, D) view."""
    length, n_heads, width = rows.shape
    by_head = rows.view(length, n_key_heads, n_heads // n_key_heads, width)
    return by_head.permute(1, 2, 0, 3)


def _slices(piece: AttentionPiece) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    everything = slice(None)
    queries = (everything, everything, slice(piece.query_start, piece.query_stop))
    keys = (everything, everything, slice(piece.key_start, piece.key_stop))
    return queries, keys


def _sink_scores(sinks: Tensor, lse: Tensor) -> Tensor:
    return sinks.to(lse.dtype).view(*lse.shape[:2], 1).expand_as(lse)
