"""Search for beta and the learning rate by short trials.

`search` does not depend on the training loop: the caller passes a function that runs one trial.
`trials` runs trials with GVPOTrainer.
"""

from __future__ import annotations

from gvpo_offline.tune.search import (
    CANDIDATE_GAPS,
    INITIAL_GAP,
    Metrics,
    Proposal,
    RangePoint,
    Trial,
    beta_candidates,
    diverged,
    initial_beta,
    largest_usable_rate,
    misfit,
    propose,
    range_rate,
    score,
)

__all__ = [
    "INITIAL_GAP",
    "CANDIDATE_GAPS",
    "Metrics",
    "Proposal",
    "RangePoint",
    "Trial",
    "beta_candidates",
    "initial_beta",
    "diverged",
    "largest_usable_rate",
    "misfit",
    "propose",
    "range_rate",
    "score",
]
