"""Log-softmax of chosen tokens, computed from hidden states and weights without full logits.

With z = scale * sum_i x_i W_i^T and logits y = z, or c * tanh(z / c) where they are soft-capped,
the log-prob of token t at row r is y[r, t] - log sum_v exp y[r, v], and

    d log-prob / d z[r, v] = s[r, v] (1[v = t] - p[r, v]),    s = 1, or 1 - tanh(z / c)^2,

with p = softmax(y). The first term involves one row of each W_i. The second is s p of the row, the
same for all pairs of the row, times the sum of their gradients. So the only tensor of the size of
the logits that the backward pass needs is the exponentials of the forward pass: their normaliser is
one number per row, which is multiplied into the small factor of each matrix product.

The vocabulary is processed in blocks. Each block has its own maximum in every row, and the sums of
the blocks are merged at the end. Each row of a weight's gradient is written once, by its block, and
the kept exponentials of a block are released as soon as its part of the gradient is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gvpo_offline.compute.devices import to_device, without_autocast
from gvpo_offline.compute.vocabulary import (
    KeptBlock,
    LogitsBuffer,
    LogprobPlan,
    SoftmaxSums,
    VocabularyBlock,
    cut_blocks,
    matmul,
    softmax_blocks,
    squash_,
    summed_,
    write_logits_,
)


class LogitTerm(NamedTuple):
    """One term of the sum that gives the logits: input_HK @ weight_VK.T."""

    input_HK: Tensor
    weight_VK: Tensor


@dataclass(frozen=True)
class PairLogprobs:
    """Log-probs of N (row, token) pairs, for H rows.

    Attributes:
        logprobs_N: nats; float32, or float64 if matrix products are float64.
        entropy_H: entropy of every row's distribution, nats, same dtype, without gradient; None
            unless requested.
    """

    logprobs_N: Tensor
    entropy_H: Tensor | None


def fused_pair_logprobs(
    parts: Sequence[LogitTerm],
    pair_row_N: Tensor,
    pair_token_N: Tensor,
    *,
    scale: float = 1.0,
    soft_cap: float | None = None,
    matmul_dtype: torch.dtype,
    kept_bytes: int,
    entropy: bool = False,
) -> PairLogprobs:
    """Log-probs of (row, token) pairs, with the logits of at most one block in memory.

    If a weight needs a gradient, the exponentials of the first blocks, as many as fit into
    `kept_bytes`, are kept for the backward pass, and the others are recomputed. If only inputs need
    gradients, the expectation of the weights under each row's distribution is computed in the
    forward pass, and the backward pass needs no tensor of the size of the logits. Without gradients
    nothing is kept.

    Args:
        parts: inputs (H, K_i) and weights (V, K_i), floating point; gradients have their dtypes.
        pair_row_N: (N,) int64 in [0, H), in any order; a row may occur several times. Pairs are
            checked and sorted where they are: on the CPU this does not wait for a GPU.
        pair_token_N: (N,) int64 in [0, V), on the device of the rows.
        scale: positive factor of the sum of terms.
        soft_cap: c of c · tanh(z / c), or None.
        matmul_dtype: dtype of matrix products; sums are float32 (float64 for float64).
        kept_bytes: most bytes of tensors of the size of the logits to keep.
        entropy: whether to return entropies.

    Raises:
        IndexError: a row or a token is out of range.
    """
    n_rows, vocab_size = len(parts[0].input_HK), len(parts[0].weight_VK)
    device = parts[0].input_HK.device
    _check_range(pair_row_N, n_rows, "row")
    # Indexing would accept the -100 of a masked label as an index from the end.
    _check_range(pair_token_N, vocab_size, "token")
    if not (len(pair_row_N) or entropy):  # no pairs, so no row is needed
        parts = [LogitTerm(x_HK[:0], weight_VK) for x_HK, weight_VK in parts]
        n_rows = 0
    token_N, order_N = torch.sort(pair_token_N, stable=True)
    plan = LogprobPlan(
        scale=scale,
        soft_cap=soft_cap,
        matmul_dtype=matmul_dtype,
        kept_bytes=kept_bytes,
        entropy=entropy,
        grad=torch.is_grad_enabled(),
        blocks=tuple(cut_blocks(token_N, n_rows, vocab_size, device)),
    )
    tensors = [tensor for part in parts for tensor in part]
    # Autocast is off because it would cast whole weights again for every block.
    with without_autocast(device):
        sorted_N, entropy_H = _PairLogprobs.apply(  # type: ignore[no-untyped-call]
            plan, to_device(pair_row_N[order_N], device), to_device(token_N, device), *tensors
        )
    back_N = to_device(inverse(order_N), device)
    return PairLogprobs(sorted_N[back_N], entropy_H if entropy else None)


def inverse(order_N: Tensor) -> Tensor:
    """The inverse of a permutation, (N,) int64; a sort of it would take as long as the first."""
    places_N = torch.arange(len(order_N), device=order_N.device)
    return torch.empty_like(order_N).scatter_(0, order_N, places_N)


def _check_range(index_N: Tensor, size: int, name: str) -> None:
    if len(index_N):
        lowest, highest = torch.stack(torch.aminmax(index_N)).tolist()
        if lowest < 0 or highest >= size:
            raise IndexError(f"a pair's {name} is not in [0, {size})")


class _PairLogprobs(torch.autograd.Function):
    """(plan, row_N, token_N ascending, input_1, weight_1, input_2, …) -> logprob_N, entropy_H."""

    @staticmethod
    def forward(
        ctx: Any, plan: LogprobPlan, row_N: Tensor, token_N: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs, weights = _factors(tensors, plan)
        need = [plan.grad and needed for needed in ctx.needs_input_grad[3:]]
        weights_need = any(need[1::2])
        of_means = [needed and not weights_need for needed in need[0::2]]
        n_kept = plan.n_kept(len(inputs[0])) if weights_need else 0
        space = LogitsBuffer(plan, inputs[0])
        kept: list[KeptBlock | None] = []
        chosen: list[Tensor] = []
        total: SoftmaxSums | None = None
        for number, (columns, pairs) in enumerate(plan.blocks):
            logits = space.of(plan.blocks[number], fresh=number < n_kept)
            block_weights = [weight[columns] for weight in weights]
            write_logits_(logits, inputs, block_weights)
            factor = squash_(logits, plan)
            chosen.append(logits[row_N[pairs], token_N[pairs] - columns.start])
            sums, sloped = summed_(logits, factor, plan, block_weights, of_means)
            total = sums if total is None else total.merged(sums)
            exps = sloped.to(plan.matmul_dtype) if number < n_kept else None
            kept.append(None if exps is None else KeptBlock(exps, sums.top_H1))
        assert total is not None
        log_sum_H1 = total.sum_H1.log().add_(total.top_H1)
        logprob_N, slope_N = _logprobs(torch.cat(chosen), log_sum_H1[row_N, 0], plan)
        means_HK = [None if m is None else m.div_(total.sum_H1) for m in total.means_HK]
        # Kept blocks are not saved tensors, so that each is released after use. A second backward
        # pass through the same graph recomputes the logits.
        ctx.plan, ctx.need, ctx.kept = plan, need, kept
        ctx.save_for_backward(*tensors, *means_HK, row_N, token_N, slope_N, log_sum_H1)
        entropy_H = _entropy(total)
        ctx.mark_non_differentiable(entropy_H)
        return logprob_N, entropy_H

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # A backward pass within autocast would round the factors and the products of mm.
        with without_autocast(grad_N.device):
            return _gradients(ctx, grad_N)


def _gradients(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments of `_PairLogprobs.forward`."""
    plan: LogprobPlan = ctx.plan
    need: list[bool] = ctx.need
    saved = ctx.saved_tensors  # read once, as gradient checkpointing requires
    tensors, means_HK = saved[: len(need)], saved[len(need) : len(need) * 3 // 2]
    row_N, token_N, slope_N, log_sum_H1 = saved[len(need) * 3 // 2 :]
    row_grad_H1 = torch.zeros_like(log_sum_H1)
    _add_rows_(row_grad_H1, row_N, grad_N[:, None])
    row_grad_H1 *= -plan.scale
    grads = _FactorGradients(plan, tensors, need, row_N, token_N, (grad_N * slope_N)[:, None])
    if any(need[1::2]):
        for block, exps, factor_H1 in softmax_blocks(
            plan, grads.inputs, grads.weights, ctx.kept, log_sum_H1
        ):
            grads.add_block(block, exps, row_grad_H1 * factor_H1)
            del exps  # released before the next block is allocated
    else:
        grads.of_inputs = [None if mean is None else row_grad_H1 * mean for mean in means_HK]
    return (None, None, None, *grads.finished())


class _FactorGradients:
    """Accumulates the gradients of inputs and weights block by block."""

    def __init__(
        self,
        plan: LogprobPlan,
        tensors: Sequence[Tensor],
        need: Sequence[bool],
        row_N: Tensor,
        token_N: Tensor,
        own_grad_N1: Tensor,
    ) -> None:
        self.inputs, self.weights = _factors(tensors, plan)
        self.of_inputs: list[Tensor | None] = [None] * len(self.inputs)
        self._of_weights = [
            torch.empty_like(weight) if needed else None
            for weight, needed in zip(tensors[1::2], need[1::2], strict=True)
        ]
        self._tensors, self._need, self._dtype = tensors, need, plan.dtype
        self._row_N, self._token_N, self._own_grad_N1 = row_N, token_N, own_grad_N1

    def add_block(self, block: VocabularyBlock, exps: Tensor, grad_H1: Tensor) -> None:
        """Add the gradients of the normalisers and of the block's pairs in the block's columns."""
        for i, (x, weight) in enumerate(zip(self.inputs, self.weights, strict=True)):
            if self._need[2 * i]:
                part = matmul(exps, weight[block.columns], self._dtype)
                so_far = self.of_inputs[i]
                self.of_inputs[i] = (
                    part.mul_(grad_H1) if so_far is None else so_far.addcmul_(part, grad_H1)
                )
            of_weight = self._of_weights[i]
            if of_weight is not None:
                self._write_rows_(of_weight[block.columns], block, exps, x, grad_H1)

    def _write_rows_(
        self, out: Tensor, block: VocabularyBlock, exps: Tensor, x: Tensor, grad_H1: Tensor
    ) -> None:
        scaled = (grad_H1 * x).to(x.dtype)
        if out.dtype == x.dtype == self._dtype:
            rows = torch.mm(exps.t(), scaled, out=out)
        else:
            rows = matmul(exps.t(), scaled, self._dtype)
        own = self._own_grad_N1[block.pairs] * x[self._row_N[block.pairs]]
        _add_rows_(rows, self._token_N[block.pairs] - block.columns.start, own)
        if rows is not out:
            out.copy_(rows)

    def finished(self) -> Iterator[Tensor | None]:
        """The gradients in the order and dtypes of the tensors; call after the last block."""
        for i, tensor in enumerate(self._tensors[0::2]):
            of_input = self.of_inputs[i]
            if of_input is not None:
                own = self._own_grad_N1 * self.weights[i][self._token_N]
                _add_rows_(of_input, self._row_N, own)
                of_input = of_input.to(tensor.dtype)
            yield of_input
            yield self._of_weights[i]


def _factors(tensors: Sequence[Tensor], plan: LogprobPlan) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and weights in the dtype of matrix products."""
    cast = [tensor.to(plan.matmul_dtype) for tensor in tensors]
    return cast[0::2], cast[1::2]


def _add_rows_(out: Tensor, index: Tensor, values: Tensor) -> None:
    """out[index[n]] += values[n], with repeated indices, deterministically."""
    # index_add_ uses atomics on GPUs, index_put_ on CPUs; the other one is deterministic.
    if out.is_cuda:
        out.index_put_((index,), values, accumulate=True)
    else:
        out.index_add_(0, index, values)


def _logprobs(squashed_N: Tensor, log_sum_N: Tensor, plan: LogprobPlan) -> tuple[Tensor, Tensor]:
    """Log-probs of the pairs, and their derivatives by the sums of products."""
    slope_N = torch.full_like(squashed_N, plan.scale)
    if plan.soft_cap is None:
        return plan.scale * squashed_N - log_sum_N, slope_N
    return plan.soft_cap * squashed_N - log_sum_N, slope_N * (1.0 - squashed_N.square())


def _entropy(total: SoftmaxSums) -> Tensor:
    """(H,) entropies, nats; empty unless requested."""
    if total.moment_H1 is None:
        return total.sum_H1[:0, 0]
    return (total.sum_H1.log() - total.moment_H1 / total.sum_H1)[:, 0]
