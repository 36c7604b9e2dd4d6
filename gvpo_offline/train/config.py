"""`GVPOConfig`: the settings of GVPO added to `transformers.TrainingArguments`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from gvpo_offline.errors import ConfigError
from gvpo_offline.ranges import check_ranges

if TYPE_CHECKING:
    from transformers import TrainingArguments

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_xla_available

from gvpo_offline.errors import GVPOError
from gvpo_offline.sampled_eval.settings import SampledEvalSettings, check_sampled_settings
from gvpo_offline.train.fields import check_derived_fields, check_fields
from gvpo_offline.train.foreign import CONFIG_NAMES, PAGE, answers_unknown_arguments
from gvpo_offline.train.objective import Objective
from gvpo_offline.train.record.loggers import check_loggers
from gvpo_offline.train.settings import GVPOSettings


@contextlib.contextmanager
def settings_errors() -> Iterator[None]:
    """Turn transformers' errors about a setting or a missing logger package into ConfigError."""
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


@answers_unknown_arguments(CONFIG_NAMES)
@dataclass
class GVPOConfig(GVPOSettings, SampledEvalSettings, TrainingArguments):
    """`transformers.TrainingArguments` with the settings of GVPO. The batch size is in groups.

    `GVPOSettings` and `SampledEvalSettings` document the fields added here, and transformers all
    others. The defaults of
    `learning_rate` and `logging_steps` differ from those of transformers, and `fsdp` is a bool.

    Raises:
        ConfigError: a setting is out of range; or it is a batch setting of transformers, which
            `groups_per_step` and `max_tokens_per_micro_batch` replace.
    """

    learning_rate: float | None = None
    """Peak learning rate. Default: 1e-6 (the published one for GVPO) where the whole model is
    trained, 1e-4 where an adapter is; the trainer sets it in its copy of these settings."""
    logging_steps: float = 10
    """Optimizer steps between two log lines of metrics."""
    fsdp: bool = False
    """Shard weights, gradients and optimizer state over ranks with FSDP2, as set in `fsdp_config`.
    Under `accelerate launch`, set it in accelerate's configuration file instead."""

    def __post_init__(self) -> None:
        GVPOSettings.__post_init__(self)
        check_sampled_settings(self)
        check_fields(self, TrainingArguments)
        check_ranges(self)
        # transformers derives it; a copy with other settings must not keep it.
        do_eval: bool = vars(self)["do_eval"]
        use_cpu: bool = vars(self)["use_cpu"]
        self.use_cpu = use_cpu or _needs_use_cpu(self)
        with settings_errors():
            try:
                TrainingArguments.__post_init__(self)
            except (
                OSError,
                TypeError,
            ) as error:  # a file of settings, or its names
                raise ValueError(f"{type(error).__name__}: {error}") from error
        self.do_eval, self.use_cpu = do_eval, use_cpu
        check_derived_fields(self)
        check_loggers(self.report_to)
        _check_precision(self)
        check_parallelism(self)
        # One device per process: if several GPUs are visible, transformers would otherwise split
        # batches with DataParallel, which cannot split groups. Launch with torchrun instead.
        if self.n_gpu > 1:
            self._n_gpu = 1

    def objective(self) -> Objective:
        """The objective of the run; errors as `Objective.of`."""
        return Objective.of(self)

    def settings(self) -> dict[str, object]:
        """The fields of `GVPOSettings` as a plain dictionary."""
        return {field.name: getattr(self, field.name) for field in fields(GVPOSettings)}


def checked_config(args: Any) -> GVPOConfig:
    """The argument `args` of a trainer; default: a `GVPOConfig` with its defaults.

    Raises:
        ConfigError: it is something else, such as the configuration of a TRL trainer.
    """
    if args is None:
        return GVPOConfig()
    if not isinstance(args, GVPOConfig):
        raise ConfigError(
            "args is a GVPOConfig",
            received=f"a {type(args).__name__}",
            remedy="pass GVPOConfig(output_dir=…, beta=…, groups_per_step=…); it has the fields of "
            f"transformers.TrainingArguments. {PAGE} has a table of names",
        )
    return args


def _needs_use_cpu(args: GVPOConfig) -> bool:
    """Whether transformers refuses bf16 without use_cpu: there is no accelerator.

    It computes on the CPU there anyway, without bf16 by itself.
    """
    return args.bf16 and not torch.accelerator.is_available() and not is_torch_xla_available()


def _check_precision(args: GVPOConfig) -> None:
    """Raise ConfigError if the launcher sets a mixed precision that the run's settings do not."""
    own = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    launched = getattr(args, "mixed_precision", own)
    if launched != own:
        raise ConfigError(
            "mixed precision is set for the run, because the reference must be scored with it",
            received=f"{launched} from accelerate, {own} from the run's settings",
            remedy=f"set {launched}: true for the run, or mixed_precision: 'no' in accelerate's "
            "configuration file",
        )


_PARALLELISM = {
    "cp_size": "context parallelism",
    "sp_size": "sequence parallelism",
    "tp_size": "tensor parallelism",
}


def check_parallelism(args: TrainingArguments) -> None:
    """Raise ConfigError if context, sequence or tensor parallelism is requested.

    torch's context parallelism supports plain causal rows only, and only with its GPU kernels;
    Ulysses needs rows of equal length. The layouts here have shared prompts, tree attention and a
    head that scores selected positions. Also, each rank has its own groups, whereas the ranks that
    split one response would need the same groups.
    """
    for name, size in _parallel_sizes(args).items():
        if size > 1:
            raise ConfigError(
                "each rank computes whole responses with whole layers: "
                f"{_PARALLELISM[name]} is not supported",
                received=f"{name}: {size}",
                remedy="shard the weights instead (FSDP2 or ZeRO-3), set activation_checkpointing, "
                "and lower kept_logits_mb; docs/howto/adapters.md lists which lengths then fit",
            )


def _parallel_sizes(args: TrainingArguments) -> dict[str, int]:
    """The sizes set for accelerate or DeepSpeed, by their names in accelerate."""
    config: Any = getattr(args, "parallelism_config", None)
    if config is not None:
        return {name: int(getattr(config, name, None) or 1) for name in _PARALLELISM}
    launched = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true"
    prefix = "PARALLELISM_CONFIG_"
    sizes = {
        n: int(os.environ.get(prefix + n.upper(), "1")) if launched else 1 for n in _PARALLELISM
    }
    deepspeed = getattr(getattr(args, "hf_deepspeed_config", None), "config", {})
    tensor = deepspeed.get("tensor_parallel", {}).get("autotp_size", 1)
    sequence = deepspeed.get("sequence_parallel_size", 1)
    return {
        **sizes,
        "tp_size": max(sizes["tp_size"], tensor),
        "sp_size": max(sizes["sp_size"], sequence),
    }
