"""Settings of `gvpo-offline train`. Loads no torch, so that `--help` answers at once.

`GVPOConfig` in `train/config.py` adds `GVPOSettings` to `transformers.TrainingArguments`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gvpo_offline.errors import ConfigError
from gvpo_offline.settings import LossType, check_loss, positive


@dataclass
class GVPOSettings:
    """The settings that GVPO training adds to those of `transformers.TrainingArguments`."""

    beta: float = 0.1
    """Strength of the pull to the reference. Only with the reward's scale does it mean something:
    (max reward - min reward) / beta is the log-ratio gap, in nats, that the optimum asks for."""
    loss_type: LossType = "gvpo"
    """The objective. gvpo, rebel and listwise have its optimum; pmd_mean is gvpo with anchor 1; ipo
    and dpo compare a group's best response with its worst; rft and awr imitate; grpo and rloo are
    controls, without importance weights; topr needs the samplers' log-probs in the log."""
    response_weights: Literal["equal", "inverse_length"] = "equal"
    """Weights of a group's squares: equal, or by the inverse of each response's length in tokens.
    Neither moves the optimum. gvpo only."""
    anchor: float = 0.0
    """In [0, 1]: also pull the mean log-ratio of each group to zero. Steadies a small beta, and
    biases the optimum; 1 is the PMD-mean loss."""
    groups_per_step: int = 32
    """Groups of one optimizer step, over all ranks. A batch is counted in groups."""
    max_tokens_per_micro_batch: int = 16_384
    """Tokens of one forward and backward pass on one rank, as laid out; bounds memory, never the
    result. A larger group is computed in pieces, exactly; a prompt with one response must fit."""
    layout: Literal["auto", "shared", "packed", "continued", "padded"] = "auto"
    """How groups are laid out for the model. shared: each prompt once, in a row with its responses;
    continued: each prompt once, its state continued by rows of responses (hybrids); packed: one
    row, prompts repeated; padded: a row for each response. auto: the cheapest that is right for the
    model, which a probe finds at start-up; one that is not right is refused."""
    kept_logits_mb: int = 1024
    """Megabytes of numbers by token and vocabulary that may stay between a forward and its backward
    pass; what is beyond is computed twice. 0 saves the most memory."""
    log_entropy: bool = False
    """Also log the policy's mean entropy at the logged tokens, in nats. Costs some time."""
    eval_fraction: float = 0.0
    """Share of the groups held out for evaluation, chosen by a hash of the group id."""
    drop_equal_rewards: bool = False
    """Leave out groups whose responses all have one reward. They carry signal (their target is the
    reference), so this changes the objective."""
    shuffle_window: int = 4
    """Row groups whose groups are shuffled together; more mixes better and takes more memory."""
    read_ahead: int = 2
    """Steps that a thread reads while one is computed; 0: none. Of no effect with
    dataloader_num_workers, which are processes that read ahead."""
    disable_dropout: bool = True
    """Set every dropout to 0, as the objective requires."""
    reference_check: Literal["auto", "error", "off"] = "auto"
    """Before the first step: compare the policy's log-probs with the reference's. auto: when the
    policy's weights are the reference's; error: always; off: never."""
    verify: Literal["full", "size"] = "full"
    """Before the first step: check every file by SHA-256 (about a second per GB), or by its length
    only. Pages are verified by checksum on every read either way."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ConfigError("beta is a positive number", received=self.beta)
        weighted = self.response_weights != "equal"
        check_loss(self.loss_type, anchor=self.anchor, weighted=weighted)
        if not 0.0 <= self.anchor <= 1.0:
            raise ConfigError("anchor lies in [0, 1]", received=self.anchor)
        if not 0.0 <= self.eval_fraction < 1.0:
            raise ConfigError("eval_fraction lies in [0, 1)", received=self.eval_fraction)
        for name in ("groups_per_step", "max_tokens_per_micro_batch", "shuffle_window"):
            positive(name, getattr(self, name))
        for name in ("kept_logits_mb", "read_ahead"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is not negative", received=getattr(self, name))


@dataclass
class LoraSettings:
    """LoRA through PEFT; off unless `use_peft`."""

    use_peft: bool = False
    """Train a new LoRA adapter instead of the whole model."""
    lora_r: int = 16
    """Rank of the adapter."""
    lora_alpha: int = 32
    """Scale of the adapter, times its rank."""
    lora_dropout: float = 0.0
    """Dropout within the adapter; the objective requires 0."""
    lora_target_modules: list[str] | str | None = None
    """Modules that get an adapter, or all-linear; default: PEFT's choice for the model."""


@dataclass
class RunSettings:
    """How a training run begins."""

    resume_from_checkpoint: bool | str = False
    """true: continue from the newest whole checkpoint in output_dir; auto: likewise if there is
    one, else begin; or the folder of a checkpoint."""


@dataclass
class CommonTrainingSettings:
    """The settings of `transformers.TrainingArguments` that most runs touch.

    Shown by `train --help`; every other field of TrainingArguments is a flag and a YAML key too.
    """

    output_dir: str = "trainer_output"
    """Folder of the run: checkpoints, the trained model, the configuration."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    lr_scheduler_type: str = "linear"
    """Schedule of the learning rate: linear, cosine, constant_with_warmup …"""
    warmup_steps: float = 0
    """Steps, or (below 1) the share of the run, in which the learning rate rises to its peak."""
    num_train_epochs: float = 3.0
    """Times that each group is seen."""
    max_steps: int = -1
    """Optimizer steps; overrides num_train_epochs when positive."""
    max_grad_norm: float = 1.0
    """Clip the gradient's norm to this; 0: do not clip."""
    weight_decay: float = 0.0
    """Weight decay."""
    bf16: bool = False
    """Autocast matrix products to bfloat16. Score the reference with the same flag."""
    activation_checkpointing: bool | None = None
    """Trade compute for memory (before transformers 5.20: gradient_checkpointing)."""
    logging_steps: float = 10
    """Steps between two lines of metrics."""
    eval_strategy: str = "no"
    """When to evaluate on held-out groups: no, steps, epoch."""
    eval_steps: float | None = None
    """Steps between two evaluations."""
    save_strategy: str = "steps"
    """When to save a checkpoint: no, steps, epoch, best."""
    save_steps: float = 500
    """Steps between two checkpoints."""
    save_total_limit: int | None = None
    """Checkpoints to keep; the oldest go first."""
    report_to: str | list[str] = "none"
    """Loggers: tensorboard, wandb, mlflow …"""
    seed: int = 42
    """Decides the order of the groups, and whatever chance there is besides."""
    use_cpu: bool = False
    """Stay on the CPU where there is a GPU."""
