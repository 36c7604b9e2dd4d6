"""The number of positions that a model supports, from its configuration. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Names of the number of positions in configurations of transformers, in the order of precedence.
_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")
# Types whose position embeddings start at the padding id plus one, as in fairseq.
_OFFSET_TYPES = ("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert")
# Types of rotary embeddings that support the original number of positions times their factor.
_STRETCHED = ("linear", "dynamic", "yarn", "longrope", "llama3")


def context_length(config: Any) -> int | None:
    """The most tokens that a model can read.

    With learned positions this is the size of their table. With rotary positions it is the number
    that the model was made for, `max_position_embeddings`; with one of transformers' types of RoPE
    scaling (linear, dynamic, yarn, longrope, llama3) it is `original_max_position_embeddings` times
    the factor, if that is more, where the original number defaults to `max_position_embeddings`.
    A model whose kinds of layers have different rotary embeddings supports what all of them do.

    Args:
        config: the configuration of a transformers model; None if the model has none.

    Returns:
        The number of tokens; None for models without a limit: those with ALiBi, and those without
        positions, such as Mamba.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if _has_alibi(config):
        return None
    found = next((value for name in _NAMES if (value := getattr(config, name, None))), None)
    if not isinstance(found, int):
        return None
    if getattr(config, "model_type", None) in _OFFSET_TYPES:
        return found - int(getattr(config, "pad_token_id", None) or 0) - 1
    return min(_stretched(found, rope) for rope in _ropes(config))


def _has_alibi(config: Any) -> bool:
    attention = getattr(config, "attn_config", None)
    inner = attention if isinstance(attention, Mapping) else getattr(attention, "__dict__", {})
    return bool(getattr(config, "alibi", False) or inner.get("alibi", False))


def _ropes(config: Any) -> Iterable[Mapping[str, Any]]:
    """The settings of rotary embeddings: one mapping, or one for each kind of layer."""
    settings = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in settings.values() if isinstance(value, Mapping)]
    return nested or [settings]


def _stretched(positions: int, rope: Mapping[str, Any]) -> int:
    if rope.get("rope_type", rope.get("type")) not in _STRETCHED:
        return positions
    original = rope.get("original_max_position_embeddings") or positions
    return max(positions, int(original * float(rope.get("factor") or 1.0)))
