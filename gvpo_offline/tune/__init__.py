"""Search for beta, the learning rate and, by sampled answers, the loss, by short trials.

`search` and `judged` do not depend on the training loop: the caller passes functions that run a
trial, and for `judged` one that judges its policy. `trials` runs trials with GVPOTrainer.
"""

from __future__ import annotations

from gvpo_offline.tune.judged import (
    JudgedProposal,
    JudgedTrial,
    LossCandidates,
    TrialSettings,
    propose_judged,
)
from gvpo_offline.tune.racing import PromptEstimates, SampleBudget
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
    "JudgedProposal",
    "JudgedTrial",
    "LossCandidates",
    "Metrics",
    "PromptEstimates",
    "Proposal",
    "RangePoint",
    "SampleBudget",
    "Trial",
    "TrialSettings",
    "beta_candidates",
    "initial_beta",
    "diverged",
    "largest_usable_rate",
    "misfit",
    "propose",
    "propose_judged",
    "range_rate",
    "score",
]
