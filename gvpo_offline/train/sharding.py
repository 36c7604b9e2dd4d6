"""What has to be settled before a model is loaded: that it is whole, and that it can be cut."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainingArguments


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
