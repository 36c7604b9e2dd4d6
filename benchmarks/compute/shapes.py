"""Builds a model of a given shape with seeded random weights, the same on both sides."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from cases import EOS, ModelShape
from torch import nn

SEED = 0


def build_model(shape: ModelShape, device: str, *, checkpointing: bool = False) -> Any:
    """A causal language model of transformers, in training mode, with SDPA.

    Returns:
        The model, or, with `shape.lora_rank`, a PEFT model with an adapter on every linear layer
        except the head.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    classes: dict[str, tuple[Any, Any]] = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }
    config_class, model_class = classes[shape.kind]
    config = config_class(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=65_536,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
        attn_implementation="sdpa",
        dtype=shape.dtype,
    )
    torch.manual_seed(SEED)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, shape.dtype))
    try:
        with torch.device(device):
            model = model_class(config)
    finally:
        torch.set_default_dtype(kept)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if shape.lora_rank:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(SEED)
        settings = LoraConfig(
            r=shape.lora_rank, lora_alpha=2 * shape.lora_rank, target_modules="all-linear"
        )
        model = get_peft_model(model, settings)
        if checkpointing:
            model.enable_input_require_grads()
    return model.train()


def weights_digest(model: nn.Module) -> str:
    """A hash of the sums of all tensors, to check that two processes have the same weights."""
    found = hashlib.sha256()
    for tensor in model.parameters():
        found.update(f"{tuple(tensor.shape)} {tensor.detach().double().sum().item():.9e}".encode())
    return found.hexdigest()
