"""Log-probs from a causal language model's last hidden states, without its logits.

A `Head` describes how a model turns its last hidden states into logits: an output layer, a factor,
a soft-cap. The output layer is then computed outside the model's own forward, so every operation
that is not supported here raises an error. Factor and soft-cap are read from the configuration; a
model may do more than its configuration states, so compare with its own logits before relying on
the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gvpo_offline.compute.devices import autocast_dtype_of
from gvpo_offline.compute.dispatched import execution_device, present
from gvpo_offline.compute.fused import LogitTerm, PairLogprobs, fused_pair_logprobs
from gvpo_offline.compute.vocabulary import multiplies_bfloat16
from gvpo_offline.errors import ConfigError

__all__ = ["Head", "PairLogprobs", "UnsupportedHeadError", "find_head", "pair_logprobs"]

# Names in transformers' configurations of operations on logits.
_DIVIDE = ("logits_scaling", "logits_mup_width_multiplier")
_MULTIPLY = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_SOFT_CAP = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# These model types multiply by `logits_scaling`.
_INVERSE_SCALING = ("hyperclovax",)


class UnsupportedHeadError(ConfigError):
    """An output layer that only the model itself can compute."""


@dataclass(frozen=True)
class Head:
    """How a model turns its last hidden states into logits.

    logits = c * tanh(scale * layer(hidden) / c) with c = soft_cap, or scale * layer(hidden).

    Attributes:
        layer: the output layer module; its weights and active adapters are read at every call.
        scale: positive factor.
        soft_cap: c, or None.
    """

    layer: nn.Module
    scale: float
    soft_cap: float | None


def find_head(model: nn.Module) -> Head:
    """The head of a transformers causal language model, or of a PEFT model that wraps one.

    Raises:
        UnsupportedHeadError: the model has no output layer or an unsupported one.
    """
    causal: Any = _unwrapped(model)
    config = getattr(causal, "config", None)
    if config is None or not hasattr(causal, "get_output_embeddings"):
        raise _unsupported("the model is a transformers causal language model", type(causal))
    layer = causal.get_output_embeddings()
    if layer is None:
        raise _unsupported("the model has output embeddings", type(causal))
    if getattr(config, "is_encoder_decoder", False):
        raise _unsupported("the model is a decoder only", type(causal))
    _check_only_decoder_and(layer, causal)
    if _is_sharded(layer):
        # FSDP2 gathers the weights of a module when the module is called, but this layer is not
        # called here. FSDP2 shards it again after the backward pass.
        layer.unshard()
    settings = config.get_text_config()
    head = Head(layer, _scale(settings), _soft_cap(settings))
    _adapters(_active(layer))
    vocab_size = len(_linear(_active(layer)).weight)
    real_size = getattr(settings, "unpadded_vocab_size", None) or vocab_size
    if real_size < vocab_size:
        raise _unsupported("every row of the output layer has a token", f"{real_size} tokens")
    return head


def pair_logprobs(
    head: Head,
    hidden_HD: Tensor,
    pair_row_N: Tensor,
    pair_token_N: Tensor,
    *,
    kept_bytes: int,
    entropy: bool = False,
) -> PairLogprobs:
    """log softmax(logits of hidden row)[token] for pairs of a row and a token.

    Differentiable in the hidden states and in every weight of the head. On devices with
    instructions for 16-bit factors, the factors of matrix products have the dtype of the output
    layer's weight, or of autocast. On others they are float32. Products are float32 everywhere:
    rounding them to 16 bits is 40% of the variance of a log-prob's error in bfloat16
    (benchmarks/precision.py).

    Args:
        head: from `find_head`.
        hidden_HD: (H, D) last hidden states of the predicting rows, any floating-point dtype.
        pair_row_N: (N,) int64, rows of `hidden_HD`, in any order; several pairs may share one.
            Cheapest on the CPU, see `fused_pair_logprobs`.
        pair_token_N: (N,) int64, token ids.
        kept_bytes: most bytes of tensors of the size of the logits to keep for the backward pass if
            a weight of the head is trained; the rest is recomputed.
        entropy: whether to return the entropy of every row's distribution.

    Returns:
        (N,) float32 log-probs, nats, and (H,) float32 entropies, nats, or None.

    Raises:
        UnsupportedHeadError: adapters were changed to an unsupported state.
        IndexError: a row or a token is out of range.
    """
    with present(head.layer):
        own_device = execution_device(_linear(_active(head.layer)))
        if own_device is not None:  # the last layer may be on another one
            hidden_HD = hidden_HD.to(own_device)
        return _pair_logprobs(head, hidden_HD, pair_row_N, pair_token_N, kept_bytes, entropy)


def _pair_logprobs(
    head: Head,
    hidden_HD: Tensor,
    pair_row_N: Tensor,
    pair_token_N: Tensor,
    kept_bytes: int,
    entropy: bool,
) -> PairLogprobs:
    parts = _parts(head.layer, hidden_HD)
    device_type = hidden_HD.device.type
    matmul_dtype = parts[0].weight_VK.dtype
    if matmul_dtype != torch.float64:
        matmul_dtype = autocast_dtype_of(hidden_HD.device) or matmul_dtype
    if not (
        device_type == "cuda"
        or (matmul_dtype == torch.bfloat16 and multiplies_bfloat16(hidden_HD.device))
    ):
        matmul_dtype = torch.promote_types(matmul_dtype, torch.float32)
    return fused_pair_logprobs(
        parts,
        pair_row_N,
        pair_token_N,
        scale=head.scale,
        soft_cap=head.soft_cap,
        matmul_dtype=matmul_dtype,
        kept_bytes=kept_bytes,
        entropy=entropy,
    )


def _unsupported(rule: str, received: object) -> UnsupportedHeadError:
    shown = received.__name__ if isinstance(received, type) else received
    return UnsupportedHeadError(rule, received=shown, remedy="use the model's own logits")


def _unwrapped(model: nn.Module) -> nn.Module:
    inner: Any = model
    while hasattr(inner, "_orig_mod") or isinstance(
        inner, nn.parallel.DistributedDataParallel | nn.DataParallel
    ):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    causal: nn.Module = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return causal


def _check_only_decoder_and(layer: nn.Module, causal: Any) -> None:
    """Reject models with weights outside decoder and output layer: they may act in between."""
    decoder = causal.get_decoder() if hasattr(causal, "get_decoder") else None
    if decoder is None or decoder is causal:
        raise _unsupported("the model has a get_decoder() that returns its decoder", type(causal))
    beside = [name for name, _ in causal.named_parameters(recurse=False)]
    beside += [name for name, _ in causal.named_buffers(recurse=False)]
    found = False
    for name, child in causal.named_children():
        found = found or child is layer
        if child is not layer and all(module is not decoder for module in child.modules()):
            beside += [name] if any(True for _ in child.parameters()) else []
    if beside or not found:
        raise _unsupported(
            "nothing but the output layer comes after the decoder",
            f"{type(causal).__name__} with {', '.join(beside) or 'the output layer deeper inside'}",
        )


def _scale(settings: Any) -> float:
    inverse = str(getattr(settings, "model_type", "")).startswith(_INVERSE_SCALING)
    scale = 1.0
    for name in _DIVIDE + _MULTIPLY:
        factor = getattr(settings, name, None)
        if factor is None:
            continue
        if not isinstance(factor, int | float) or factor <= 0:
            raise _unsupported("logits are scaled by a positive number", f"{name}={factor!r}")
        divide = name in _DIVIDE and not inverse
        scale = scale / factor if divide else scale * factor
    return scale


def _soft_cap(settings: Any) -> float | None:
    caps = [float(c) for name in _SOFT_CAP if (c := getattr(settings, name, None)) is not None]
    if len(caps) > 1 or any(cap <= 0 for cap in caps):
        raise _unsupported("logits have at most one soft-cap, a positive number", caps)
    return caps[0] if caps else None


def _is_sharded(module: nn.Module) -> bool:
    # By name, because importing torch.distributed.fsdp is slow.
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def _class_of(module: nn.Module) -> type:
    """The class of a module before FSDP2, which inserts two classes in front of it."""
    return type(module).__mro__[2] if _is_sharded(module) else type(module)


def _is_from_peft(module: nn.Module) -> bool:
    # By name, because importing PEFT is slow.
    return _class_of(module).__module__.startswith("peft.")


def _active(layer: nn.Module) -> nn.Module:
    """`layer`, or its trained copy if PEFT's modules_to_save replaces it."""
    if not _is_from_peft(layer):
        return layer
    from peft.utils import ModulesToSaveWrapper

    if not isinstance(layer, ModulesToSaveWrapper):
        return layer
    names = layer.active_adapters
    disabled = layer.disable_adapters or not names
    if disabled or any(name not in layer.modules_to_save for name in names):
        original: nn.Module = layer.original_module
        return original
    copy: nn.Module = layer.modules_to_save[names[0]]
    return copy


