"""The softmax of Σ_i x_i W_iᵀ over a vocabulary, computed in blocks of columns.

With z = scale * sum_i x_i W_i^T, logits are y = z, or c * tanh(z / c) where they are soft-capped.
Each block has its own maximum in every row, and the sums of the blocks are merged, so that only the
logits of one block are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Most bytes of a block's logits: large enough for fast matrix products, small compared to a model.
# Blocks have more than half of this size, because glibc returns allocations of more than 32 MiB to
# the system when they are released.
CPU_BLOCK_BYTES = 64 << 20
ACCELERATOR_BLOCK_BYTES = 1 << 30
_COLUMN_MULTIPLE = 64
_MIN_COLUMNS = 1024


class VocabularyBlock(NamedTuple):
    """A range of columns of the logits, and the range of pairs whose tokens are in it."""

    columns: slice
    pairs: slice

    @property
    def width(self) -> int:
        """Number of columns."""
        return int(self.columns.stop - self.columns.start)


@dataclass(frozen=True)
class LogprobPlan:
    """Parameters of one call of `fused_pair_logprobs`, which documents them."""

    scale: float
    soft_cap: float | None
    matmul_dtype: torch.dtype
    kept_bytes: int
    entropy: bool
    grad: bool
    blocks: tuple[VocabularyBlock, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Data type of logits and sums."""
        return torch.promote_types(self.matmul_dtype, torch.float32)

    def n_kept(self, n_rows: int) -> int:
        """Number of blocks whose exponentials fit into `kept_bytes`."""
        fit = self.kept_bytes // max(n_rows * self.matmul_dtype.itemsize, 1)
        return sum(block.columns.stop <= fit for block in self.blocks)


