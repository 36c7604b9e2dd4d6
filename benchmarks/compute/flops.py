"""Floating-point operations: the minimum for a group, the counted ones, and their speed.

A product of (m, n) by (n, p) has 2 m n p operations; only matrix products are counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from cases import Case
from torch.utils.flop_counter import FlopCounterMode

from gvpo_offline.plan.devices import device_named

_HEAD_ROWS = 512


def minimum_flops(case: Case, *, backward: bool = True) -> float:
    """Minimum of operations of a step: every unique token once through each decoder product,
    attention over visible pairs only, the head once per predicting hidden row.

    The backward pass costs twice the forward (gradients of inputs and of weights), or once if the
    weights are frozen. The products of an adapter are not counted.
    """
    shape, lengths = case.shape, case.response_lengths
    trained = 3.0 if shape.lora_rank == 0 else 2.0
    factor = trained if backward else 1.0
    layer = sum(2 * n_in * n_out for n_in, n_out in shape.linears)
    products = case.unique_tokens * shape.n_layers * layer
    pairs = case.prompt * (case.prompt + 1) // 2
    pairs += sum((n - 1) * case.prompt + (n - 1) * n // 2 for n in lengths)
    attention = 4 * shape.n_heads * shape.head_dim * pairs * shape.n_layers
    head = 2 * shape.width * shape.vocab_size * predicting_rows(case)
    return factor * (products + head) + (3.0 if backward else 1.0) * attention


def predicting_rows(case: Case) -> int:
    """Hidden rows that predict a response token: the last of the prompt, and all rows of the
    responses except the last of each."""
    return 1 + sum(case.response_lengths) - case.k


def counted_flops(step: Callable[[], object]) -> float:
    """Operations of `step` by PyTorch's counter; causal attention counts visible pairs.

    The counter has no formula for the CPU's flash attention, which is therefore given here.
    """
    aten = torch.ops.aten
    forward, backward = (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )
    formulas = {forward: _flash_flops, backward: _flash_backward_flops}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with counter:
        step()
    return float(counter.get_total_flops())


def _flash_flops(
    query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, **_: Any
) -> int:
    """Two products over the computed pairs: queries by keys, and scores by values."""
    batch, heads, rows, dim = query
    columns = key[2]
    pairs = rows * (rows + 1) // 2 if causal else rows * columns
    return int(2 * batch * heads * pairs * (dim + value[3]))


def _flash_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, *options: Any, **_: Any
) -> int:
    """Five products: recomputed scores and four gradients, as PyTorch counts other kernels."""
    return _flash_flops(query, key, value, *options) * 5 // 2


def matmul_seconds(case: Case, device: str) -> dict[str, float]:
    """Time of plain matrix products with the sizes of decoder and head, each with the two products
    of its backward pass.

    Returns:
        wall and CPU seconds, and the number of operations.
    """
    shape = case.shape
    dtype = getattr(torch, shape.dtype)
    rows, n_head_rows = case.unique_tokens, min(_HEAD_ROWS, predicting_rows(case))
    distinct = {size: shape.linears.count(size) for size in shape.linears}
    plans = [(rows, size, count * shape.n_layers) for size, count in distinct.items()]
    head = (shape.width, shape.vocab_size)
    plans.append((n_head_rows, head, round(predicting_rows(case) / n_head_rows)))
    total = {"wall": 0.0, "cpu": 0.0, "flops": 0.0}
    for n_rows, (n_in, n_out), count in plans:
        wall, cpu = _product_seconds(n_rows, n_in, n_out, dtype, device)
        total["wall"] += count * wall
        total["cpu"] += count * cpu
        total["flops"] += count * 6.0 * n_rows * n_in * n_out
    return total


def _product_seconds(
    rows: int, n_in: int, n_out: int, dtype: torch.dtype, device: str
) -> tuple[float, float]:
    """Wall and CPU seconds of a product and its two gradients, after one warm-up."""
    inputs = torch.randn(rows, n_in, dtype=dtype, device=device)
    weight = torch.randn(n_out, n_in, dtype=dtype, device=device)
    outputs = torch.empty(rows, n_out, dtype=dtype, device=device)
    of_inputs, of_weight = torch.empty_like(inputs), torch.empty_like(weight)
    wall = cpu = 0.0
    for _ in range(2):
        _wait(device)
        wall, cpu = time.perf_counter(), time.process_time()
        torch.mm(inputs, weight.T, out=outputs)
        torch.mm(outputs, weight, out=of_inputs)
        torch.mm(outputs.T, inputs, out=of_weight)
        _wait(device)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall, cpu


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_flops(device_name: str) -> float | None:
    """The dense bfloat16 rate of a device from its data sheet; None if it is not in the table."""
    device = device_named(device_name)
    return None if device is None else device.bf16
