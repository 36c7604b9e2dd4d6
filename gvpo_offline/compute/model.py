"""The model: loading it, freeing it of dropout, and saying exactly which one it is."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from gvpo_offline.compute.quantised import (
    compute_in_float32,
    keep_format,
    quantisation,
    quantisation_options,
)
from gvpo_offline.compute.settings import TREE_OVER, ModelSettings
from gvpo_offline.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PIECE_ELEMENTS = 1 << 24
# In names of rates that modules and configurations keep as plain numbers: attention_dropout,
# attn_pdrop, hidden_dropout, layerdrop, router_jitter_noise …
_CHANCE_NAMES = ("drop", "jitter")


def load_model(
    settings: ModelSettings,
    device: torch.device | None = None,
    compute_dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load a causal language model from a folder or a hub name.

    Args:
        settings: which, and how.
        device: where to; default: the CPU, or of quantised weights the GPU there is.
        compute_dtype: of products with 4-bit weights; default: the data type of the other weights.

    Raises:
        ConfigError: there is none, or it cannot be quantised as asked.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": settings.dtype}
    if settings.attn_implementation:
        options["attn_implementation"] = settings.attn_implementation
    options |= quantisation_options(settings, device, compute_dtype)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            settings.model_name_or_path,
            revision=settings.model_revision,
            trust_remote_code=settings.trust_remote_code,
            **options,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ConfigError(
            "the model is a folder or hub name that transformers loads as a causal language model",
            received=f"{settings.model_name_or_path!r} ({str(error).splitlines()[0]})",
            remedy="correct model_name_or_path",
        ) from error
    keep_format(model)
    return model if device is None or quantisation(model) else model.to(device)


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes. Shards (FSDP2's are DTensors) may wait in host memory meanwhile."""
    weight = next(model.parameters())
    mesh = getattr(weight, "device_mesh", None)
    return weight.device if mesh is None else torch.device(mesh.device_type)


def default_device(*, use_cpu: bool = False) -> torch.device:
    """A GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")


def float64_device(device: torch.device) -> torch.device:
    """`device`, or the CPU where `device` has no float64 (Apple's MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


def autocast_dtype(*, bf16: bool, fp16: bool) -> torch.dtype | None:
    """The data type that the flags ask matrix products to be in, or None."""
    if bf16 and fp16:
        raise ConfigError("bf16 and fp16 exclude each other", received="both")
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else None


@contextlib.contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Matrix products in `dtype`, as the trainer's mixed precision does; None: as they are."""
    if dtype is None:
        yield
        return
    with torch.autocast(device.type, dtype=dtype):
        yield


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: a log-ratio must not depend on chance.

    Rates live in dropout modules, in other modules as plain numbers, and in the configuration,
    which some models ask in their forward.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(getattr(holder, "__dict__", {}).items()):
                if isinstance(value, float) and any(part in name for part in _CHANCE_NAMES):
                    setattr(holder, name, 0.0)


def weights_sha256(model: nn.Module, *, frozen_only: bool = False) -> str:
    """SHA-256 over names, shapes and values of all weights (or the frozen ones), each as float32.

    As float32, so that one checkpoint has one hash in whatever (wider) data type it is loaded.
    """
    trained = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if frozen_only and parameter.requires_grad
    }
    return tensors_sha256({n: t for n, t in model.state_dict().items() if n not in trained})


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and values, each as float32, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        for start in range(0, flat.numel(), _PIECE_ELEMENTS):
            piece = flat[start : start + _PIECE_ELEMENTS].to("cpu", torch.float32)
            digest.update(piece.contiguous().numpy().data)
    return digest.hexdigest()


def attention_of(model: nn.Module) -> str:
    """The attention implementation that a transformers model has of its own."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return str(name or "unknown").removeprefix(TREE_OVER)


def dtype_of(model: nn.Module) -> str:
    """The data type of a model's weights: `float32`, or `bfloat16+nf4` where some are quantised."""
    parts = [dtype_name(next(p.dtype for p in model.parameters() if p.is_floating_point()))]
    return "+".join(part for part in (*parts, quantisation(model)) if part)


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """`float32` for torch.float32, and so on."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Narrow parameters and buffers as float32; afterwards they are the very numbers they were."""
    with no_trace(model):
        every = (*model.parameters(), *model.buffers())
        tensors = [t for t in every if t.dtype in (torch.bfloat16, torch.float16)]
        before = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.float()
            with compute_in_float32(model):
                yield
        finally:
            for tensor, data in zip(tensors, before, strict=True):
                tensor.data = data


@contextlib.contextmanager
def no_trace(model: nn.Module) -> Iterator[None]:
    """Gradients begin at none, and are what they were afterwards."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in before:
            parameter.grad = grad
