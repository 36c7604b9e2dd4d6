"""Thresholds of the warnings about metrics. Loads no torch."""

from __future__ import annotations

# Nats, shares of the rewards' variance, a share of the loss.
LOW_BEST_LOG_RATIO = -1.0
LOW_LOG_MASS = -2.0
HIGH_LOG_MASS = 1.0
LOW_EXPLAINED_VARIANCE = -0.5
EXPLAINED_FALL = 0.02
LOSS_RISE = 0.01
# The losses whose optimum has an explained variance of 1.
REGRESSIONS = ("gvpo", "pmd_mean", "rebel", "listwise")
