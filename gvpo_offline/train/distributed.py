"""transformers' Trainer as far as shards and ranks go: what accelerate leaves undone for FSDP2."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, OffloadPolicy
from transformers import Trainer, TrainingArguments

from gvpo_offline.errors import ConfigError
from gvpo_offline.train.config import GVPOConfig

logger = logging.getLogger(__name__)


class ShardedTrainer(Trainer):
    """A Trainer that shards wherever it is asked to, and then saves and sums as if it did not."""

    args: GVPOConfig

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers; then see that what was asked for is what will run."""
        super().create_accelerator_and_postprocess()
        n_groups, n_ranks = self.args.groups_per_step, self.args.world_size
        if n_groups < n_ranks and self.args.process_index == 0:
            logger.warning(
                "%d of %d ranks idle: %d groups a step", n_ranks - n_groups, n_ranks, n_groups
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
        """Whether a rank holds a part of the weights only, so that ranks must work in lockstep."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def check_can_evaluate(self) -> None:
        """Raise ConfigError where the model will be cut into shards and is not yet."""
        if self.is_fsdp_enabled and not isinstance(self.model, FSDPModule):
            raise ConfigError(
                "a model in shards is evaluated from the first step of its training on",
                received="evaluate before train",
                remedy="evaluate in a run without FSDP2, or with `gvpo-offline evaluate`",
            )

    def no_gradient_sync(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """A context in which a backward pass exchanges no gradients with other ranks.

        Not with FSDP2: it would keep every gradient whole on every rank meanwhile, which is the
        memory that sharding is there to save.
        """
        if self.is_fsdp_enabled:
            return contextlib.nullcontext()
        quiet: contextlib.AbstractContextManager[None] = self.accelerator.no_sync(model)
        return quiet

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers; with FSDP2 the whole weights, however checkpoints keep their state."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        weights = self.accelerator.get_state_dict(self.model)
        _share_tied_weights(weights, self.model)
        self._save(output_dir or self.args.output_dir, state_dict=weights)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


def _share_tied_weights(weights: dict[str, Any], model: nn.Module) -> None:
    """Let names of one parameter share one tensor again, so that it is saved once."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if name in weights and first in weights:
            weights[name] = weights[first]


def _shard_on_cpu(accelerator: Accelerator, args: TrainingArguments) -> bool:
    """Shard over CPU processes too, which accelerate by itself turns into DDP without a word."""
    if args.fsdp_plugin_args is not None:
        plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    elif os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        plugin = FullyShardedDataParallelPlugin()
    else:
        return False
    if torch.accelerator.is_available():
        raise ConfigError(
            "processes on the CPU share a model out where no GPU is to be seen",
            received="use_cpu with FSDP2 beside a GPU",
            remedy="set CUDA_VISIBLE_DEVICES to nothing, or leave use_cpu out",
        )
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    plugin.cpu_offload = OffloadPolicy()  # all is there already
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    return True


def _use_model_checkpointing(plugin: Any, args: TrainingArguments) -> None:
    """Recompute layers by the model's own means, which the start-up probe knows of.

    The wrapper that accelerate would put around each layer also changes the names under which PEFT
    looks for an adapter's weights: what it then saves is empty.
    """
    if plugin.activation_checkpointing_offload:
        raise ConfigError(
            "what is kept of layers that are recomputed goes to host memory by the run's settings",
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
            remedy="set fsdp_version: 2 in accelerate's file, or version: 2 in fsdp_config",
        )
    if plugin.cpu_ram_efficient_loading:
        raise ConfigError(
            "every rank holds the policy's weights until they are cut into shards",
            received="cpu_ram_efficient_loading, which leaves them on the first rank alone",
            remedy="set fsdp_cpu_ram_efficient_loading: false in accelerate's file",
        )
    policy = plugin.mixed_precision_policy
    if policy is not None:
        # accelerate's would hand out log-probs, and sum gradients, in half precision; and casting
        # inputs takes apart what a layout is handed over in.
        plugin.mixed_precision_policy = replace(
            policy, output_dtype=None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


@contextlib.contextmanager
def unsharded_loading(args: TrainingArguments) -> Iterator[None]:
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
