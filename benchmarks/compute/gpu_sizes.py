"""Sizes of the tensors that a step allocates: is one (tokens, tokens) or (tokens, vocabulary)?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest tensor that an operation returns, except those of a weight's shape."""

    def __init__(self, weights: set[tuple[int, ...]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = weights | {shape[::-1] for shape in weights}
        self.n_values = 0
        self.shape: tuple[int, ...] = ()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the operation and note the sizes of its results."""
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) not in self._weights:
                stored = tensor.untyped_storage().nbytes() // max(1, tensor.element_size())
                n_values = min(tensor.numel(), stored)  # an expanded view holds fewer values
                if n_values > self.n_values:
                    self.n_values, self.shape = n_values, tuple(tensor.shape)
        return results


def largest_on_cpu(step: Callable[[], object], model: Any) -> tuple[int, str]:
    """Values of the largest tensor of a step, and its shape."""
    mode = LargestTensor({tuple(p.shape) for p in model.parameters()})
    with mode:
        step()
    return mode.n_values, str(list(mode.shape))


def largest_on_gpu(step: Callable[[], object], model: Any) -> tuple[int, str]:
    """Bytes of the largest allocation of a step that is no gradient of a weight.

    A dispatch mode would change how flex_attention runs, so the allocator's history is read.
    """
    weights = {p.numel() * size for p in model.parameters() for size in (2, 4)}
    torch.cuda.memory._record_memory_history(max_entries=1_000_000, stacks="python")
    try:
        step()
        torch.cuda.synchronize()
        traces = torch.cuda.memory._snapshot()["device_traces"]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    sizes = {event["size"] for trace in traces for event in trace if event["action"] == "alloc"}
    # The allocator rounds sizes up to 512 bytes.
    rounded = {-(-size // 512) * 512 for size in weights}
    largest = max((size for size in sizes if size not in rounded), default=0)
    return int(largest), f"{largest} bytes"


def large_tensors(
    step: Callable[[], object], model: Any, device: str, rows: int, scored: int, vocabulary: int
) -> dict[str, Any]:
    """Whether a step allocates no tensor of rows x rows and none of scored x vocabulary values.

    On a GPU sizes are in bytes and shapes unknown: true if the largest allocation is below one byte
    per pair of rows, or two bytes per logit. A larger allocation may be an activation or a block of
    logits (up to 1 GiB), so the figure is then None, not False.
    """
    squares, logits = rows * rows, scored * vocabulary
    if device == "cuda":
        largest, shape = largest_on_gpu(step, model)
        logits *= 2
    else:
        largest, shape = largest_on_cpu(step, model)
    above = None if device == "cuda" else False
    return {
        "largest_tensor": shape,
        "no_square_tensor": True if largest < squares else above,
        "no_logits_tensor": True if largest < logits else above,
    }
