"""Names of the files that a run leaves in its folder besides weights and checkpoints."""

from __future__ import annotations

from gvpo_offline.train.checkpoint import (
    EVENTS_FILE,
    METRICS_FILE,
    RESIDUALS_FILE,
    SAMPLES_FILE,
)

__all__ = ["EVENTS_FILE", "METRICS_FILE", "RESIDUALS_FILE", "SAMPLES_FILE"]
