"""The compute engine of a training run, chosen by the probe and the same on every rank."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gvpo_offline.compute.attention import kernels
from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.kept_products import keep_products
from gvpo_offline.compute.probe import Choice, choose_path, engine_for
from gvpo_offline.errors import ConfigError
from gvpo_offline.train.config import GVPOConfig

logger = logging.getLogger(__name__)


def training_engine(
    model: nn.Module, args: GVPOConfig, on_entropy: Callable[[Tensor], None], *, sharded: bool
) -> Engine:
    """Probe the policy, log the chosen layout and the reasons, and return the engine.

    Args:
        model: the policy, not yet wrapped for distributed training or mixed precision.
        args: the training settings.
        on_entropy: called with the entropies of each forward pass if `args.log_entropy`.
        sharded: whether each rank will hold only a part of the weights.

    Raises:
        ConfigError: no layout computes the model correctly, or the requested one does not.
    """
    training = model.training
    _checkpoint_activations(model, args)
    try:
        # With dropout, two forward passes differ, so layouts cannot be compared.
        choice = _choice(model.train(args.disable_dropout), args, sharded)
    finally:
        model.train(training)
    if args.process_index == 0:
        logger.info("log-probs: %s", choice.describe())
    engine = engine_for(
        model,
        choice,
        max_tokens=args.max_tokens_per_micro_batch,
        kept_bytes=args.kept_logits_mb << 20,
    )
    return replace(engine, on_entropy=on_entropy if args.log_entropy else None)


def _choice(model: nn.Module, args: GVPOConfig, sharded: bool) -> Choice:
    layout = args.layout
    if layout == "auto" and (args.torch_compile or not args.disable_dropout):
        why = "torch_compile needs few input shapes" if args.torch_compile else "dropout is on"
        logger.info("layout padded: %s", why)
        layout = "padded"
    choice = choose_path(model, layout=layout)
    path = choice.path
    if path.layout == "shared" and next(model.parameters()).device.type != args.device.type:
        # Sharded models are probed on the device that they were loaded on, and moved later.
        path = replace(path, attention=kernels(args.device)[0])
    choice = replace(choice, path=path, prompt_once=choice.prompt_once and not sharded)
    if args.world_size > 1:
        box = [choice]
        broadcast_object_list(box)
        choice = box[0]
    return choice


def _checkpoint_activations(model: nn.Module, args: GVPOConfig) -> None:
    """Enable activation checkpointing before the probe, as transformers will before training."""
    newer = getattr(args, "activation_checkpointing", None)
    if not (newer or getattr(args, "gradient_checkpointing", None)):
        if args.keep_products:
            raise ConfigError(
                "keep_products is for runs with activation checkpointing",
                received="keep_products without it",
                remedy="set activation_checkpointing: true, or remove keep_products",
            )
        return
    name = "activation_checkpointing" if newer is not None else "gradient_checkpointing"
    enable = getattr(model, f"{name}_enable", None)
    if enable is not None:
        options = dict(getattr(args, f"{name}_kwargs", None) or {})
        for own in ("every_n_layers", "offload"):  # set later by the trainer
            options.pop(own, None)
        enable(**{f"{name}_kwargs": options or None})
        if args.keep_products:
            keep_products(model)


class KeepProductsCallback(TrainerCallback):
    """Applies `keep_products` again, as transformers enables checkpointing anew for training."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Change the model's checkpointing if the run says so."""
        if model is not None and getattr(args, "keep_products", False):
            keep_products(model)