def cut_blocks(
    token_N: Tensor, n_rows: int, vocab_size: int, device: torch.device
) -> Iterator[VocabularyBlock]:
    """Divide the vocabulary into blocks of about equal size for logits on `device`; `token_N`, on
    any device, is ascending."""
    block_bytes = CPU_BLOCK_BYTES if device.type == "cpu" else ACCELERATOR_BLOCK_BYTES
    most = max(block_bytes // (4 * max(n_rows, 1)), _MIN_COLUMNS)
    n_blocks = max(math.ceil(vocab_size / most), 1)
    width = math.ceil(vocab_size / (n_blocks * _COLUMN_MULTIPLE)) * _COLUMN_MULTIPLE
    edges = [*range(0, vocab_size, width), vocab_size]
    pairs = torch.searchsorted(token_N, torch.tensor(edges, device=token_N.device)).tolist()
    for i in range(len(edges) - 1):
        yield VocabularyBlock(slice(edges[i], edges[i + 1]), slice(pairs[i], pairs[i + 1]))


class KeptBlock(NamedTuple):
    """Kept tensors of a block: exp(logit - top), times the slope of a soft-cap if there is one."""

    exps: Tensor
    top_H1: Tensor


class LogitsBuffer:
    """Allocates logits: one buffer that all blocks reuse, or a new tensor for a kept block."""

    def __init__(self, plan: LogprobPlan, like: Tensor) -> None:
        self._plan = plan
        self._like = like
        self._shared: Tensor | None = None

    def of(self, block: VocabularyBlock, *, fresh: bool = False) -> Tensor:
        """Uninitialised (H, columns of the block); `fresh`: memory that no other block uses."""
        n_rows, dtype = len(self._like), self._plan.dtype
        if fresh and self._plan.matmul_dtype == dtype:
            return self._like.new_empty((n_rows, block.width), dtype=dtype)
        if self._shared is None:
            widest = max(b.width for b in self._plan.blocks)
            self._shared = self._like.new_empty(n_rows * widest, dtype=dtype)
        return self._shared[: n_rows * block.width].view(n_rows, block.width)


class SoftmaxSums(NamedTuple):
    """Sums over some columns, for each row, with e = exp(logit - top).

    `sum` is the sum of e; `moment` of e · (logit - top), if entropies are requested; `means` of
    e · weight.
    """

    top_H1: Tensor
    sum_H1: Tensor
    moment_H1: Tensor | None
    means_HK: list[Tensor | None]

    def merged(self, other: SoftmaxSums) -> SoftmaxSums:
        """The sums over the columns of both operands."""
        top_H1 = torch.maximum(self.top_H1, other.top_H1)
        moment_H1: Tensor | None = None
        means_HK: list[Tensor | None] = [None] * len(self.means_HK)
        sum_H1 = torch.zeros_like(top_H1)
        for sums in (self, other):
            down_H1 = sums.top_H1 - top_H1
            factor_H1 = down_H1.exp()
            sum_H1.addcmul_(factor_H1, sums.sum_H1)
            if sums.moment_H1 is not None:
                moved_H1 = factor_H1 * (sums.moment_H1 + down_H1 * sums.sum_H1)
                moment_H1 = moved_H1 if moment_H1 is None else moment_H1 + moved_H1
            for i, mean_HK in enumerate(sums.means_HK):
                if mean_HK is not None:
                    mean_HK.mul_(factor_H1)
                    so_far = means_HK[i]
                    means_HK[i] = mean_HK if so_far is None else so_far.add_(mean_HK)
        return SoftmaxSums(top_H1, sum_H1, moment_H1, means_HK)


def squash_(sums: Tensor, plan: LogprobPlan) -> float:
    """Turn sums of products in place into logits up to a constant factor, which is returned."""
    if plan.soft_cap is None:
        return plan.scale
    sums.mul_(plan.scale / plan.soft_cap).tanh_()
    return plan.soft_cap


def _exponentials_(
    squashed: Tensor, factor: float, shift_H1: Tensor, plan: LogprobPlan
) -> tuple[Tensor, Tensor]:
    """exp(logits - shift), and the same times the slope of the soft-cap; overwrites `squashed`.

    The second result uses the memory of `squashed`; without a soft-cap the first does too.
    """
    if plan.soft_cap is None:
        exps = torch.add(-shift_H1, squashed, alpha=factor, out=squashed).exp_()
        return exps, exps
    exps = torch.add(-shift_H1, squashed, alpha=factor).exp_()
    # exps * (1 - tanh²) in one pass.
    torch.ops.aten.tanh_backward.grad_input(exps, squashed, grad_input=squashed)
    return exps, squashed


def summed_(
    squashed: Tensor,
    factor: float,
    plan: LogprobPlan,
    weights: Sequence[Tensor],
    of_means: Sequence[bool],
) -> tuple[SoftmaxSums, Tensor]:
    """Sums over a block, and its exponentials times slopes; these overwrite `squashed`."""
    top_H1 = factor * squashed.amax(dim=-1, keepdim=True)
    exps, sloped = _exponentials_(squashed, factor, top_H1, plan)
    moment_H1 = None
    if plan.entropy:
        moment_H1 = -torch.special.entr(exps).sum(dim=-1, keepdim=True)
    means_HK = [
        matmul(sloped.to(weight.dtype), weight, plan.dtype) if needed else None
        for weight, needed in zip(weights, of_means, strict=True)
    ]
    return SoftmaxSums(top_H1, exps.sum(dim=-1, keepdim=True), moment_H1, means_HK), sloped


def write_logits_(out: Tensor, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Write Σ_i x_i W_iᵀ to `out`."""
    first, *others = zip(inputs, weights, strict=True)
    x, weight = first
    if x.dtype == out.dtype:
        torch.mm(x, weight.t(), out=out)
    elif x.is_cuda:
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
    else:
        _unrounded_mm(x, weight.t(), out.dtype, out)
    for x, weight in others:
        if x.dtype == out.dtype:
            torch.addmm(out, x, weight.t(), out=out)
        else:
            out.add_(matmul(x, weight.t(), out.dtype))


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, without rounding to the dtype of the factors first."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else _unrounded_mm(a, b, dtype)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bfloat16 factors."""
    if device.type != "cpu":
        return device.type == "cuda"
    known = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(known and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _unrounded_mm(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """`matmul` where torch.mm has no out_dtype: products of the factors converted to `dtype`.

    The factors are 16-bit numbers, so that nothing is lost if oneDNN rounds them to bfloat16 again:
    on CPUs with instructions for it, the product then has their speed.
    """
    precision: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = precision.fp32_precision
    try:
        if a.dtype == b.dtype == torch.bfloat16:
            precision.fp32_precision = "bf16"
        return torch.mm(a.to(dtype), b.to(dtype), out=out)
    finally:
        precision.fp32_precision = before


def softmax_blocks(
    plan: LogprobPlan,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: list[KeptBlock | None],
    log_sum_H1: Tensor,
) -> Iterator[tuple[VocabularyBlock, Tensor, Tensor]]:
    """For each block a matrix and a factor per row, whose product is slope · softmax.

    Kept tensors are removed from `kept`, so that the caller holds the only reference.
    """
    space = LogitsBuffer(plan, inputs[0])
    for number, block in enumerate(plan.blocks):
        if kept[number] is not None:
            yield block, *_taken(kept, number, log_sum_H1)
            continue
        logits = space.of(block)
        write_logits_(logits, inputs, [weight[block.columns] for weight in weights])
        factor = squash_(logits, plan)
        _, sloped = _exponentials_(logits, factor, log_sum_H1, plan)
        yield block, sloped.to(plan.matmul_dtype), torch.ones_like(log_sum_H1)


def _taken(kept: list[KeptBlock | None], number: int, log_sum_H1: Tensor) -> tuple[Tensor, Tensor]:
    found, kept[number] = kept[number], None
    assert found is not None
    return found.exps, (found.top_H1 - log_sum_H1).exp_()
