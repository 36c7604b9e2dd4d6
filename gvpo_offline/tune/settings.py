"""Settings of `gvpo-offline tune`. Loads no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from gvpo_offline.errors import ConfigError
from gvpo_offline.ranges import check_ranges
from gvpo_offline.settings import LossType, positive

MIN_TUNE_STEPS = 20
_FEWEST_ANSWERS = 8
_MOST_TO_FEWEST = 8


@dataclass
class TuneSettings:
    """How beta, the learning rate and, with `judge: sample`, the loss are searched."""

    tune_steps: int = 100
    """Optimizer steps of the learning-rate range test and of each trial; at most the steps of the
    run. A trial has the run's schedule and the same share of warm-up."""
    betas: list[float] = field(default_factory=list)
    """Candidates for beta. With a single one, only the learning rate is searched. Default: the
    nine betas at which the median log-ratio gap of the optimum is 1, sqrt(2), 2 … 16 nats; with
    judge: sample the run's beta alone."""
    judge: Literal["log", "sample"] = "log"
    """What trials are compared by. log: held-out logged responses. sample: answers to held-out
    prompts that each trial's policy samples, scored as `eval_reward` says, by mean reward
    - judge_beta * KL. Only sample can choose between losses."""
    losses: list[str] = field(default_factory=list)
    """With judge: sample, the values of loss_type to try, each with a learning rate of its own.
    Default: the run's."""
    imitations: list[float] = field(default_factory=list)
    """With judge: sample, the values of imitation to try, with each loss that it can be added to.
    Default: the run's."""
    judge_beta: float | None = None
    """With judge: sample, what the KL to the reference is multiplied with when trials are compared,
    in units of reward per nat; the same for all trials, whatever beta they train with. Default: the
    run's beta."""
    judge_samples: list[int] = field(default_factory=list)
    """With judge: sample, the fewest and the most answers per prompt of a trial's policy. Each
    policy gives the fewest, and those that are not significantly worse than the best give more.
    Default: eval_samples (8 if that is 0), and 8 times as many."""

    def __post_init__(self) -> None:
        if self.tune_steps < MIN_TUNE_STEPS:
            raise ConfigError(
                f"tune_steps is at least {MIN_TUNE_STEPS}: the learning-rate range test has one "
                "learning rate per step",
                received=self.tune_steps,
            )
        for beta in self.betas:
            positive("each of betas", beta)
        for name in ("betas", "losses", "imitations"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} are all different", received=values)
        if self.judge not in ("log", "sample"):
            raise ConfigError("judge is log or sample", received=self.judge)
        if self.judge == "log":
            self._check_log()
        self._check_candidates()
        check_ranges(self)

    def _check_log(self) -> None:
        for name in ("losses", "imitations", "judge_beta", "judge_samples"):
            value = getattr(self, name)
            if value not in ([], None):
                raise ConfigError(
                    f"{name} needs judge: sample, since a log cannot choose between losses: it "
                    "has no rewards of answers that were not logged",
                    received=f"{name}: {value} with judge: log",
                    remedy="set judge: sample and eval_reward, or leave it out",
                )

    def _check_candidates(self) -> None:
        for loss in self.losses:
            if loss not in get_args(LossType):
                raise ConfigError(
                    f"each of losses is one of {', '.join(get_args(LossType))}", received=loss
                )
        for alpha in self.imitations:
            if not (math.isfinite(alpha) and alpha >= 0):
                raise ConfigError(
                    "each of imitations is a finite number of at least 0",
                    received=alpha,
                    remedy="0 leaves imitation out; try 0, 0.3, 1, 3",
                )
        if self.judge_beta is not None and not (
            math.isfinite(self.judge_beta) and self.judge_beta > 0
        ):
            raise ConfigError("judge_beta is a positive number", received=self.judge_beta)
        counts = self.judge_samples
        if counts and not (len(counts) == 2 and 1 <= counts[0] <= counts[1]):
            raise ConfigError(
                "judge_samples has the fewest and the most answers per prompt, 1 <= fewest <= most",
                received=counts,
                remedy="judge_samples: [8, 64]",
            )

    def answers(self, eval_samples: int) -> tuple[int, int]:
        """The fewest and the most answers per prompt.

        Args:
            eval_samples: the setting of the run.
        """
        if self.judge_samples:
            return self.judge_samples[0], self.judge_samples[1]
        fewest = eval_samples or _FEWEST_ANSWERS
        return fewest, _MOST_TO_FEWEST * fewest
