"""Names that users of TRL and verl know, and what takes their place here.

`TRAINER_NAMES` are arguments of trainers, `CONFIG_NAMES` are settings. The Python API and the
command line answer with them where a name is not theirs. Loads no torch.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from gvpo_offline.errors import ConfigError

Kind = TypeVar("Kind", bound=type)
PAGE = "docs/start/from-trl.md"

_REFERENCE = (
    "the log-probs of the reference are part of the dataset: `gvpo-offline reference` computes "
    "them once, with model_name_or_path set to the reference model"
)
_REWARDS = (
    "rewards are part of the dataset: `gvpo-offline reward` computes them, with kind function for "
    "a reward function in TRL's signature, or `gvpo-offline import` reads them from a log"
)
_SAMPLING = "responses are sampled before training: `gvpo-offline sample`"
_METRICS = (
    "evaluate and predict compute the metrics of held-out groups; override evaluate in a subclass "
    "to add others"
)
_PROMPTS = (
    "prompts are rendered and tokenised before training, by `gvpo-offline import` or "
    "`gvpo-offline sample`"
)
_LENGTHS = (
    "no response is cut in training: max_length and overlong of `gvpo-offline import` say what "
    "happens to long ones, and max_new_tokens of `gvpo-offline sample` limits new ones"
)
_LAYOUT = "the layout of the model's input is chosen by layout; tokens are never padded into a loss"
_RATIOS = "there is no ratio to the policy that sampled: responses may come from anywhere"

# Arguments of TRL's and transformers' trainers that `GVPOTrainer` does not have.
TRAINER_NAMES = {
    "tokenizer": "it is called processing_class",
    "ref_model": _REFERENCE,
    "reward_funcs": _REWARDS,
    "reward_model": _REWARDS,
    "reward_processing_classes": _REWARDS,
    "judge": _REWARDS,
    "compute_metrics": _METRICS,
    "preprocess_logits_for_metrics": _METRICS,
    "compute_loss_func": "the loss is chosen by loss_type of GVPOConfig",
    "data_collator": "the trainer lays groups out itself; leave it out",
    "model_init": "pass the model, or its folder or hub name, as model",
    "optimizer_cls_and_kwargs": "set optim and optim_args of GVPOConfig, or pass optimizers",
    "formatting_func": _PROMPTS,
    "rollout_func": _SAMPLING,
    "environment_factory": _SAMPLING,
    "tools": _SAMPLING,
    "dataset": "it is called train_dataset",
    "config": "it is called args",
}

# Settings of TRL and verl that mean a setting here: the names of that setting in our commands.
EQUIVALENTS = {
    "model": ("model_name_or_path",),
    "model_name": ("model_name_or_path",),
    "model_path": ("model_name_or_path",),
    "model_id": ("model_name_or_path",),
    "tokenizer": ("tokenizer_name_or_path",),
    "tokenizer_name": ("tokenizer_name_or_path",),
    "dataset_name": ("dataset", "inputs"),
    "dataset_path": ("dataset", "inputs"),
    "data_path": ("dataset", "inputs"),
    "dataset": ("inputs",),
    "messages": ("columns.prompt",),
    "completion": ("columns.response",),
    "completions": ("columns.response",),
    "input": ("inputs",),
    "output": ("output_dir", "output_file"),
    "lr": ("learning_rate",),
    "kl_coef": ("beta",),
    "kl_loss_coef": ("beta",),
    "epochs": ("num_train_epochs",),
    "total_epochs": ("num_train_epochs",),
    "batch_size": ("groups_per_step",),
    "train_batch_size": ("groups_per_step",),
    "per_device_train_batch_size": ("groups_per_step", "max_tokens_per_micro_batch"),
    "gradient_accumulation_steps": ("groups_per_step",),
    "micro_batch_size": ("max_tokens_per_micro_batch",),
    "per_device_eval_batch_size": ("max_tokens_per_micro_batch",),
    "torch_dtype": ("dtype",),
    "lora_rank": ("lora_r",),
    "target_modules": ("lora_target_modules",),
    "warmup_ratio": ("warmup_steps",),
    "gradient_checkpointing": ("activation_checkpointing",),
    "save_freq": ("save_steps",),
    "test_freq": ("eval_steps",),
    "max_seq_length": ("max_length",),
    "max_prompt_length": ("max_length",),
    "max_completion_length": ("max_length",),
    "train_files": ("dataset", "inputs"),
    "train_dataset": ("dataset",),
    "val_files": ("eval_dataset",),
    "dataset_revision": ("dataset_version",),
    "system": ("system_prompt",),
    "reward_funcs": ("scorers",),
    "verbose": ("show_progress",),
}

# Paths of verl's settings, and the last part of which they are equivalents.
VERL_PATHS = {
    "actor_rollout_ref.model.path": "model_path",
    "critic.model.path": "reward_model_path",
    "reward_model.model.path": "reward_model_path",
    "actor_rollout_ref.actor.optim.lr": "lr",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "batch_size",
    "actor_rollout_ref.rollout.n": "num_generations",
    "trainer.default_local_dir": "output",
}

# Settings of a sampler of `gvpo-offline sample`, by their names in TRL and verl.
SAMPLER_NAMES = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    "num_generations": "responses",
    "n": "responses",
    "max_new_tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "max_completion_length": "max_new_tokens",
    "max_response_length": "max_new_tokens",
    "responses": "responses",
}

# Settings of TRL and verl without an equivalent in training, and what there is instead.
CONFIG_NAMES = {
    **dict.fromkeys(
        (
            "max_length",
            "max_seq_length",
            "max_prompt_length",
            "max_completion_length",
            "max_response_length",
            "max_target_length",
            "truncation_mode",
            "mask_truncated_completions",
        ),
        _LENGTHS,
    ),
    **dict.fromkeys(
        (
            "num_generations",
            "num_iterations",
            "steps_per_generation",
            "generation_batch_size",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "max_new_tokens",
            "use_vllm",
            "vllm_mode",
            "vllm_gpu_memory_utilization",
            "generate_during_eval",
            "shuffle_dataset",
        ),
        _SAMPLING,
    ),
    **dict.fromkeys(
        (
            "ref_model",
            "ref_adapter_name",
            "model_adapter_name",
            "reference_free",
            "precompute_ref_log_probs",
            "precompute_ref_batch_size",
            "sync_ref_model",
            "ref_model_mixup_alpha",
            "ref_model_sync_steps",
            "reference_model",
        ),
        _REFERENCE,
    ),
    **dict.fromkeys(("reward_funcs", "reward_weights", "reward_model_path"), _REWARDS),
    "scale_rewards": "the loss centres rewards within each group; a scale belongs to the reward, "
    "or to beta",
    **dict.fromkeys(("epsilon", "epsilon_high", "delta", "cliprange", "clip_ratio"), _RATIOS),
    **dict.fromkeys(("importance_sampling_level", "vllm_importance_sampling_correction"), _RATIOS),
    **dict.fromkeys(
        ("packing", "padding_free", "padding_value", "label_pad_token_id", "pad_to_multiple_of"),
        _LAYOUT,
    ),
    **dict.fromkeys(
        ("dataset_text_field", "dataset_num_proc", "dataset_kwargs", "eos_token", "pad_token"),
        _PROMPTS,
    ),
    "model_init_kwargs": "pass a model that is loaded with them; the command line has dtype, "
    "attn_implementation and trust_remote_code",
    "kl_coef": "it is called beta",
    "lr": "it is called learning_rate",
    "batch_size": "set groups_per_step: the batch size is in groups",
    "warmup_ratio": "set warmup_steps: below 1 it is a share of the run",
    "f_divergence_type": "the penalty is the KL divergence; link: chi_squared adds chi-squared",
    "label_smoothing": "the loss takes rewards as they are; change the rewards instead",
    "rpo_alpha": "set imitation, whose numbers are others: it is of log-probs summed over tokens",
    "loss_weights": "set loss_type and imitation: a loss of squares with a term of imitation",
    "desirable_weight": "rewards say how much better a response is",
    "undesirable_weight": "rewards say how much better a response is",
    **dict.fromkeys(
        ("train_dataset", "eval_dataset", "processing_class", "peft_config", "callbacks"),
        "it is an argument of GVPOTrainer",
    ),
    "log_completions": "`gvpo-offline sample` with the trained policy shows completions",
}


def closest(name: str, known: Iterable[str], n: int = 1) -> list[str]:
    """The known names that `name` most resembles, best first; none if nothing is similar."""
    return difflib.get_close_matches(name.replace("-", "_"), sorted(known), n, cutoff=0.7)


def answers_unknown_arguments(
    names: Mapping[str, str], elsewhere: Mapping[str, Callable[..., Any]] | None = None
) -> Callable[[Kind], Kind]:
    """A class decorator: arguments that `__init__` does not have are answered with a ConfigError.

    The message says what takes the place of each argument, or which argument has a similar name.

    Args:
        names: what takes the place of an argument.
        elsewhere: what also takes arguments, by a clause that says so.
    """

    def decorate(kind: Kind) -> Kind:
        init = vars(kind)["__init__"]
        signature = inspect.signature(init)
        by_position = [
            name
            for name, parameter in signature.parameters.items()
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ]

        @functools.wraps(init)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            unknown = [name for name in kwargs if name not in signature.parameters]
            if unknown:
                raise _unknown(kind.__name__, unknown, names, signature, elsewhere or {})
            if len(args) >= len(by_position):  # which begins with self
                raise _too_many(kind.__name__, args, by_position[1:])
            init(self, *args, **kwargs)

        setattr(kind, "__init__", checked)  # noqa: B010 - mypy refuses the assignment
        return kind

    return decorate


def _too_many(owner: str, args: tuple[Any, ...], names: list[str]) -> ConfigError:
    further = ", ".join(type(value).__name__ for value in args[len(names) :])
    return ConfigError(
        f"{owner} takes {', '.join(names)} by position, and all other arguments by name",
        received=f"{len(args)} arguments by position, the further of type {further}",
        remedy=f"pass train_dataset=…, eval_dataset=…, processing_class=… by name; {PAGE} has a "
        "table of names",
    )


def _unknown(
    owner: str,
    unknown: list[str],
    names: Mapping[str, str],
    signature: inspect.Signature,
    elsewhere: Mapping[str, Callable[..., Any]],
) -> ConfigError:
    answers = []
    for name in unknown:
        others = [
            clause for clause, it in elsewhere.items() if name in inspect.signature(it).parameters
        ]
        similar = closest(name, signature.parameters)
        if name in names:
            answers.append(f"{name}: {names[name]}")
        elif others:
            answers.append(f"{name} is {others[0]}")
        elif similar:
            answers.append(f"did you mean {similar[0]} instead of {name}?")
        else:
            answers.append(f"leave {name} out")
    end = "" if answers[-1].endswith("?") else "."
    return ConfigError(
        f"{owner} has other arguments than TRL's and transformers' classes",
        received=", ".join(unknown),
        remedy="; ".join(answers) + f"{end} {PAGE} has a table of names",
    )
