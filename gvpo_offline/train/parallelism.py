"""What distribution asks of a run before its model is loaded: that it is whole, and only cut where
a layout allows it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gvpo_offline.errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainingArguments

_CUTS = {
    "cp_size": "context parallelism",
    "sp_size": "sequence parallelism",
    "tp_size": "tensor parallelism",
}


def check_parallelism(args: TrainingArguments) -> None:
    """Raise ConfigError if a response, or a layer, is to be cut over several ranks.

    torch cuts plain causal rows only, and only for its GPU kernels; Ulysses takes whole rows of one
    length. A layout is neither: prompts are shared, attention over a tree is our own, and the head
    scores chosen rows. And every rank has groups of its own, where those that share a response
    would need the same.
    """
    for name, size in _asked(args).items():
        if size > 1:
            raise ConfigError(
                "each rank computes whole responses with whole layers: no "
                f"{_CUTS[name]} over groups that share their prompt",
                received=f"{name}: {size}",
                remedy="share the weights out instead (FSDP2 or ZeRO-3), set "
                "activation_checkpointing, and lower kept_logits_mb; docs/howto/adapters.md says "
                "how long a response then fits",
            )


def _asked(args: TrainingArguments) -> dict[str, int]:
    """The sizes that accelerate or DeepSpeed are told, by accelerate's names."""
    config: Any = getattr(args, "parallelism_config", None)
    if config is not None:
        return {name: int(getattr(config, name, None) or 1) for name in _CUTS}
    launched = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true"
    prefix = "PARALLELISM_CONFIG_"
    sizes = {n: int(os.environ.get(prefix + n.upper(), "1")) if launched else 1 for n in _CUTS}
    deepspeed = getattr(getattr(args, "hf_deepspeed_config", None), "config", {})
    tensor = deepspeed.get("tensor_parallel", {}).get("autotp_size", 1)
    sequence = deepspeed.get("sequence_parallel_size", 1)
    return {
        **sizes,
        "tp_size": max(sizes["tp_size"], tensor),
        "sp_size": max(sizes["sp_size"], sequence),
    }


@contextlib.contextmanager
def loaded_whole(args: TrainingArguments) -> Iterator[None]:
    """Models that are loaded meanwhile are whole in every process.

    Under ZeRO-3 transformers would load a model in shards, which cannot be probed, nor scored with;
    DeepSpeed cuts it when training begins.
    """
    plugin = getattr(args, "deepspeed_plugin", None)
    # From a DeepSpeed file, or from `accelerate launch`.
    config = getattr(args, "hf_deepspeed_config", None) or getattr(plugin, "dschf", None)
    if config is None:
        yield
        return
    from transformers.integrations.deepspeed import (
        set_hf_deepspeed_config,
        unset_hf_deepspeed_config,
    )

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)
