"""What distribution asks of a run: a model that is whole when it is probed, gradients exchanged once.

DDP, FSDP2 and DeepSpeed are accelerate's; these are the two places where they want to be told.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainingArguments


@contextlib.contextmanager
def loaded_whole(args: TrainingArguments) -> Iterator[None]:
    """Models that are loaded meanwhile are whole in every process.

    Under ZeRO-3 transformers would load a model in shards, which cannot be probed, nor scored with;
    DeepSpeed cuts it when training begins.
    """
    config = getattr(args, "hf_deepspeed_config", None)
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


@contextlib.contextmanager
def exchange(accelerator: Accelerator, model: nn.Module, *, last: bool) -> Iterator[None]:
    """A micro-batch's passes; gradients are exchanged with the last micro-batch of a step alone.

    DeepSpeed reduces gradients in shards as they fall, and takes its step inside the last backward
    pass: of which there must be one in the last micro-batch, as `plan_step` sees to.
    """
    accelerator.gradient_state._set_sync_gradients(last)
    with contextlib.nullcontext() if last else accelerator.no_sync(model):
        yield
