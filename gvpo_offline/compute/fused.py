"""Log-softmax of chosen tokens, straight from the factors of the logits.

With z = scale * sum_i x_i W_i^T and logits y = z, or c * tanh(z / c) where they are soft-capped,
the log-prob of token t at row r is y[r, t] - log sum_v exp y[r, v], and

    d log-prob / d z[r, v] = s[r, v] (1[v = t] - p[r, v]),    s = 1, or 1 - tanh(z / c)^2,

with p = softmax(y). The first term touches one row of each W_i. The second is the same row of s p
for all pairs of a row, times what their gradients sum to, so that the backward pass needs nothing
of the size of the logits but the exponentials of the forward pass: their normaliser is a number
per row, which moves into the narrow factor of each matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bytes of a chunk's logits: enough rows for matrix products at full speed, small beside a model.
CPU_CHUNK_BYTES = 256 << 20
ACCELERATOR_CHUNK_BYTES = 1 << 30
_ROW_MULTIPLE = 64


class Part(NamedTuple):
    """One product of the sum that makes logits: input_HK @ weight_VK.T."""

    input_HK: Tensor
    weight_VK: Tensor


@dataclass(frozen=True)
class PairLogprobs:
    """Log-probs of pairs of a row and a token, N pairs of H rows.

    Attributes:
        logprobs_N: nats; float32, or float64 where matrix products are.
        entropy_H: entropy of every row's distribution, nats, same dtype, without gradient; None
            unless asked for.
    """

    logprobs_N: Tensor
    entropy_H: Tensor | None


@dataclass(frozen=True)
class _Plan:
    scale: float
    soft_cap: float | None
    matmul_dtype: torch.dtype
    kept_bytes: int
    entropy: bool
    grad: bool
    chunks: tuple[tuple[slice, slice], ...]  # rows, and the pairs that lie in them

    @property
    def dtype(self) -> torch.dtype:
        """Of logits and of whatever is summed."""
        return torch.promote_types(self.matmul_dtype, torch.float32)

    def kept_rows(self, n_rows: int, vocab_size: int) -> int:
        """Rows whose exponentials fit into `kept_bytes`: all, or some whole chunks of them."""
        fit = self.kept_bytes // (vocab_size * self.matmul_dtype.itemsize)
        if fit >= n_rows:
            return n_rows
        return max((rows.stop for rows, _ in self.chunks if rows.stop <= fit), default=0)


def fused_pair_logprobs(
    parts: Sequence[Part],
    pair_row_N: Tensor,
    pair_token_N: Tensor,
    *,
    scale: float = 1.0,
    soft_cap: float | None = None,
    matmul_dtype: torch.dtype,
    kept_bytes: int,
    entropy: bool = False,
) -> PairLogprobs:
    """Log-probs of (row, token) pairs, never holding the logits of more than a chunk of rows.

    Where a weight needs a gradient, the exponentials of the leading rows are kept for the backward
    pass, as many as fit into `kept_bytes`, and the other rows' recomputed. Where only inputs do,
    the weights' expectation under each row's distribution is taken in the forward pass, and the
    backward pass has nothing left of the size of the logits. Without gradients nothing is kept.

    Args:
        parts: inputs (H, K_i) and weights (V, K_i), floating point; gradients have their dtypes.
        pair_row_N: (N,) int64 in [0, H), in any order, repetitions allowed.
        pair_token_N: (N,) int64 in [0, V).
        scale: positive factor of the sum of products.
        soft_cap: c of c · tanh(z / c), or None.
        matmul_dtype: what factors are cast to; sums are float32 (float64 for float64).
        kept_bytes: how much to keep of what has the size of the logits.
        entropy: whether to return entropies.

    Raises:
        IndexError: a row or a token out of range.
    """
    if not (len(pair_row_N) or entropy):  # rows that predict nothing cost nothing
        parts = [Part(x_HK[:0], weight_VK) for x_HK, weight_VK in parts]
    n_rows, vocab_size = len(parts[0].input_HK), len(parts[0].weight_VK)
    # Indexing would take the -100 of a masked label for a token counted from the end.
    if len(pair_token_N):
        lowest, highest = torch.stack(torch.aminmax(pair_token_N)).tolist()
        if lowest < 0 or highest >= vocab_size:
            raise IndexError(f"a pair's token is not in [0, {vocab_size})")
    row_N, order_N = torch.sort(pair_row_N, stable=True)
    plan = _Plan(
        scale=scale,
        soft_cap=soft_cap,
        matmul_dtype=matmul_dtype,
        kept_bytes=kept_bytes,
        entropy=entropy,
        grad=torch.is_grad_enabled(),
        chunks=tuple(_chunks(row_N, n_rows, _chunk_rows(n_rows, vocab_size, row_N.device))),
    )
    tensors = [tensor for part in parts for tensor in part]
    # The dtypes are settled: autocast would cast whole weights again for every chunk.
    with torch.autocast(row_N.device.type, enabled=False):
        sorted_N, entropy_H = _PairLogprobs.apply(  # type: ignore[no-untyped-call]
            plan, row_N, pair_token_N[order_N], *tensors
        )
    return PairLogprobs(sorted_N[torch.argsort(order_N)], entropy_H if entropy else None)


def _chunk_rows(n_rows: int, vocab_size: int, device: torch.device) -> int:
    """Rows of a chunk, so that chunks are about equal."""
    chunk_bytes = CPU_CHUNK_BYTES if device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    most = max(chunk_bytes // (4 * vocab_size * _ROW_MULTIPLE), 1) * _ROW_MULTIPLE
    n_chunks = max(math.ceil(n_rows / most), 1)
    return max(math.ceil(n_rows / (n_chunks * _ROW_MULTIPLE)), 1) * _ROW_MULTIPLE


def _chunks(row_N: Tensor, n_rows: int, chunk_rows: int) -> Iterator[tuple[slice, slice]]:
    """Rows cut into chunks (one, empty, where there are none), each with its run of pairs."""
    starts = [*range(0, max(n_rows, 1), chunk_rows), n_rows]
    pairs = torch.searchsorted(row_N, torch.tensor(starts, device=row_N.device)).tolist()
    if pairs[0] != 0 or pairs[-1] != len(row_N):
        raise IndexError(f"a pair's row is not in [0, {n_rows})")
    for i in range(len(starts) - 1):
        yield slice(starts[i], starts[i + 1]), slice(pairs[i], pairs[i + 1])


class _Chunk(NamedTuple):
    """What a chunk of R rows and their P pairs leaves behind; nats."""

    logprob_P: Tensor
    slope_P: Tensor  # of the pair's logit, by the sum of products
    sum_R1: Tensor  # of the row's exponentials, as they are kept
    log_sum_R1: Tensor  # of the exponentials of the logits themselves
    entropy_R: Tensor


class _PairLogprobs(torch.autograd.Function):
    """(plan, row_N ascending, token_N, input_1, weight_1, input_2, …) -> logprob_N, entropy_H."""

    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, row_N: Tensor, token_N: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs, weights = _factors(tensors, plan)
        need = [plan.grad and needed for needed in ctx.needs_input_grad[3:]]
        exps_needed, n_rows, vocab_size = any(need[1::2]), len(inputs[0]), len(weights[0])
        n_kept = plan.kept_rows(n_rows, vocab_size) if exps_needed else 0
        kept = inputs[0].new_empty((n_kept, vocab_size))
        in_place = kept.dtype == plan.dtype
        space = _space(plan, kept, n_kept if in_place else 0)
        chunks: list[_Chunk] = []
        means: list[list[Tensor]] = [[] for _ in weights]
        for rows, pairs in plan.chunks:
            keep = rows.stop <= n_kept
            logits = kept[rows] if keep and in_place else space[: rows.stop - rows.start]
            _write_logits_(logits, [x[rows] for x in inputs], weights)
            chunk, exps = _normalise_(logits, row_N[pairs] - rows.start, token_N[pairs], plan)
            chunks.append(chunk)
            if keep and not in_place:
                kept[rows].copy_(exps)
            for i, weight in enumerate(weights):
                if need[2 * i] and not exps_needed:
                    mean = _matmul(exps.to(weight.dtype), weight, plan.dtype)
                    means[i].append(mean.div_(chunk.sum_R1))
        logprob_N, *statistics, entropy_H = map(torch.cat, zip(*chunks, strict=True))
        ctx.plan, ctx.need = plan, need
        means_HK = [torch.cat(pieces) if pieces else None for pieces in means]
        ctx.save_for_backward(*tensors, *means_HK, row_N, token_N, *statistics, kept)
        ctx.mark_non_differentiable(entropy_H)
        return logprob_N, entropy_H

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        need: list[bool] = ctx.need
        saved = ctx.saved_tensors  # asked once: gradient checkpointing wants it so
        tensors, means_HK = saved[: len(need)], saved[len(need) : len(need) * 3 // 2]
        row_N, token_N, slope_N, *normalisers, kept = saved[len(need) * 3 // 2 :]
        inputs, weights = _factors(tensors, plan)
        row_grad_H1 = torch.zeros_like(normalisers[0])
        _add_rows_(row_grad_H1, row_N, grad_N[:, None])
        row_grad_H1 *= -plan.scale
        grads: list[Tensor | None] = [None] * len(need)
        if any(need[1::2]):
            blocks = _sloped_softmax(plan, inputs, weights, kept, *normalisers)
            _row_terms(grads, need, inputs, weights, row_grad_H1, blocks)
        else:
            grads[0::2] = [None if mean is None else row_grad_H1 * mean for mean in means_HK]
        own_grad_N1 = (grad_N * slope_N)[:, None]
        for _rows, pairs in plan.chunks:
            _add_own_terms_(
                grads, inputs, weights, row_N[pairs], token_N[pairs], own_grad_N1[pairs]
            )
        cast = [
            None if grad is None else grad.to(tensor.dtype)
            for grad, tensor in zip(grads, tensors, strict=True)
        ]
        return (None, None, None, *cast)


def _factors(tensors: Sequence[Tensor], plan: _Plan) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and weights in the dtype of matrix products."""
    cast = [tensor.to(plan.matmul_dtype) for tensor in tensors]
    return cast[0::2], cast[1::2]


