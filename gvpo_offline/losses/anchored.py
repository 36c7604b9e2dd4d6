"""Losses of squares that determine the log-ratios themselves, and not only their differences.

Each is sum((R_i - A - beta l_i)^2) / (2 (k - 1)) of a group, with A = beta log Z of the reward's
optimum pi_ref exp(R / beta) / Z, estimated from responses of the reference. The factor is GVPO's,
so that learning rates and alpha mean the same. With r_bar = mean R and l_bar = mean l, it equals
GVPO's loss plus k (beta l_bar - (r_bar - A))^2 / (2 (k - 1)): an anchor of 1 whose target is not 0.
"""

from __future__ import annotations

import math

from torch import Tensor

from gvpo_offline.losses.terms import GroupTerms


def oapl(terms: GroupTerms) -> Tensor:
    """Squares of R - V* - beta l (OAPL, arXiv 2602.19362; A*-PO, arXiv 2505.20686).

    V* = beta log mean e^(R / beta) over responses of the reference, `reference_values`. The optimum
    is GVPO's where V* is exact. From n responses V* is too low in the mean (Jensen), and where the
    reference is rarely right it is the lowest reward most of the time.
    """
    return _squares(terms, terms.rewards_N - reference_values(terms)[terms.group_N])


def qrpo(terms: GroupTerms) -> Tensor:
    """Squares of R_q - beta log Z - beta l (QRPO, arXiv 2507.08068).

    R_q is the share of the group's reference responses whose reward is at most R. Of a continuous
    reward it is uniform on [0, 1] under the reference, so that Z is known:

        Z = integral of e^(u / beta) over [0, 1] = beta (e^(1 / beta) - 1)

    (The paper drops the 1.) Where rewards tie, as with right and wrong, R_q is not uniform and Z is
    another. beta is in shares of responses per nat. The optimum is that of the quantile
    reward, pi_ref e^(R_q / beta) / Z, and not GVPO's.
    """
    level = terms.beta * log_partition(terms.beta)
    return _squares(terms, quantile_rewards(terms) - level)


def reference_values(terms: GroupTerms) -> Tensor:
    """V* = beta log mean e^(R / beta) of each group, (G,), in units of reward.

    The mean is over the responses of the reference, `reference_N`. Without them it is over all
    responses, with self-normalised weights pi_ref / mu from the logged log-probs of their samplers.
    """
    if terms.reference_N is not None:
        weights_N = terms.reference_N.double()
    else:
        assert terms.sampler_logprobs_N is not None  # group_loss checks it
        log_weights_N = terms.ref_logprobs_N - terms.sampler_logprobs_N
        weights_N = (log_weights_N - terms.max(log_weights_N)[terms.group_N]).exp()
    # The largest is that of the responses that count: those of the reference may all be so far
    # below the best that their mean would round to 0.
    counted_N = (terms.rewards_N / terms.beta).masked_fill(weights_N == 0, -math.inf)
    largest_G = terms.max(counted_N)
    parts_N = (counted_N - largest_G[terms.group_N]).exp()
    return terms.beta * (largest_G + terms.mean(parts_N, weights_N).log())


def quantile_rewards(terms: GroupTerms) -> Tensor:
    """The share of the group's reference responses with a reward of at most the own one, (N,)."""
    assert terms.reference_N is not None  # group_loss checks it
    own_P, other_P = terms.pairs()
    below_P = terms.reference_N[other_P] & (terms.rewards_N[other_P] <= terms.rewards_N[own_P])
    counts_N = terms.rewards_N.new_zeros(terms.rewards_N.shape)
    counts_N = counts_N.index_add(0, own_P, below_P.double())
    return counts_N / terms.sum(terms.reference_N.double())[terms.group_N]


def log_partition(beta: float) -> float:
    """log(beta (e^(1 / beta) - 1)), exact at a small beta (e^x overflows) and at a large one."""
    x = 1 / beta
    # (e^x - 1) / x = e^x (1 - e^-x) / x, of which the last factor goes to 1 with x.
    return x + math.log(-math.expm1(-x) / x)


def _squares(terms: GroupTerms, targets_N: Tensor) -> Tensor:
    errors_N = targets_N - terms.beta * terms.log_ratios_N
    return terms.sum(errors_N.square()) / (2 * (terms.group_sizes_G - 1))
