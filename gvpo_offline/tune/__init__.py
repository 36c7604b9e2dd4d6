"""Choosing beta and the learning rate: what to try next, from what was measured so far.

`search` knows nothing of how a policy is trained: whoever has a training loop of his own hands it
over as `trial`. `trials` is GVPOTrainer's.
"""

from __future__ import annotations

from gvpo_offline.tune.search import (
    NATS,
    NATS_TRIED,
    Metrics,
    Proposal,
    RangePoint,
    Trial,
    beta_candidates,
    beta_to_begin,
    diverged,
    largest_usable_rate,
    misfit,
    propose,
    range_rate,
    score,
)

__all__ = [
    "NATS",
    "NATS_TRIED",
    "Metrics",
    "Proposal",
    "RangePoint",
    "Trial",
    "beta_candidates",
    "beta_to_begin",
    "diverged",
    "largest_usable_rate",
    "misfit",
    "propose",
    "range_rate",
    "score",
]