def _adapters(layer: nn.Module) -> list[tuple[nn.Linear, nn.Module, nn.Linear, float]]:
    """(A, dropout, B, factor) of each active LoRA adapter of `layer`."""
    if not _is_from_peft(layer):
        return []
    from peft.tuners.lora import Linear

    if _class_of(layer) is not Linear:
        raise _unsupported(
            "an adapter of the output layer is a LoRA layer for nn.Linear", type(layer)
        )
    lora: Any = layer
    if lora.merged and lora.disable_adapters:
        raise _unsupported("adapters are not merged while they are disabled", "merged")
    if lora.merged or lora.disable_adapters:
        return []
    names = [name for name in lora.active_adapters if name in lora.lora_A]
    variants = [type(lora.lora_variant[name]) for name in names if name in lora.lora_variant]
    if variants:
        raise _unsupported("an adapter of the output layer is plain LoRA", variants[0])
    return [
        (lora.lora_A[name], lora.lora_dropout[name], lora.lora_B[name], float(lora.scaling[name]))
        for name in names
    ]


def _is_replaced(layer: nn.Module) -> bool:
    """Whether a layer's `forward` is another than its class's; accelerate's hooks keep it."""
    own: Any = vars(layer).get("forward")
    if own is not None and execution_device(layer) is not None:
        own = layer._old_forward
        return getattr(own, "__func__", None) is not type(layer).forward
    return own is not None


