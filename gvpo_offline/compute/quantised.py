"""Weights quantised with bitsandbytes: loading options, and detection in a loaded model."""

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
    """Options of `from_pretrained` for `load_in_4bit` and `load_in_8bit`; empty without them.

    4-bit weights use the format of QLoRA (arXiv 2305.14314): NF4 with double quantisation.

    Args:
        settings: settings of the model.
        device: device of the weights; bitsandbytes quantises them when they are moved there.
        compute_dtype: data type of matrix products with 4-bit weights; default: the data type of
            the other weights.

    Raises:
        ConfigError: both options are set, or bitsandbytes is not installed.
    """
    if not (settings.load_in_4bit or settings.load_in_8bit):
        return {}
    if settings.load_in_4bit and settings.load_in_8bit:
        raise ConfigError("load_in_4bit and load_in_8bit exclude each other", received="both")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "weights are quantised by bitsandbytes",
            received="bitsandbytes is not installed",
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
    """Format of a model's quantised weights: `nf4`, `int8` …; None: no weight is quantised."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    found: dict[str, Any] = config if isinstance(config, dict) else config.to_dict()
    if found.get("load_in_4bit"):
        return str(found["bnb_4bit_quant_type"])
    return "int8" if found.get("load_in_8bit") else str(found.get("quant_method", "quantised"))


def disable_cpu_repacking(model: nn.Module) -> None:
    """Use the same CPU kernels for 4-bit weights in evaluation as in training.

    By default bitsandbytes repacks 4-bit weights in evaluation mode on CPUs with AVX512-BF16. The
    kernels for repacked weights round more, and give no gradient when training continues.
    """
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def compute_in_float32(model: nn.Module) -> Iterator[None]:
    """Within it, matrix products with 4-bit weights are computed in float32."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "compute_dtype")]
    before = [layer.compute_dtype for layer in layers]
    try:
        for layer in layers:
            layer.compute_dtype = torch.float32
        yield
    finally:
        for layer, dtype in zip(layers, before, strict=True):
            layer.compute_dtype = dtype
