"""The rounding noise of a run's log-ratios: the noise floor.

In bfloat16 or float16 the log-prob of a response depends on rounding, and so on what it is computed
together with. A log-ratio below that noise says nothing about the policy. `GVPOTrainer.noise_floor`
holds the noise of the run from the start of `train`; it is None before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gvpo_offline.group import Group


@dataclass(frozen=True)
class NoiseFloor:
    """Rounding noise of log-ratios, for the groups that it was measured on.

    Attributes:
        per_root_token: standard deviation of the log-ratio of a response of one token, nats. The
            rounding errors of tokens are nearly independent, so that of a response of T tokens is
            sqrt(T) times as large.
        nats: root mean square, over the responses of the first step, of the standard deviation of
            their log-ratios, nats.
        explained_variance: what this noise alone takes from the explained variance, as a share of
            the rewards' variance within groups; inf if all rewards are equal.
        measured: whether it was measured with the model; otherwise it is a multiple of the data
            type's epsilon.
    """

    per_root_token: float
    nats: float
    explained_variance: float
    measured: bool

    def of(self, tokens: float) -> float:
        """Standard deviation of the log-ratio of a response of `tokens` tokens, nats."""
        return self.per_root_token * math.sqrt(tokens)


def counted_tokens(groups: Sequence[Group]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Number of tokens of each response that the loss mask counts, (R,)."""
    counts = [
        len(ids) if group.loss_mask is None else int(group.loss_mask[i].sum())
        for group in groups
        for i, ids in enumerate(group.response_token_ids)
    ]
    return np.array(counts, dtype=np.int64)


def noise_floor(
    per_root_token: float, groups: Sequence[Group], beta: float, *, measured: bool
) -> NoiseFloor:
    """The noise floor of groups with rewards.

    Noise of variance s^2 T in the log-ratios of k responses adds beta^2 s^2 sum(T) (k - 1) / k in
    expectation to the group's sum of squared residuals around their mean: an explained variance of
    1 - (that sum) / sum (R - mean R)^2 falls by the ratio of the sums over all groups.

    Args:
        per_root_token: see `NoiseFloor`.
        groups: groups with rewards.
        beta: reward per nat.
        measured: see `NoiseFloor`.
    """
    tokens = [counted_tokens([group]).astype(np.float64) for group in groups]
    variances = [per_root_token**2 * own for own in tokens]
    noise = sum(beta**2 * float(own.sum()) * (1.0 - 1.0 / len(own)) for own in variances)
    rewards = [np.asarray(group.rewards, np.float64) for group in groups]
    signal = sum(float(np.square(own - own.mean()).sum()) for own in rewards)
    every = np.concatenate(variances) if variances else np.zeros(1)
    return NoiseFloor(
        per_root_token=per_root_token,
        nats=float(np.sqrt(every.mean())),
        explained_variance=noise / signal if signal else math.inf,
        measured=measured,
    )
