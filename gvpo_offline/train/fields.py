"""Which fields of `transformers.TrainingArguments` a run honours, and which it refuses.

GVPO training replaces some parts of transformers' Trainer: its batches, its data loaders, its loss
and its evaluation loop. A field that only such a part would read is refused, because it would
otherwise have no effect. Every field is in one of the two tables; a test compares them with the
installed transformers.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Any

from gvpo_offline.errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainingArguments

# The fields that are honoured, by what reads them.
HONOURED = {
    "the run": "output_dir num_train_epochs max_steps seed data_seed resume_from_checkpoint "
    "full_determinism use_cpu include_num_input_tokens_seen skip_memory_metrics debug do_eval "
    "use_cache torch_empty_cache_steps",
    "the optimizer and its schedule": "learning_rate lr_scheduler_type lr_scheduler_kwargs "
    "warmup_steps optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 "
    "adam_epsilon max_grad_norm",
    "the model's forward pass": "bf16 fp16 tf32 activation_checkpointing "
    "activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs "
    "torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config",
    "logging": "logging_strategy logging_steps logging_first_step log_on_each_node log_level "
    "log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id "
    "trackio_static_space_id",
    "evaluation": "eval_strategy eval_steps eval_delay eval_on_start metric_for_best_model "
    "greater_is_better load_best_model_at_end",
    "checkpoints": "save_strategy save_steps save_total_limit save_only_model save_on_each_node "
    "restore_callback_states_from_checkpoint",
    "the hub": "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push "
    "hub_revision",
    "the loader": "dataloader_num_workers dataloader_prefetch_factor "
    "dataloader_persistent_workers dataloader_multiprocessing_context dataloader_pin_memory",
    "distribution": "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
    "ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed parallelism_config "
    "accelerator_config",
    # A launcher passes local_rank, and scripts pass do_train. Log-probs that are not finite end a
    # run with an error, so that there is nothing to filter.
    "nothing, as every value gives the same run": "local_rank do_train logging_nan_inf_filter",
}

# The fields that are refused unless they have their default, and what to do instead.
REFUSED = {
    "per_device_train_batch_size": "set groups_per_step and max_tokens_per_micro_batch",
    "gradient_accumulation_steps": "set groups_per_step; micro-batches follow from "
    "max_tokens_per_micro_batch",
    "auto_find_batch_size": "lower max_tokens_per_micro_batch",
    "label_smoothing_factor": "leave it at 0",
    "neftune_noise_alpha": "leave it out: log-probs must be deterministic",
    "train_sampling_strategy": "leave it out: the seed determines the order",
    "dataloader_drop_last": "leave it out: the last step has the remaining groups",
    "ignore_data_skip": "leave it out: skipping to a step reads nothing",
    "dataloader_in_order": "leave it out: the seed determines the order",
    "length_column_name": "leave it out: micro-batches follow from max_tokens_per_micro_batch",
    "remove_unused_columns": "leave it out: the columns of a group are read by name",
    "label_names": "leave it out: the loss takes rewards and log-probs, not labels",
    "average_tokens_across_devices": "leave it out: the loss is a mean over groups, on any number "
    "of ranks",
    "per_device_eval_batch_size": "set max_tokens_per_micro_batch, which evaluation uses too",
    "bf16_full_eval": "set bf16: evaluation has the precision of training, or its metrics would "
    "not compare with the reference's log-probs",
    "fp16_full_eval": "set fp16: evaluation has the precision of training, or its metrics would "
    "not compare with the reference's log-probs",
    "prediction_loss_only": "leave it out: evaluation gives metrics only, and `predict` gives the "
    "log-ratios",
    "eval_do_concat_batches": "leave it out: evaluation keeps sums over groups, not predictions",
    "eval_use_gather_object": "leave it out: evaluation keeps sums over groups, not predictions",
    "eval_accumulation_steps": "leave it out: evaluation keeps sums over groups, not predictions",
    "include_for_metrics": "leave it out: override `evaluate` to add metrics",
    "batch_eval_metrics": "leave it out: override `evaluate` to add metrics",
    "do_predict": "call trainer.predict, or run `gvpo-offline evaluate`",
    "enable_jit_checkpoint": "leave it out: stop_signals (SIGTERM and SIGUSR1) save a complete "
    "checkpoint at the end of the step, on all ranks; that of transformers would have no seal",
}

# Parts of accelerator_config that only accelerate's data loader and accumulation would read.
_LOADER_CONFIG = (
    "split_batches",
    "dispatch_batches",
    "even_batches",
    "use_seedable_sampler",
    "non_blocking",
    "data_seed",
    "gradient_accumulation_kwargs",
)


def check_fields(args: TrainingArguments, arguments: type) -> None:
    """Raise ConfigError if a refused field does not have its default.

    Args:
        args: the settings, before transformers has derived others from them.
        arguments: `transformers.TrainingArguments`, whose defaults count.
    """
    for field in fields(arguments):
        value = getattr(args, field.name)
        if field.name in REFUSED and value != _default(field):
            raise ConfigError(
                f"{field.name} is not used in GVPO training",
                received=value,
                remedy=REFUSED[field.name],
            )
    if args.do_eval and str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
        raise ConfigError(
            "eval_strategy says when a run evaluates",
            received="do_eval with eval_strategy no",
            remedy="set eval_strategy to steps or epoch, or leave do_eval out",
        )


def check_derived_fields(args: TrainingArguments) -> None:
    """Raise ConfigError for combinations of fields in which one would have no effect.

    Args:
        args: the settings, after transformers has derived others from them.
    """
    if args.max_steps == 0 or args.max_steps < -1:
        raise ConfigError(
            "max_steps is a positive number of steps, or -1: num_train_epochs counts",
            received=args.max_steps,
            remedy="set it to 1 or more, or leave it out; to measure a policy without training, "
            "run gvpo-offline evaluate",
        )
    evaluates = args.eval_strategy.value != "no"
    best = args.save_strategy.value == "best"
    if not evaluates and (best or args.metric_for_best_model is not None):
        raise ConfigError(
            "the best checkpoint is found by evaluation",
            received=f"eval_strategy no, save_strategy {args.save_strategy.value}, "
            f"metric_for_best_model {args.metric_for_best_model}",
            remedy="set eval_strategy to steps or epoch, or leave metric_for_best_model out and "
            "set another save_strategy",
        )
    _check_accelerator_config(args.accelerator_config)
    if args.use_liger_kernel:
        _check_liger()


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _check_accelerator_config(config: Any) -> None:
    default = type(config)()
    for name in _LOADER_CONFIG:
        value = getattr(config, name, None)
        if value != getattr(default, name, None):
            raise ConfigError(
                "accelerate neither loads nor accumulates the batches of GVPO training",
                received=f"accelerator_config with {name}: {value}",
                remedy="leave it out",
            )


def _check_liger() -> None:
    from transformers.utils import is_liger_kernel_available

    if not is_liger_kernel_available():
        raise ConfigError(
            "use_liger_kernel needs the package liger-kernel",
            received="no such package, or a version that transformers does not accept",
            remedy="pip install liger-kernel, or leave use_liger_kernel out",
        )
