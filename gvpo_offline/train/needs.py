"""One line before training: the memory and the time that a run needs, computed from shapes."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gvpo_offline.compute.forward import causal_lm
from gvpo_offline.errors import ConfigError, GVPOError
from gvpo_offline.plan.cost import step_seconds
from gvpo_offline.plan.devices import Device, device_named
from gvpo_offline.plan.forecast import duration
from gvpo_offline.plan.memory import Sharding, StepBytes, TrainingShape, step_bytes
from gvpo_offline.plan.shapes import ModelShape, shape_of_config
from gvpo_offline.plan.workload import PlannedSteps, planned_steps
from gvpo_offline.stream.plan import GroupShape
from gvpo_offline.stream.view import DatasetView

if TYPE_CHECKING:
    from gvpo_offline.train.trainer import GVPOTrainer

logger = logging.getLogger(__name__)
SHARE = 0.45
# Lengths are read of as many groups, in as many row groups of each dataset.
_MOST_GROUPS, _MOST_ROW_GROUPS = 2_000, 32


def log_needs(trainer: GVPOTrainer) -> None:
    """Log the line on the main process, before training; nothing if the model's configuration does
    not state its sizes, or lengths cannot be read."""
    if not trainer.is_world_process_zero():
        return
    try:
        line, short = needs_line(trainer)
    except GVPOError as error:  # on one rank: training says on all of them what is wrong
        logger.debug("no forecast of memory and time: %s", error)
        return
    logger.info("this run: %s (computed from shapes)", line)
    if short:
        logger.warning(
            "this run may not fit into memory: gvpo-offline plan shows which settings do"
        )


def needs_line(trainer: GVPOTrainer) -> tuple[str, bool]:
    """The line, and whether the memory falls short.

    Raises:
        ConfigError: the model's configuration lacks a size; or a response exceeds the budget.
    """
    args: Any = trainer.args
    model = causal_lm(trainer.model)
    shape = shape_of_config(model.config.to_dict())
    how = _how(trainer, args)
    cost = trainer.engine.cost
    steps = planned_steps(
        _lengths(trainer.data.views, args.seed),
        shape,
        how,
        layout=cost.layout,
        groups_per_step=args.groups_per_step,
        max_tokens=cost.max_tokens,
        seed=args.seed,
    )
    memory = step_bytes(shape, how, tokens=steps.tokens, scored=steps.scored)
    device, available = _device(args.device)
    text = f"{memory.total / 1e9:.3g} GB of {available / 1e9:.3g}"
    return f"{text}, {_time(shape, how, steps, device, args)}", _short(memory, available)


def _short(memory: StepBytes, available: float) -> bool:
    return memory.total > available


def _time(
    shape: ModelShape, how: TrainingShape, steps: PlannedSteps, device: Device | None, args: Any
) -> str:
    if device is None:
        return f"{steps.work.total:.2g} operations a step"
    passes = round(steps.passes)
    seconds = step_seconds(shape, how, steps.work, device, share=SHARE, passes=passes).total
    return (
        f"{duration(seconds)} a step at {SHARE:g} of peak, {duration(seconds * args.max_steps)} "
        f"for {args.max_steps:,} steps"
    )


def _how(trainer: GVPOTrainer, args: Any) -> TrainingShape:
    weights = list(trainer.model.parameters())
    adapters = list(getattr(trainer.model, "peft_config", {}).values())
    frozen = bool(adapters) and any(not weight.requires_grad for weight in weights)
    return TrainingShape(
        weight_bytes=2 if weights[0].dtype in (torch.bfloat16, torch.float16) else 4,
        autocast=bool(args.bf16 or args.fp16),
        lora_r=int(getattr(adapters[0], "r", 16)) if frozen else 0,
        optim=str(getattr(args.optim, "value", args.optim)),
        ranks=args.world_size,
        sharding=_sharding(trainer, args),
        checkpointing=_recomputes(trainer, args),
        kept_logits=args.kept_logits_mb * 1e6,
        device="cpu" if args.device.type == "cpu" else "gpu",
    )


def _recomputes(trainer: GVPOTrainer, args: Any) -> bool:
    """Whether whole layers are computed again, by the settings of the run or of the model.

    With `keep_products` the forecast is that of a step that keeps all activations: its operations
    are the same, and its memory is an upper bound.
    """
    if args.keep_products:
        return False
    names = ("activation_checkpointing", "gradient_checkpointing")
    asked = any(bool(getattr(args, name, False)) for name in names)
    own = (getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
    return asked or any(own)


def _sharding(trainer: GVPOTrainer, args: Any) -> Sharding:
    if args.world_size == 1:
        return "none"
    if getattr(trainer, "is_fsdp_enabled", False):
        return "fsdp2"
    return "zero3" if trainer.is_sharded else "ddp"


def _device(device: torch.device) -> tuple[Device | None, float]:
    """The device of the table, and the bytes of memory that there are."""
    if device.type == "cuda":
        own: Any = torch.cuda.get_device_properties(device)
        found = device_named(own.name)
        memory = float(own.total_memory)
        return (None if found is None else replace(found, memory=memory)), memory
    return None, float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")


def _lengths(views: Sequence[DatasetView], seed: int) -> list[GroupShape]:
    """The lengths of some of the training groups, of every dataset alike."""
    found: list[GroupShape] = []
    for view in views:
        own: list[GroupShape] = []
        order = np.random.default_rng(seed).permutation(view.dataset.n_row_groups)
        for number in order.tolist()[:_MOST_ROW_GROUPS]:
            table, _ = view.summary_table(number)
            prompts = table.column("prompt_length").to_pylist()
            responses = table.column("response_lengths").to_pylist()
            own += [GroupShape(p, tuple(r)) for p, r in zip(prompts, responses, strict=True)]
            if len(own) >= _MOST_GROUPS // len(views):
                break
        found += own
    if not found:
        raise ConfigError("a forecast is of groups", received="none among those looked at")
    return found
