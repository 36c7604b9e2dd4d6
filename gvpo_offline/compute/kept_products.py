"""Activation checkpointing that recomputes only what is cheap.

Checkpointing a whole layer keeps its input and computes everything else twice. Most of a layer's
time is in matrix products and attention, and most of its memory in what lies between them: norms,
rotations, activation functions, residual sums. With the results of products and attention kept, the
backward pass recomputes only the latter.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)

from gvpo_offline.errors import ConfigError

# Of matrix products and attention kernels. An operation that this torch lacks is left out; one that
# is not listed is recomputed, which is right and takes time.
_PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_grouped_mm",
    "convolution",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_flash_attention_forward",
    "_efficient_attention_forward",
)


def _operations() -> frozenset[Any]:
    packets = (getattr(torch.ops.aten, name, None) for name in _PRODUCTS)
    kept: set[Any] = {packet.default for packet in packets if packet is not None}
    kept.add(torch.ops.higher_order.flex_attention)
    return frozenset(kept)


def _policy(
    _: SelectiveCheckpointContext, operation: Any, *__: Any, **___: Any
) -> CheckpointPolicy:
    if operation in _KEPT:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def keep_products(model: nn.Module) -> int:
    """Let the layers of a model with activation checkpointing keep matrix products and attention.

    transformers sets the function that checkpoints a layer when checkpointing is enabled; call this
    after it, and again whenever it is enabled again.

    Returns:
        The number of layers and modules that checkpoint.

    Raises:
        ConfigError: checkpointing is reentrant, which cannot keep a part of a layer.
    """
    changed = 0
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is None or not getattr(module, "gradient_checkpointing", False):
            continue
        given = getattr(function, "keywords", {})
        if given.get("use_reentrant"):
            raise ConfigError(
                "keep_products needs checkpointing that is not reentrant",
                received="use_reentrant: true",
                remedy="remove use_reentrant from activation_checkpointing_kwargs",
            )
        vars(module)["_gradient_checkpointing_func"] = partial(function, context_fn=_contexts)
        changed += 1
    return changed


_KEPT = _operations()
_contexts = partial(create_selective_checkpoint_contexts, _policy)
