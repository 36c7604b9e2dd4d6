"""The GVPO loss and its two variants: an anchor, and response weights.

Group Variance Policy Optimization (arXiv 2504.19599). A group is one prompt with k responses; with

    l_i = seq_logprob_i - ref_logprob_i                  log-ratio, nats
    r_i = R_i - beta * l_i                               residual
    w_i = r_i - mean_group(r)                            weight; sums to zero in each group

a group's loss is sum(w^2) / (2 (k - 1)), and a batch's loss is the mean over its groups. A group's
gradient is -beta / (k - 1) * sum(w_i * grad seq_logprob_i). The prompt's partition function cancels
in w, and the sampler's probabilities appear nowhere.
"""

from __future__ import annotations

from torch import Tensor

from gvpo_offline.losses.result import GroupLoss
from gvpo_offline.losses.terms import GroupTerms


def gvpo_loss(
    seq_logprobs: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor,
    group_index: Tensor,
    *,
    beta: float,
    anchor: float = 0.0,
    response_weights: Tensor | None = None,
) -> GroupLoss:
    """The GVPO loss of whole groups (arXiv 2504.19599), optionally with its two variants.

    Args:
        seq_logprobs: (N,) float, the policy's log-probability of each response in nats, summed over
            its trained tokens. The gradient flows here, in this tensor's dtype.
        ref_logprobs: (N,) the fixed reference's, over the same tokens. Constant.
        rewards: (N,) unnormalised: dividing by their deviation moves the optimum. Constant.
        group_index: (N,) integers; rows with equal numbers are one group. Numbers and the order of
            rows are free; a group has k >= 2 rows, and k may differ. Cheapest on the CPU.
        beta: > 0, reward per nat: the optimum's log-ratio gap is (max R - min R) / beta nats.
        anchor: 0 <= a <= 1 adds a * k * beta^2 / 2 * (mean l)^2 to the group's squares before the
            division by k - 1. It keeps the mean log-ratio near zero and **biases the optimum**;
            a = 1 is the PMD-mean loss (Kimi k1.5, arXiv 2501.12599).
        response_weights: (N,) f > 0, fixed per prompt and response (GVPO++, arXiv 2609.21432).
            Scaled to mean 1 in each group, they weight the squares and both means:
            r_bar = sum(f r) / sum(f), w = f * (r - r_bar), loss sum(f (r - r_bar)^2) / (2 (k - 1)).
            The optimum does not move. Equal weights give the plain loss.

    Returns:
        `GroupLoss`. With an anchor, its weights are f * (r - r_bar - a * beta * mean l), those of
        the gradient, which no longer sum to zero.

    Raises:
        ConfigError: beta or anchor out of range.
        DataError: shapes that differ, no rows, ids that are no integers, a group of one response,
            a value that is not finite, a response weight that is not positive.

    Example (worked): rewards 1, 0 and log-ratios 0.5, -0.5 at beta 0.5 give residuals 0.75, 0.25,
    weights 0.25, -0.25, and the loss (0.25^2 + 0.25^2) / (2 * 1) = 0.0625.
    """
    terms = GroupTerms.build(
        seq_logprobs,
        ref_logprobs,
        rewards,
        group_index,
        beta=beta,
        anchor=anchor,
        response_weights=response_weights,
    )
    return gvpo(terms)


def gvpo(terms: GroupTerms) -> GroupLoss:
    """`gvpo_loss` of checked terms."""
    factors_N = terms.response_weights_N
    centred_N = terms.centre(terms.residuals_N, factors_N)
    squares_G = terms.sum(factors_N * centred_N.square())
    weights_N = centred_N.detach()
    if terms.anchor:
        # The weighted mean, so that anchor 1 is (weighted) PMD-mean, sum f (R - R_bar - beta l)^2.
        pull_G = terms.beta * terms.mean(terms.linked_N, factors_N)
        squares_G = squares_G + terms.anchor * terms.group_sizes_G * pull_G.square()
        weights_N = weights_N - terms.anchor * pull_G.detach()[terms.group_N]
    group_losses_G = squares_G / (2 * (terms.group_sizes_G - 1))
    return GroupLoss(group_losses_G.mean(), factors_N * weights_N, group_losses_G, terms)
