"""Weights that stay as their files store them until each rank has its part.

Weights in the data type of their safetensors file are mapped, not read: the processes of a machine
share the pages of the file. Converting a bfloat16 file to float32 instead gives every process a
private copy of the whole model, twice the size of the file. So where a model will be sharded, it is
loaded as stored, and each rank converts the shard that it keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Attribute of a model whose weights are to become float32.
_WIDENS = "_gvpo_widens"
NARROW = (torch.bfloat16, torch.float16)


def can_widen_later(model: nn.Module) -> bool:
    """Whether converting a model's parameters later is the same as loading them in float32.

    Not if it computed buffers in a narrow data type: they hold rounded values, and a float32 model
    has others (the scale of Gemma's embeddings, for one).
    """
    return all(not t.is_floating_point() or t.dtype not in NARROW for t in model.buffers())


def widen_later(model: nn.Module) -> None:
    """Note that a model's weights are to be float32 once they are sharded; see `widen`."""
    if any(weight.dtype in NARROW for weight in model.parameters()):
        setattr(model, _WIDENS, True)


def widens(model: nn.Module) -> bool:
    """Whether `widen_later` was called for a model, and `widen` not yet."""
    return bool(getattr(model, _WIDENS, False))


def widen(model: nn.Module, *, trained_only: bool = False) -> None:
    """Convert 16-bit parameters to float32, in place; sharded ones too.

    Parameters keep their identity, so an optimizer that has them stays valid.

    Args:
        model: a model, or one that FSDP2 has sharded.
        trained_only: convert only those that need gradients.
    """
    apply: Any = model._apply  # untyped in torch
    apply(_to_float32(trained_only))
    if hasattr(model, _WIDENS):
        delattr(model, _WIDENS)


def _to_float32(trained_only: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    def convert(tensor: torch.Tensor) -> torch.Tensor:
        wanted = tensor.dtype in NARROW and (tensor.requires_grad or not trained_only)
        return tensor.float() if wanted else tensor

    return convert
