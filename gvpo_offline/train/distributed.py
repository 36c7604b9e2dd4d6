"""A transformers Trainer with FSDP2: settings, checks and saving that accelerate does not cover."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, OffloadPolicy
from transformers import Trainer, TrainingArguments

from gvpo_offline.compute.widening import NARROW, widen, widens
from gvpo_offline.errors import ConfigError
from gvpo_offline.train.config import GVPOConfig
from gvpo_offline.train.gathering import gathered_weights
from gvpo_offline.train.saving import rescue_weights

logger = logging.getLogger(__name__)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ShardedTrainer(Trainer):
    """A Trainer that also shards over CPU processes, and saves whole weights if sharded."""

    args: GVPOConfig

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers; then set up and check sharding.

        Raises:
            ConfigError: the sharding settings are not supported.
        """
        super().create_accelerator_and_postprocess()
        n_groups, n_ranks = self.args.groups_per_step, self.args.world_size
        if n_groups < n_ranks and self.args.process_index == 0:
            logger.warning(
                "%d of %d ranks are idle, because a step has only %d groups",
                n_ranks - n_groups,
                n_ranks,
                n_groups,
            )
        if self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            self.is_fsdp_enabled = _shard_on_cpu(self.accelerator, self.args)
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            _check_fsdp(plugin)
            if plugin.activation_checkpointing:
                _use_model_checkpointing(plugin, self.args)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds only a part of the weights (FSDP2 or DeepSpeed).

        All ranks must then run the same number of forward and backward passes.
        """
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers, which shards the model; each rank then converts its shards to float32.

        accelerate would convert the whole model on every rank before it shards it.
        """
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(*args, **kwargs)
        with _no_conversion(self.accelerator):
            prepared = super()._prepare_for_training(*args, **kwargs)
        self._widen_shards()
        return prepared

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """As transformers, into shards of their final data type."""
        if self.is_fsdp_enabled:
            self._widen_shards()
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _widen_shards(self) -> None:
        """Convert shards to float32 where float32 is trained; see `compute.widening`."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        narrow = any(own.requires_grad and own.dtype in NARROW for own in model.parameters())
        if widens(model):
            widen(model)
        elif narrow and (self.args.bf16 or self.args.fp16):
            widen(model, trained_only=True)  # as accelerate does with mixed precision

    def check_can_evaluate(self) -> None:
        """Raise ConfigError if the model will be sharded with FSDP2 but is not sharded yet."""
        if self.is_fsdp_enabled and not isinstance(self.model, FSDPModule):
            raise ConfigError(
                "a model that FSDP2 shards can be evaluated only after training has started",
                received="evaluate before train",
                remedy="evaluate in a run without FSDP2, or with `gvpo-offline evaluate`",
            )

    def no_gradient_sync(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """A context in which a backward pass does not reduce gradients over ranks.

        With FSDP2 gradients are reduced all the same: without it, every rank would keep the whole
        unsharded gradient in memory.
        """
        if self.is_fsdp_enabled:
            return contextlib.nullcontext()
        quiet: contextlib.AbstractContextManager[None] = self.accelerator.no_sync(model)
        return quiet

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers; with FSDP2 the whole weights, also if checkpoints are sharded."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        folder = output_dir or self.args.output_dir
        with gathered_weights(self.model, Path(folder), keep=self.args.should_save) as weights:
            _share_tied_weights(weights, self.model)
            self._save(folder, state_dict=weights)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As transformers; if that fails for another reason than the disk, write the weights alone.

        Raises:
            ConfigError: the model could not be saved; says in which file the weights are.
        """
        try:
            super()._save(output_dir, state_dict)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise
            folder = Path(self.args.output_dir) / f"weights-{self.state.global_step}"
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            saved = (
                rescue_weights(model, state_dict, folder, error) if self.args.should_save else None
            )
            if saved is None:
                raise
            raise saved from error


def _share_tied_weights(weights: dict[str, Any], model: nn.Module) -> None:
    """Make all names of a tied parameter refer to one tensor, so that it is saved once."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if name in weights and first in weights:
            weights[name] = weights[first]


def _shard_on_cpu(accelerator: Accelerator, args: TrainingArguments) -> bool:
    """Enable FSDP2 for CPU processes, for which accelerate would silently use DDP instead.

    Returns:
        Whether FSDP2 was requested.

    Raises:
        ConfigError: it was requested, and a GPU is visible.
    """
    if not wants_shards(args):
        return False
    plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
    if torch.accelerator.is_available():
        raise ConfigError(
            "FSDP2 shards over CPU processes only if no GPU is visible",
            received="use_cpu with FSDP2 and a visible GPU",
            remedy="set CUDA_VISIBLE_DEVICES to an empty string, or leave use_cpu out",
        )
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    plugin.cpu_offload = OffloadPolicy()  # nothing to offload: all is on the CPU
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    return True


def wants_shards(args: TrainingArguments) -> bool:
    """Whether a run's settings or its launcher ask for FSDP2; before an Accelerator is made."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return args.fsdp_plugin_args is not None or launched


@contextlib.contextmanager
def _no_conversion(accelerator: Accelerator) -> Iterator[None]:
    """Within it, accelerate does not convert trained weights to float32 before it shards them.

    It does so where its mixed precision is not "no", which FSDP2's own policy does not depend on.
    """
    state = accelerator.state
    before = state._mixed_precision
    try:
        state._mixed_precision = "no"
        yield
    finally:
        state._mixed_precision = before


def _use_model_checkpointing(plugin: Any, args: TrainingArguments) -> None:
    """Use the model's own activation checkpointing instead of accelerate's.

    The start-up probe takes the model's own into account. accelerate wraps each layer, which
    changes the names of parameters, so that PEFT would save an empty adapter.
    """
    if plugin.activation_checkpointing_offload:
        raise ConfigError(
            "offloading of checkpointed activations is set in the run's settings",
            received="fsdp_activation_checkpointing_offload",
            remedy="set activation_checkpointing: true and "
            "activation_checkpointing_kwargs: {offload: true} for the run instead",
        )
    plugin.activation_checkpointing = False
    newer = hasattr(args, "activation_checkpointing")
    setattr(args, "activation_checkpointing" if newer else "gradient_checkpointing", True)


def _check_fsdp(plugin: Any) -> None:
    if plugin.fsdp_version != 2:
        raise ConfigError(
            "models are sharded with FSDP2",
            received=f"fsdp_version {plugin.fsdp_version}",
            remedy="set fsdp_version: 2 in accelerate's configuration file, or version: 2 in "
            "fsdp_config",
        )
    if plugin.cpu_ram_efficient_loading:
        raise ConfigError(
            "every rank loads the whole policy before it is sharded",
            received="cpu_ram_efficient_loading, which loads weights on the first rank only",
            remedy="set fsdp_cpu_ram_efficient_loading: false in accelerate's configuration file",
        )
    policy = plugin.mixed_precision_policy
    if policy is not None:
        # With accelerate's policy, log-probs would be returned and gradients reduced in half
        # precision, and casting the inputs would rebuild the containers that carry a layout.
        plugin.mixed_precision_policy = replace(
            policy, output_dtype=None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


@contextlib.contextmanager
def unsharded_loading(args: TrainingArguments) -> Iterator[None]:
    """A context in which every process loads whole models.

    Under ZeRO-3 transformers would load a sharded model, which can neither be probed nor score
    responses. DeepSpeed shards the model when training starts.
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
