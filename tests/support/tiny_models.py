"""Models with a few thousand random weights, one for each way of computing logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 100
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LAYERS = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_SPECIAL,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_GEMMA = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
_GEMMA |= {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}
_GRANITE = {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}


def _plain(config: dict[str, Any], *left_out: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in left_out}


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_LAYERS, head_dim=8)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LAYERS, attention_dropout=0.5)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, **_GPT2, **_SPECIAL)),
    # Eager, the default of newer versions, because other implementations ignore soft-capping.
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_LAYERS, **_GEMMA, attn_implementation="eager")
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**_LAYERS, **_GEMMA, layer_types=["sliding_attention", "full_attention"])
    ),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**_LAYERS, **_GRANITE)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**_plain(_LAYERS, "num_key_value_heads"), attention_dropout=0.5)
    ),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(
            **_plain(_LAYERS, "num_key_value_heads", "intermediate_size"),
            attention_dropout=0.5,
            hidden_dropout=0.5,
        )
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            **_plain(_LAYERS, "num_key_value_heads", "intermediate_size"),
            ffn_dim=64,
            word_embed_proj_dim=32,
            dropout=0.5,
            layerdrop=0.5,
        )
    ),
}

_SLIDING: dict[str, Any] = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
_LATENT |= {"v_head_dim": 8, "num_key_value_heads": 4, "first_k_dense_replace": 1}
_LATENT |= {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
_CHUNKED = {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 6}
_CHUNKED |= {"no_rope_layers": [1, 0], "intermediate_size_mlp": 32, "num_local_experts": 2}

# Other kinds of attention: a model type of transformers, and its configuration.
OTHER_ATTENTION: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", _LAYERS),
    "qwen2-window": (
        "qwen2",
        {**_LAYERS, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3-moe": ("qwen3_moe", {**_LAYERS, **_EXPERTS, "head_dim": 8, "num_experts": 4}),
    "olmo2": ("olmo2", _LAYERS),
    "olmo3": ("olmo3", {**_LAYERS, **_SLIDING}),
    "phi3": ("phi3", _LAYERS),
    "smollm3": ("smollm3", _LAYERS),
    "glm4": ("glm4", {**_LAYERS, "head_dim": 8}),
    "mistral": ("mistral", {**_LAYERS, "sliding_window": None}),
    "mistral-window": ("mistral", {**_LAYERS, "sliding_window": 5}),
    "mixtral": ("mixtral", {**_LAYERS, "num_local_experts": 4, "sliding_window": None}),
    "cohere": ("cohere", _LAYERS),
    "cohere2": ("cohere2", {**_LAYERS, **_SLIDING}),
    "gpt-oss": (
        "gpt_oss",
        {**_LAYERS, **_SLIDING, **_EXPERTS, "head_dim": 8, "num_local_experts": 4},
    ),
    "deepseek-v3": ("deepseek_v3", {**_LAYERS, **_EXPERTS, **_LATENT}),
    "llama4": ("llama4_text", {**_LAYERS, **_CHUNKED, "head_dim": 8}),
}
# Positions as a bias on the scores (ALiBi); attention is not looked up by name.
ALIBI: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": (
        "mpt",
        {"vocab_size": VOCAB_SIZE, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    ),
}


def _built(family: str) -> PreTrainedModel:
    if family in FAMILIES:
        return FAMILIES[family]()
    kind, settings = (OTHER_ATTENTION | ALIBI)[family]
    config = AutoConfig.for_model(kind, **settings)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of a family, with weights large enough that every layer affects the logits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _built(family)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(5.0)
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model.eval()
