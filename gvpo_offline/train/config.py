"""The trainer's configuration: GVPO's settings beside those of transformers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from gvpo_offline.errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainingArguments

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields

from transformers import TrainingArguments

from gvpo_offline.errors import GVPOError
from gvpo_offline.train.objective import Objective
from gvpo_offline.train.settings import GVPOSettings

# Settings of transformers that have no meaning here, and what says it instead.
_REFUSED = {
    "per_device_train_batch_size": "set groups_per_step and max_tokens_per_micro_batch",
    "gradient_accumulation_steps": "set groups_per_step; micro-batches follow from "
    "max_tokens_per_micro_batch",
    "auto_find_batch_size": "lower max_tokens_per_micro_batch",
    "label_smoothing_factor": "leave it at 0",
    "neftune_noise_alpha": "leave it out: log-probs must not depend on chance",
    "train_sampling_strategy": "leave it out: the order is a function of the seed",
    "dataloader_drop_last": "leave it out: the last step takes what is left",
    "ignore_data_skip": "leave it out: skipping to a step reads nothing",
}


@contextlib.contextmanager
def settings_errors() -> Iterator[None]:
    """Turn transformers' complaints about a setting, or a logger's package, into ConfigError."""
    try:
        yield
    except GVPOError:
        raise
    except (ValueError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "install" not in str(error):
            raise
        raise ConfigError(
            "transformers accepts the training settings",
            received=" ".join(str(error).split()),
            remedy="correct the setting",
        ) from error


@dataclass
class GVPOConfig(GVPOSettings, TrainingArguments):
    """`TrainingArguments` with GVPO's settings; a batch is counted in groups.

    See `GVPOSettings` for the fields added here, and transformers for all others. Two defaults
    differ, `learning_rate` and `logging_steps`, and `fsdp` is a yes or no.

    Raises:
        ConfigError: a setting is out of range, or belongs to transformers' batching, which
            `groups_per_step` and `max_tokens_per_micro_batch` replace.
    """

    learning_rate: float = 1e-6
    """Peak learning rate; the published default."""
    logging_steps: float = 10
    """Optimizer steps between two lines of metrics."""
    fsdp: bool = False
    """Shard weights, gradients and the optimizer's state over ranks (FSDP2); `fsdp_config` says
    how. Under `accelerate launch`, accelerate's file says so instead."""

    def __post_init__(self) -> None:
        GVPOSettings.__post_init__(self)
        defaults = {field.name: field.default for field in fields(TrainingArguments)}
        for name, remedy in _REFUSED.items():
            if name in defaults and getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"{name} has no meaning here", received=getattr(self, name), remedy=remedy
                )
        with settings_errors():
            TrainingArguments.__post_init__(self)
        _check_precision(self)
        check_parallelism(self)
        # One process, one device: with several GPUs visible transformers would otherwise split
        # batches with DataParallel, which knows nothing of groups. Launch with torchrun instead.
        if self.n_gpu > 1:
            self._n_gpu = 1

    def objective(self) -> Objective:
        """What the run minimises."""
        return Objective(self.beta, self.loss_type, self.anchor, self.response_weights)

    def settings(self) -> dict[str, object]:
        """GVPO's own settings as a plain dictionary."""
        return {field.name: getattr(self, field.name) for field in fields(GVPOSettings)}


def _check_precision(args: GVPOConfig) -> None:
    """Refuse a mixed precision that the launcher sets and the run does not know of."""
    own = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    launched = getattr(args, "mixed_precision", own)
    if launched != own:
        raise ConfigError(
            "mixed precision is a setting of the run, since the reference must be scored with it",
            received=f"{launched} from accelerate, {own} from the run's settings",
            remedy=f"set {launched}: true for the run, or mixed_precision: 'no' in accelerate's "
            "file",
        )


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
