"""Methods of transformers' Trainer that GVPO training does not call.

A subclass that overrides one of them would train as if it had not, so it is refused when the
trainer is made. Every other method that transformers documents as one to override is called:
`training_step`, `get_train_dataloader`, `get_batch_samples`, `create_optimizer`,
`create_scheduler`, `get_decay_parameter_names`, `floating_point_ops`, `log`, `evaluate`, `predict`,
`save_model`.
"""

from __future__ import annotations

from transformers import Trainer

from gvpo_offline.errors import ConfigError

_EVALUATION = "override evaluate or predict"
_INPUTS = "override get_train_dataloader or training_step: a batch is a StepShare of groups"
# The methods, and what to override or set instead.
NEVER_CALLED = {
    "compute_loss": "set loss_type, or override training_step",
    "compute_loss_context_manager": "set bf16 or fp16, or override training_step",
    "autocast_smart_context_manager": "set bf16 or fp16, or override training_step",
    "create_optimizer_and_scheduler": "override create_optimizer or create_scheduler",
    "evaluation_loop": _EVALUATION,
    "prediction_step": _EVALUATION,
    "get_eval_dataloader": _EVALUATION,
    "get_test_dataloader": _EVALUATION,
    "_get_eval_sampler": _EVALUATION,
    "_get_train_sampler": "set seed or shuffle_window, which determine the order of groups",
    "_get_dataloader": _INPUTS,
    "_get_num_items_in_batch": _INPUTS,
    "_prepare_input": _INPUTS,
    "_prepare_inputs": _INPUTS,
    "_remove_unused_columns": _INPUTS,
    "_get_collator_with_removed_columns": _INPUTS,
    "_set_signature_columns_if_needed": _INPUTS,
    "call_model_init": "pass the model that is to be trained",
    "hyperparameter_search": "run `gvpo-offline tune`",
}


def check_hooks(trainer: Trainer) -> None:
    """Raise ConfigError if a class or the object itself overrides a method that is never called.

    Overrides by transformers and by this package are allowed.
    """
    for name, remedy in NEVER_CALLED.items():
        owner = "the trainer itself" if name in vars(trainer) else _overriding(type(trainer), name)
        if owner:
            raise ConfigError(
                f"GVPO training does not call {name}",
                received=f"one defined by {owner}",
                remedy=remedy,
            )


def _overriding(kind: type, name: str) -> str:
    """The class that defines the method, if it belongs to the user; else an empty string."""
    defining = next((base for base in kind.__mro__ if name in vars(base)), None)
    if defining is None or defining.__module__.split(".")[0] in ("transformers", "gvpo_offline"):
        return ""
    return f"class {defining.__qualname__}"
