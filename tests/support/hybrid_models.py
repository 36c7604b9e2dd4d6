"""Recurrent and hybrid models with a few thousand random weights: linear attention, state space
models, short convolutions, and their combinations with attention.
"""

from __future__ import annotations

from typing import Any

import torch
from support.tiny_models import VOCAB_SIZE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BARE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    **_SPECIAL,
}
_LAYERS: dict[str, Any] = {
    **_BARE,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_LINEAR: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
_DELTA: dict[str, Any] = {
    **_LINEAR,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
# Chunks of 4, so that short rows span several chunks.
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 4,
    "mamba_expand": 2,
    "mamba_n_groups": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SHARED = {**_EXPERTS, "shared_expert_intermediate_size": 16}
_CONV = {"layer_types": ["conv", "full_attention"]}
_KIMI = {"linear_head_dim": 8, "linear_num_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 8}
_KIMI |= {"qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8, "num_local_experts": 4}
_KIMI |= {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ZAMBA2 = {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"]}
_ZAMBA2 |= {"mamba_d_state": 8, "n_mamba_heads": 4, "mamba_ngroups": 2, "chunk_size": 4}
_ZAMBA2 |= {"use_mamba_kernels": False, "num_key_value_heads": 4}
_NEMOTRON = {"layers_block_type": ["mamba", "mlp", "attention", "moe"], "ssm_state_size": 8}
_NEMOTRON |= {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 4}
_NEMOTRON |= {"head_dim": 8, "n_routed_experts": 4, "moe_intermediate_size": 16}
_NEMOTRON |= {"moe_shared_expert_intermediate_size": 16, "use_mamba_kernels": False}
_MAMBA2 = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 4}
_JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8}

# Several tokens at once can continue the prompt's state.
CONTINUED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-next": ("qwen3_next", {**_LAYERS, **_DELTA, **_SHARED, "head_dim": 8}),
    "qwen3.5": ("qwen3_5_text", {**_LAYERS, **_DELTA, "head_dim": 8}),
    "qwen3.5-moe": ("qwen3_5_moe_text", {**_LAYERS, **_DELTA, **_SHARED, "head_dim": 8}),
    "olmo-hybrid": ("olmo_hybrid", {**_LAYERS, **_DELTA}),
    "kimi-linear": ("kimi_linear", {**_LAYERS, **_LINEAR, **_KIMI}),
    "lfm2": ("lfm2", {**_LAYERS, **_CONV, "block_auto_adjust_ff_dim": False}),
    "lfm2-moe": ("lfm2_moe", {**_LAYERS, **_CONV, **_EXPERTS, "num_dense_layers": 1}),
    "falcon-h1": ("falcon_h1", {**_LAYERS, **_MAMBA, "mamba_d_ssm": 64}),
    "mamba2": ("mamba2", {**_BARE, **_MAMBA2, "expand": 2}),
    "bamba": ("bamba", {**_LAYERS, **_MAMBA, "attn_layer_indices": [1]}),
    "granite-hybrid": (
        "granitemoehybrid",
        {**_LAYERS, **_LINEAR, **_MAMBA, "shared_intermediate_size": 32, "num_local_experts": 4},
    ),
    "zamba2": ("zamba2", {**_LAYERS, **_ZAMBA2}),
    "nemotron-h": (
        "nemotron_h",
        {name: value for name, value in _LAYERS.items() if name != "num_hidden_layers"} | _NEMOTRON,
    ),
    "zaya": ("zaya", _LAYERS),
}
# Mamba 1's scan takes no initial state: several tokens at once start from an empty state.
FORGETFUL: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {**_BARE, "state_size": 8}),
    "falcon-mamba": ("falcon_mamba", {**_BARE, "state_size": 8}),
    "jamba": ("jamba", {**_LAYERS, **_JAMBA, "use_mamba_kernels": False}),
}
# States that are not stored in transformers' own cache.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "minimax": (
        "minimax",
        {**_LAYERS, **_LINEAR, "head_dim": 8, "num_local_experts": 4, "block_size": 4},
    ),
    "recurrent-gemma": (
        "recurrent_gemma",
        {
            **_LAYERS,
            "lru_width": 32,
            "attention_window_size": 4,
            "block_types": ["recurrent", "attention"],
        },
    ),
    "rwkv": ("rwkv", {**_BARE, "attention_hidden_size": 32, "intermediate_size": 64}),
}
HYBRIDS = CONTINUED | FORGETFUL | REFUSED


def hybrid_model(family: str, *, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A model of a family, with weights large enough that every layer affects the logits.

    Args:
        family: a name in `HYBRIDS`.
        seed: seed of the weights.
        **options: options of the model's constructor (`attn_implementation`, `dtype`).
    """
    kind, settings = HYBRIDS[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, **settings)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(5.0)
    return model.eval()