def _space(plan: _Plan, kept: Tensor, n_covered: int) -> Tensor:
    """Room for the logits of any chunk that does not start within the first `n_covered` rows."""
    rows = max((r.stop - r.start for r, _ in plan.chunks if r.start >= n_covered), default=0)
    return kept.new_empty((rows, kept.shape[1]), dtype=plan.dtype)


def _write_logits_(out: Tensor, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Σ_i x_i W_iᵀ into `out`, (R, V)."""
    first, *others = zip(inputs, weights, strict=True)
    x, weight = first
    if x.dtype == out.dtype:
        torch.mm(x, weight.t(), out=out)
    elif x.is_cuda:
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(x, weight.t()))
    for x, weight in others:
        _add_product_(out, x, weight.t())


def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, on a GPU without rounding to the dtype of the factors in between."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else torch.mm(a, b).to(dtype)


def _add_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out)
    else:
        out.add_(_matmul(a, b, out.dtype))


def _add_rows_(out: Tensor, index: Tensor, values: Tensor) -> None:
    """out[index[n]] += values[n], repetitions included, in the same order every time."""
    # On a GPU index_add_ uses atomics; this sorts. On the CPU it is the other way round.
    if out.is_cuda:
        out.index_put_((index,), values, accumulate=True)
    else:
        out.index_add_(0, index, values)


def _squash_(sums: Tensor, plan: _Plan) -> float:
    """Turn sums of products in place into logits but for a factor, which is returned."""
    if plan.soft_cap is None:
        return plan.scale
    sums.mul_(plan.scale / plan.soft_cap).tanh_()
    return plan.soft_cap


def _exponentials_(
    squashed: Tensor, factor: float, shift_R1: Tensor, plan: _Plan
) -> tuple[Tensor, Tensor]:
    """exp(logits - shift), and the same times the slope of the logits; uses up `squashed`.

    The second is in the memory of `squashed`; without a soft-cap so is the first.
    """
    if plan.soft_cap is None:
        exps = torch.add(-shift_R1, squashed, alpha=factor, out=squashed).exp_()
        return exps, exps
    exps = torch.add(-shift_R1, squashed, alpha=factor).exp_()
    # exps * (1 - tanh²) in one pass.
    torch.ops.aten.tanh_backward.grad_input(exps, squashed, grad_input=squashed)
    return exps, squashed


def _normalise_(
    logits: Tensor, row_P: Tensor, token_P: Tensor, plan: _Plan
) -> tuple[_Chunk, Tensor]:
    """Statistics of a chunk, and its exponentials times slopes, in the memory of `logits`."""
    factor = _squash_(logits, plan)
    chosen_P = logits[row_P, token_P]
    top_R1 = factor * logits.amax(dim=-1, keepdim=True)
    exps, sloped = _exponentials_(logits, factor, top_R1, plan)
    sum_R1 = exps.sum(dim=-1, keepdim=True)
    log_sum_R1 = top_R1 + sum_R1.log()
    if plan.entropy:
        surprise_R1 = torch.special.entr(exps).sum(dim=-1, keepdim=True)
        entropy_R = (sum_R1.log() + surprise_R1 / sum_R1)[:, 0]
    else:
        entropy_R = sum_R1[:0, 0]
    slope = 1.0 if plan.soft_cap is None else 1.0 - chosen_P.square()
    slope_P = torch.full_like(chosen_P, plan.scale) * slope
    logprob_P = factor * chosen_P - log_sum_R1[row_P, 0]
    return _Chunk(logprob_P, slope_P, sum_R1, log_sum_R1, entropy_R), sloped


def _sloped_softmax(
    plan: _Plan,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Tensor,
    sum_H1: Tensor,
    log_sum_H1: Tensor,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows with a matrix and a factor per row whose product is slope · softmax."""
    n_kept = len(kept)
    if n_kept:
        yield slice(0, n_kept), kept, sum_H1[:n_kept].reciprocal()
    space = _space(plan, kept, n_kept)
    for rows, _ in plan.chunks:
        if rows.start >= n_kept:
            logits = space[: rows.stop - rows.start]
            _write_logits_(logits, [x[rows] for x in inputs], weights)
            factor = _squash_(logits, plan)
            _, sloped = _exponentials_(logits, factor, log_sum_H1[rows], plan)
            yield rows, sloped.to(plan.matmul_dtype), torch.ones_like(sum_H1[rows])


def _row_terms(
    grads: list[Tensor | None],
    need: Sequence[bool],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    grad_H1: Tensor,
    blocks: Iterable[tuple[slice, Tensor, Tensor]],
) -> None:
    """Write to `grads` what comes from the normalisers; `blocks` cover every row."""
    for rows, exps, factor_R1 in blocks:
        grad_R1 = grad_H1[rows] * factor_R1
        for i, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
            grad_input, grad_weight = grads[2 * i : 2 * i + 2]
            if need[2 * i]:
                if grad_input is None:
                    grads[2 * i] = grad_input = torch.empty_like(x, dtype=grad_H1.dtype)
                torch.mul(_matmul(exps, weight, grad_H1.dtype), grad_R1, out=grad_input[rows])
            if need[2 * i + 1]:
                scaled = (grad_R1 * x[rows]).to(x.dtype)
                if grad_weight is None:
                    grads[2 * i + 1] = _matmul(exps.t(), scaled, grad_H1.dtype)
                else:
                    _add_product_(grad_weight, exps.t(), scaled)


def _add_own_terms_(
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    row_P: Tensor,
    token_P: Tensor,
    grad_P1: Tensor,
) -> None:
    """Add what comes from the pairs' own logits."""
    for i, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
        grad_input, grad_weight = grads[2 * i], grads[2 * i + 1]
        if grad_input is not None:
            _add_rows_(grad_input, row_P, grad_P1 * weight[token_P])
        if grad_weight is not None:
            _add_rows_(grad_weight, token_P, grad_P1 * x[row_P])
