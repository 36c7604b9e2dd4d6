"""How the trainer computes log-probs: the probe's choice, the same on every rank."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from gvpo_offline.compute.attention import kernels
from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.probe import Choice, choose_path, engine_for
from gvpo_offline.train.config import GVPOConfig

logger = logging.getLogger(__name__)


def training_engine(
    model: nn.Module, args: GVPOConfig, on_entropy: Callable[[Tensor], None], *, sharded: bool
) -> Engine:
    """Probe a model that is about to be trained; logs the choice and its reasons.

    Args:
        model: the policy, not yet wrapped for distribution or mixed precision.
        args: the settings.
        on_entropy: where entropies go if they are to be logged.
        sharded: whether a rank will hold a part of the weights only.

    Raises:
        ConfigError: no layout is right for the model, or not the one that was asked for.
    """
    training = model.training
    _checkpoint_activations(model, args)
    try:
        # With dropout on, no two passes agree.
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
        why = "compiled models need rows of few shapes" if args.torch_compile else "dropout is on"
        logger.info("layout padded: %s", why)
        layout = "padded"
    choice = choose_path(model, layout=layout)
    path = choice.path
    if path.layout == "shared" and next(model.parameters()).device.type != args.device.type:
        # Sharded models are probed where they were loaded, and move later.
        path = replace(path, attention=kernels(args.device)[0])
    choice = replace(choice, path=path, prompt_once=choice.prompt_once and not sharded)
    if args.world_size > 1:
        box = [choice]
        broadcast_object_list(box)
        choice = box[0]
    return choice


def _checkpoint_activations(model: nn.Module, args: GVPOConfig) -> None:
    """As transformers does when training begins: what is probed is what will be computed."""
    newer = getattr(args, "activation_checkpointing", None)
    if not (newer or getattr(args, "gradient_checkpointing", None)):
        return
    name = "activation_checkpointing" if newer is not None else "gradient_checkpointing"
    enable = getattr(model, f"{name}_enable", None)
    if enable is not None:
        options = dict(getattr(args, f"{name}_kwargs", None) or {})
        for own in ("every_n_layers", "offload"):  # the trainer sets them again, with these
            options.pop(own, None)
        enable(**{f"{name}_kwargs": options or None})
