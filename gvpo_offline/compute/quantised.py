"""Quantised weights through bitsandbytes: asking for them, and telling what a model has."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gvpo_offline.compute.settings import ModelSettings
from gvpo_offline.errors import ConfigError


def quantisation_options(
    settings: ModelSettings, device: torch.device | None, compute_dtype: torch.dtype | None
) -> dict[str, Any]:
    """What `from_pretrained` is told for `load_in_4bit` and `load_in_8bit`; empty without them.

    4 bits are QLoRA's (arXiv 2305.14314): NormalFloat, the constants quantised once more.

    Args:
        settings: the model's.
        device: where the weights go; they are quantised as they get there.
        compute_dtype: of matrix products with 4-bit weights; default: that of the other weights.

    Raises:
        ConfigError: both are asked for, or bitsandbytes is not installed.
    """
    if not (settings.load_in_4bit or settings.load_in_8bit):
        return {}
    if settings.load_in_4bit and settings.load_in_8bit:
        raise ConfigError("load_in_4bit and load_in_8bit exclude each other", received="both")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "weights are quantised by bitsandbytes",
            received="no such package",
            remedy="pip install 'gvpo-offline[qlora]'",
        )
    from transformers import BitsAndBytesConfig

    own = getattr(torch, settings.dtype) if settings.dtype != "auto" else None
    config = BitsAndBytesConfig(
        load_in_4bit=settings.load_in_4bit,
        load_in_8bit=settings.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype or own,
    )
    placed = {} if device is None else {"device_map": {"": device}}
    return {"quantization_config": config, **placed}


def quantisation(model: nn.Module) -> str | None:
    """How some of a model's weights are quantised: `nf4`, `int8` …; None: not at all."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    found: dict[str, Any] = config if isinstance(config, dict) else config.to_dict()
    if found.get("load_in_4bit"):
        return str(found["bnb_4bit_quant_type"])
    return "int8" if found.get("load_in_8bit") else str(found.get("quant_method", "quantised"))


def keep_format(model: nn.Module) -> None:
    """Have 4-bit weights computed on a CPU in evaluation as they are in training.

    Otherwise bitsandbytes repacks them, where the CPU can, for bfloat16 kernels that round more
    and, once the model trains on, give no gradient.
    """
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def compute_in_float32(model: nn.Module) -> Iterator[None]:
    """Products with 4-bit weights in float32, whatever they are computed in otherwise."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "compute_dtype")]
    before = [layer.compute_dtype for layer in layers]
    try:
        for layer in layers:
            layer.compute_dtype = torch.float32
        yield
    finally:
        for layer, dtype in zip(layers, before, strict=True):
            layer.compute_dtype = dtype
