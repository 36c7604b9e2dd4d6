"""Settings of `gvpo-offline tune`. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from gvpo_offline.errors import ConfigError
from gvpo_offline.settings import positive

MIN_TUNE_STEPS = 20


@dataclass
class TuneSettings:
    """How beta and learning rate are searched. The run's own values are ignored."""

    tune_steps: int = 100
    """Optimizer steps of the learning-rate range test and of each trial; at most the steps of the
    run. A trial has the run's schedule and the same share of warm-up."""
    betas: list[float] = field(default_factory=list)
    """Candidates for beta. With a single one, only the learning rate is searched. Default: the
    nine betas at which the median log-ratio gap of the optimum is 1, sqrt(2), 2 … 16 nats."""

    def __post_init__(self) -> None:
        if self.tune_steps < MIN_TUNE_STEPS:
            raise ConfigError(
                f"tune_steps is at least {MIN_TUNE_STEPS}: the learning-rate range test has one "
                "learning rate per step",
                received=self.tune_steps,
            )
        for beta in self.betas:
            positive("each of betas", beta)
        if len(set(self.betas)) < len(self.betas):
            raise ConfigError("betas are all different", received=self.betas)