def _linear(layer: nn.Module) -> nn.Linear:
    """`layer` itself, or the base layer that its adapters wrap, checked to be a plain nn.Linear."""
    base: Any = layer.get_base_layer() if _is_from_peft(layer) else layer  # type: ignore[operator]
    # DeepSpeed ZeRO-3, whose hooks only gather the weight.
    zero3 = hasattr(getattr(base, "weight", None), "ds_id")
    own = int(_is_sharded(base))  # FSDP2 registers one hook before and one after forward
    hooks = max(len(base._forward_hooks), len(base._forward_pre_hooks)) > own
    hooks = (hooks or _is_replaced(base)) and not zero3
    # Subclasses may override forward (quantised layers do); FSDP2's class does not.
    plain = getattr(type(base), "forward", None) is nn.Linear.forward
    if not plain or hooks:
        raise _unsupported("the output layer is an nn.Linear, without hooks", type(base))
    linear: nn.Linear = base
    if not linear.weight.is_floating_point():
        raise _unsupported("the output layer's weight is floating point", linear.weight.dtype)
    if hasattr(linear.weight, "to_local"):  # a DTensor
        raise _unsupported(
            "the output layer's weight is not sharded in the forward pass", "a shard"
        )
    return linear


def _parts(layer: nn.Module, hidden_HD: Tensor) -> list[LogitTerm]:
    """The terms whose sum is the output of `layer`; a bias is a product with a column of ones."""
    layer = _active(layer)
    adapters, linear = _adapters(layer), _linear(layer)
    parts = [LogitTerm(hidden_HD.to(linear.weight.dtype), linear.weight)]
    if linear.bias is not None:
        parts.append(_bias(hidden_HD, linear.bias, 1.0))
    for down, dropout, up, factor in adapters:
        parts.append(LogitTerm(down(dropout(hidden_HD.to(down.weight.dtype))) * factor, up.weight))
        if up.bias is not None:
            parts.append(_bias(hidden_HD, up.bias, factor))
    return parts


def _bias(hidden_HD: Tensor, bias_V: Tensor, factor: float) -> LogitTerm:
    return LogitTerm(bias_V.new_full((len(hidden_HD), 1), factor), bias_V[:, None])
