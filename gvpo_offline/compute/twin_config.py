"""Configurations of small models, made from that of a large one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

_VOCABULARY = 512
_HEADS_PER_KEY = 4
_WIDTH_WITHOUT_HEADS = 128
_EXPERTS = 8
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_INNER_WIDTHS = ("ffn_dim", "n_inner")


def text_of(config: Any) -> Any:
    """The part of a configuration that describes the language model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """A configuration of the same class with other values in its language part, not quantised.

    Args:
        config: the configuration; not changed.
        changes: values by the names that all transformers models share (`num_hidden_layers`);
            names that this model does not have are ignored.
    """
    text = text_of(config)
    names = dict(getattr(text, "attribute_map", {}))
    settings = text.to_dict()
    settings |= {
        names.get(name, name): value
        for name, value in changes.items()
        if names.get(name, name) in settings or name == "num_hidden_layers"
    }
    settings.pop("quantization_config", None)
    new = type(text).from_dict(settings)
    if text is config:
        return new
    outer = copy.deepcopy(config)
    for name, value in vars(config).items():
        if value is text:
            setattr(outer, name, new)
    if hasattr(outer, "quantization_config"):
        del outer.quantization_config
    return outer


def narrower(config: Any) -> Iterator[Any]:
    """Narrower configurations, the narrowest first, the given one last.

    Not all of them can be built: some models derive one width from another. The width of an
    attention head stays, because kernels depend on it.
    """
    text = text_of(config)
    vocabulary = _vocabulary(text)
    inner = _widths(text, 8) | _experts(text)
    heads = _heads(text)
    for changes in (vocabulary | inner | heads, vocabulary | inner, vocabulary):
        try:
            yield changed(config, changes)
        except Exception:  # refused by the class of the configuration
            continue
    yield config


def _vocabulary(text: Any) -> dict[str, Any]:
    size = int(getattr(text, "vocab_size", 0) or 0)
    if size <= _VOCABULARY:
        return {}
    # Special tokens are in the vocabulary, which none of the probe's responses needs.
    return {"vocab_size": _VOCABULARY, **dict.fromkeys(_SPECIAL)}


def _heads(text: Any) -> dict[str, Any]:
    """Fewer attention heads, and the width of the model in proportion."""
    width = int(getattr(text, "hidden_size", 0) or 0)
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    keys = int(getattr(text, "num_key_value_heads", 0) or heads)
    if not width:
        return {}
    if not heads or heads % keys or width % heads:
        return {"hidden_size": min(width, _WIDTH_WITHOUT_HEADS)}
    fewer_keys = min(keys, 2 if keys < heads else 4)
    fewer = fewer_keys * min(heads // keys, _HEADS_PER_KEY)
    found = {"num_attention_heads": fewer, "hidden_size": width // heads * fewer}
    if keys != heads or getattr(text, "num_key_value_heads", None):
        found["num_key_value_heads"] = fewer_keys
    return found | _widths(text, max(1, heads // fewer))


def _widths(text: Any, times: int) -> dict[str, Any]:
    """Widths of dense and expert layers, divided; multiples of 8."""
    return {
        name: max(8, value // times // 8 * 8)
        for name, value in text.to_dict().items()
        if isinstance(value, int)
        and value > 64
        and ("intermediate_size" in name or name in _INNER_WIDTHS)
    }


def _experts(text: Any) -> dict[str, Any]:
    taken = int(getattr(text, "num_experts_per_tok", 0) or 0)
    most = max(_EXPERTS, 2 * taken)
    counts = {name: getattr(text, name, None) for name in _EXPERT_COUNTS}
    return {name: most for name, value in counts.items() if isinstance(value, int) and value > most}
