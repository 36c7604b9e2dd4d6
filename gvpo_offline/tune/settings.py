"""Settings of `gvpo-offline tune`. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from gvpo_offline.errors import ConfigError
from gvpo_offline.settings import positive

MIN_TUNE_STEPS = 20


@dataclass
class TuneSettings:
    """How beta and learning rate are searched. The run's own beta and rate are not looked at."""

    tune_steps: int = 100
    """Optimizer steps of the range run and of each trial, under the run's warm-up and schedule; at
    most those of the run."""
    betas: list[float] = field(default_factory=list)
    """The betas to choose from; a single one is settled, and the learning rate alone is searched.
    Default: those at which the optimum's median log-ratio gap is 1 to 16 nats, two for each
    doubling."""

    def __post_init__(self) -> None:
        if self.tune_steps < MIN_TUNE_STEPS:
            raise ConfigError(
                f"tune_steps is at least {MIN_TUNE_STEPS}: the range run's rate rises through as "
                "many values",
                received=self.tune_steps,
            )
        for beta in self.betas:
            positive("each of betas", beta)
        if len(set(self.betas)) < len(self.betas):
            raise ConfigError("betas differ", received=self.betas)
