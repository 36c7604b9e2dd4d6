"""Settings of `gvpo-offline train`. Loads no torch, so that `--help` is fast.

`GVPOConfig` in `train/config.py` adds `GVPOSettings` to `transformers.TrainingArguments`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from gvpo_offline.errors import ConfigError
from gvpo_offline.ranges import check_ranges
from gvpo_offline.settings import (
    LossType,
    check_imitation,
    check_loss,
    check_reference_sampler,
    checked_delta,
    positive,
)
from gvpo_offline.train.stopping import signal_numbers

# Peak learning rates of runs that set none. The first is the published one for GVPO, of full
# training. An adapter starts as zero and has far fewer weights, so that at this rate the policy
# would hardly move (docs/howto/adapters.md).
FULL_LEARNING_RATE = 1e-6
ADAPTER_LEARNING_RATE = 1e-4


@dataclass
class GVPOSettings:
    """The settings that GVPO training adds to those of `transformers.TrainingArguments`."""

    beta: float = 0.1
    """Strength of the KL regularisation towards the reference, in units of reward per nat. At the
    optimum, the log-ratios of a group's best and worst response differ by
    (max reward - min reward) / beta nats, so a good beta depends on the scale of the rewards."""
    loss_type: LossType = "gvpo"
    """The loss. gvpo, rebel and listwise have the same optimum. pmd_mean is gvpo with anchor 1. ipo
    and dpo compare the best response of a group with the worst. rft, sft and awr imitate good
    responses. grpo, rloo and asymre are controls, without importance weights. topr needs logged
    log-probs of the responses under their samplers. oapl and qrpo need responses of the reference
    (reference_sampler), or oapl the logged log-probs instead."""
    response_weights: Literal["equal", "inverse_length"] = "equal"
    """Weight of each response in the squared error of its group: equal, or the inverse of the
    response's length in tokens. Both have the same optimum. Only for loss_type gvpo."""
    anchor: float = 0.0
    """Weight, in [0, 1], of a penalty on the squared mean log-ratio of each group. Stabilises
    training at a small beta, but moves the optimum; 1 is the PMD-mean loss."""
    link: Literal["log", "chi_squared"] = "log"
    """What beta multiplies: log, the log-ratio l; or chi_squared, l + e^l, with which the optimum's
    probability of a good response grows in proportion to the reward and not exponentially
    (chi-squared preference optimisation). Only for losses of differences: gvpo, pmd_mean, rebel,
    ipo and dpo."""
    reference_sampler: str = ""
    """Name of the sampler that is the reference: that drew responses from the reference model at
    temperature 1, without truncation. qrpo and oapl estimate a prompt's value from them, and need
    at least one in each group. Without it, oapl weights all responses by their samplers' logged
    log-probs."""
    asymre_delta: float = -0.1
    """What loss_type asymre adds to a group's mean reward for its baseline, below 0, in units of
    reward: the lower, the less bad responses count against good ones."""
    imitation: float | Literal["auto"] = 0.0
    """Weight of imitation, alpha, at least 0: adds alpha * beta * (max R - min R of the group)
    times the mean negative log-probability (nats) of each group's best responses to the loss, so
    that they do not become unlikely together with the others. Groups of equal rewards add nothing.
    It moves the optimum towards the logged best responses. alpha does not depend on the scale of
    rewards: take 1 for graded rewards, and 3 to 10 where rewards are right or wrong and nearly all
    are wrong. auto: 1 plus 10 times the share of groups whose responses all have the lowest reward;
    if imitation_without names no sampler, those whose best responses are unlikely under the
    reference are not imitated. Both are logged before the first step. Only for losses of squares:
    gvpo, pmd_mean, rebel, ipo, oapl, qrpo."""
    imitation_of: Literal["best", "soft"] = "best"
    """Which responses of a group imitation is of. best: those of the highest reward, ties alike.
    soft: all, by softmax(reward / beta)."""
    imitation_weights: Literal["equal", "reference"] = "equal"
    """How the imitated responses of a group are weighted against each other. equal; or reference:
    also by e to the power of the reference's mean log-prob per token, so that a text that is
    unlikely under the reference, such as a scripted person's, has a small share."""
    imitation_without: list[str] = field(default_factory=list)
    """Names of samplers whose responses are not imitated. The best of the other samplers' responses
    are, where they have more than the group's lowest reward."""
    groups_per_step: int = 32
    """Groups per optimizer step, over all ranks: the batch size."""
    max_tokens_per_micro_batch: int = 16_384
    """Most tokens, padding included, in one forward and backward pass on one rank. Limits memory
    and does not change the result. A larger group is split into several passes with the same
    gradient; a prompt with one response must fit."""
    layout: Literal["auto", "shared", "packed", "continued", "padded"] = "auto"
    """Layout of groups in the model's input. shared: each prompt once, in one row with its
    responses, with tree attention. continued: each prompt once, then its responses from the
    prompt's cache (for hybrid models). packed: one row, with the prompt repeated before each
    response. padded: a row for each response. auto: the cheapest layout with exact log-probs, found
    by a probe of the model at start-up. A layout that the probe finds inexact is refused."""
    kept_logits_mb: int = 1024
    """Megabytes of logits kept from the forward pass for the backward pass. Logits beyond this are
    recomputed. 0 needs the least memory."""
    keep_products: bool = False
    """With activation_checkpointing: keep the results of matrix products and attention, and
    recompute only what lies between them (norms, activation functions, rotations). Needs about half
    the memory of keeping all activations, in about the same time."""
    log_entropy: bool = False
    """Log the policy's mean entropy over the response tokens, in nats. Makes a step slower."""
    log_format: Literal["short", "full", "json"] = "short"
    """What a run prints when it logs. short: a line with loss, fit, the log-ratio of the best
    responses and the time left. full: all metrics, as transformers prints them. json: all metrics,
    as a line of JSON on standard output. metrics.jsonl in output_dir has all metrics anyway."""
    eval_fraction: float = 0.0
    """Share of the prompts held out for evaluation, in [0, 1), with all of their groups, chosen by
    a hash of the prompt's token ids: a prompt is on one side only, in every dataset and run."""
    held_out_by: Literal["auto", "prompt", "group"] = "auto"
    """How eval_fraction splits. prompt: by prompts. group: by group ids, as earlier versions did; a
    prompt that occurs in several groups is then both trained on and held out. auto: prompt, and for
    a resumed run the rule that it began with."""
    drop_equal_rewards: bool = False
    """Leave out groups whose rewards are all equal. Such groups are not without effect: their
    target is the reference, so leaving them out changes the objective."""
    shuffle_window: int = 4
    """Number of Parquet row groups that are shuffled together. More row groups give a better
    shuffle and need more memory."""
    read_ahead: int = 2
    """Steps that a thread reads ahead of the current one; 0: none. Ignored if
    dataloader_num_workers is set: its processes then read ahead."""
    disable_dropout: bool = True
    """Set all dropout probabilities to 0: the objective needs deterministic log-probs."""
    reference_check: Literal["auto", "error", "off"] = "auto"
    """Before the first update, compare the policy's log-probs with those of the reference, and stop
    if they differ by more than rounding, which in 16 bits is measured and grows with the root of a
    response's length. auto: if the policy has the reference's weights; log-probs of a file that
    does not say what model they are of are compared too, and a difference is a warning.
    error: always; off: never."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What happens at a step whose log-probs or gradient are not finite. stop: training ends with
    an error that names the step and its groups, before anything is saved. skip: the weights are not
    updated at this step, which is logged; not with DeepSpeed. Weights that are not finite, or give
    log-probs that are not, always end the run before they are saved."""
    max_nonfinite_skips: int = 10
    """Most steps that on_nonfinite: skip leaves out in the whole run; one more ends it."""
    stop_signals: list[str] = field(default_factory=lambda: ["SIGTERM", "SIGUSR1"])
    """Signals that end the run at the end of the step, on all ranks, with a complete checkpoint and
    exit status 128 + the signal's number. The run goes on with resume_from_checkpoint: auto."""
    verify: Literal["full", "size"] = "full"
    """Before the first step, check the SHA-256 of every file (about a second per GB), or only its
    size. In both cases each page is verified by its checksum when it is read."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ConfigError("beta is a positive number", received=self.beta)
        weighted = self.response_weights != "equal"
        check_loss(self.loss_type, anchor=self.anchor, weighted=weighted, link=self.link)
        check_reference_sampler(self.loss_type, self.reference_sampler)
        checked_delta(self.asymre_delta, self.loss_type)
        check_imitation(
            self.loss_type,
            # The number that auto stands for may be above 0, which not every loss accepts.
            1.0 if self.imitation == "auto" else self.imitation,
            of=self.imitation_of,
            weights=self.imitation_weights,
            without=self.imitation_without,
        )
        if not 0.0 <= self.anchor <= 1.0:
            raise ConfigError("anchor lies in [0, 1]", received=self.anchor)
        if not 0.0 <= self.eval_fraction < 1.0:
            raise ConfigError(
                "eval_fraction lies in [0, 1)",
                received=self.eval_fraction,
                remedy="eval_fraction: 0.02 holds out 2% of the prompts, and 0 none",
            )
        if self.log_format not in ("short", "full", "json"):
            raise ConfigError("log_format is short, full or json", received=self.log_format)
        if self.held_out_by not in ("auto", "prompt", "group"):
            raise ConfigError("held_out_by is auto, prompt or group", received=self.held_out_by)
        for name in ("groups_per_step", "max_tokens_per_micro_batch", "shuffle_window"):
            positive(name, getattr(self, name))
        if self.on_nonfinite not in ("stop", "skip"):
            raise ConfigError("on_nonfinite is stop or skip", received=self.on_nonfinite)
        signal_numbers(self.stop_signals)
        for name in ("kept_logits_mb", "read_ahead", "max_nonfinite_skips"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is not negative", received=getattr(self, name))
        check_ranges(self)


@dataclass
class LoraSettings:
    """LoRA through PEFT; used only with `use_peft`."""

    use_peft: bool = False
    """Train a new LoRA adapter instead of the whole model."""
    lora_r: int = 16
    """Rank of the adapter."""
    lora_alpha: int = 32
    """LoRA alpha: the adapter's output is scaled by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Dropout in the adapter. Leave it at 0: the objective needs deterministic log-probs."""
    lora_target_modules: list[str] | str | None = None
    """Names of the modules that get an adapter, or all-linear. Default: PEFT's choice for the
    model."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass
class RunSettings:
    """How a training run starts."""

    resume_from_checkpoint: bool | str = False
    """true: resume from the newest complete checkpoint in output_dir. auto: the same if there is
    one, otherwise start a new run. Or the folder of a checkpoint."""


@dataclass
class CommonTrainingSettings:
    """The settings of `transformers.TrainingArguments` that most runs use.

    `train --help` shows these; every other field of TrainingArguments is a flag and a YAML key too.
    """

    output_dir: str = "trainer_output"
    """Folder of the run, for checkpoints, the trained model and the run's settings."""
    learning_rate: float | None = None
    """Peak learning rate. Default: 1e-6 where the whole model is trained, 1e-4 where an adapter is
    (LoRA)."""
    lr_scheduler_type: str = "linear"
    """Schedule of the learning rate: linear, cosine, constant_with_warmup …"""
    warmup_steps: float = 0
    """Steps, or if below 1 the share of the run, over which the learning rate rises to its peak:
    linearly, 1/(n+1) of it at the first of n steps."""
    num_train_epochs: float = 3.0
    """Number of passes over the training groups."""
    max_steps: int = -1
    """Number of optimizer steps; if positive, replaces num_train_epochs."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are clipped; 0: no clipping."""
    weight_decay: float = 0.0
    """Weight decay."""
    bf16: bool = False
    """Autocast matrix products to bfloat16. The reference should be scored with the same flag. Also
    on a CPU, where it is slow without bfloat16 instructions. fp16 has less rounding noise."""
    activation_checkpointing: bool | None = None
    """Recompute activations in the backward pass, which saves memory and takes time. Before
    transformers 5.20: gradient_checkpointing."""
    logging_steps: float = 10
    """Optimizer steps between two log lines of metrics."""
    eval_strategy: str = "no"
    """When to evaluate on held-out groups: no, steps or epoch."""
    eval_steps: float | None = None
    """Steps between two evaluations."""
    save_strategy: str = "steps"
    """When to save a checkpoint: no, steps, epoch or best."""
    save_steps: float = 500
    """Steps between two checkpoints."""
    save_total_limit: int | None = None
    """Number of checkpoints to keep; older ones are removed."""
    report_to: str | list[str] = "none"
    """Loggers: tensorboard, wandb, mlflow or trackio, each installed by the extra of its name, or
    another that transformers knows. docs/howto/watching.md says where they show what."""
    seed: int = 42
    """Random seed of the order of groups, and of everything else that is random."""
    use_cpu: bool = False
    """Use the CPU even if there is a GPU."""
