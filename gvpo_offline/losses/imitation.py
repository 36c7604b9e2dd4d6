"""Imitation of a group's good responses, as a term beside a loss of squares.

A loss of squares determines the differences of log-ratios within a group and not their mean: the
log-probs of all logged responses may fall together. The term

    alpha * beta * D * I,   I = -sum_i q_i * log pi(y_i | x)     nats

raises the log-probs of good responses. q are shares of the group's responses that sum to 1
(`imitated_shares`), or 0 for all of them where there is nothing to imitate.
D is the reward of the best imitated response minus the lowest reward of the group.

**The scale alpha * beta * D.** The gradient of GVPO's loss in log pi(y_i) is -beta / (k - 1) * w_i,
and that of this term is -alpha * beta * D * q_i. So the ratio of the two, alpha * (k - 1) * D * q_i
/ w_i, does not depend on beta: an alpha that was found at one beta holds at another one. w is in
units of reward, as D is, so alpha is a plain number: rewards and beta multiplied by c, which leave
the optimum of the squares where it is, multiply both parts by c^2. With rewards of 0 and 1 the term
is alpha * beta times the loss `rft`. And rewards that come close to each other let the term go to
0, as they do with the squares. `qrpo` ignores the size of rewards: there D is 1. So does `ipo`,
which is 4 / beta^2 times `rebel` for rewards 1/2 apart; its D is 4 / beta^2 times 1/2, so that
alpha has the effect there that it has for `rebel` and those rewards.

**What it does to the optimum.** With alpha above 0 the minimiser is no longer
pi_ref exp(R / beta) / Z. Over all groups of one prompt, let W(y) be the sum of w_i / (k - 1) over
the responses that are y, v(y) the sum of their D * q_i, and s the sum of v. The gradient of a
tabular policy is 0 where

    W(y) = alpha * (s * pi(y) - v(y))                    for every y

The left side is 0 at GVPO's optimum, and the right side at the distribution v / s of what is
imitated: the policy lies between the two, and alpha says where. A response that was never logged
has W = v = 0, so that pi(y) = 0 for every alpha above 0: GVPO alone keeps the reference's ratios
among such responses, and imitation lowers their probability to 0 in the end, faster at a larger
alpha.
`docs/evidence/convergence.md` has the measured distance to the optimum.

**Which losses.** Those of squares: their squares grow without bound on both sides of the minimum,
so that the sum has a minimum too. The others: rft, sft and awr are imitation already; dpo, grpo,
rloo, topr and asymre have no minimum at finite log-ratios; listwise is a cross-entropy.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from gvpo_offline.compute.devices import to_device
from gvpo_offline.errors import DataError
from gvpo_offline.losses.result import GroupLoss
from gvpo_offline.losses.terms import GroupTerms


def with_imitation(
    result: GroupLoss, alpha: float, shares_N: Tensor, *, gap: float | None = None
) -> GroupLoss:
    """A loss of squares plus the term of imitation.

    Args:
        result: the loss of squares.
        alpha: above 0.
        shares_N: (N,) float64, as `imitated_shares`.
        gap: D of all groups in which something is imitated, for a loss of squares that ignores the
            size of reward differences; None: it uses them, and D is that of the group's rewards.

    Returns:
        The sum. Its weights are those of the gradient of both: w_i + alpha * (k - 1) * D * q_i.
    """
    gaps_G = _gaps(result.terms, shares_N)
    if gap is not None:
        gaps_G = gap * (gaps_G > 0).double()
    factors_G = alpha * gaps_G
    terms = replace(result.terms, imitation_G=factors_G, imitated_N=shares_N)
    group_losses_G = result.group_losses + terms.beta * factors_G * terms.imitation_losses_G
    scales_G = factors_G * (terms.group_sizes_G - 1)
    weights_N = result.weights + scales_G[terms.group_N] * shares_N
    return GroupLoss(group_losses_G.mean(), weights_N, group_losses_G, terms)


def fixed_gap(loss_type: str, beta: float) -> float | None:
    """D of a loss of squares that ignores the size of reward differences; None for the others."""
    return {"qrpo": 1.0, "ipo": 2.0 / beta**2}.get(loss_type)


def _gaps(terms: GroupTerms, shares_N: Tensor) -> Tensor:
    """D: the best imitated reward minus the lowest of the group, (G,); 0 if nothing is imitated."""
    lowest_G = -terms.max(-terms.rewards_N)
    imitated_N = torch.where(shares_N > 0, terms.rewards_N, lowest_G[terms.group_N])
    return terms.max(imitated_N) - lowest_G


def imitated_shares(
    terms: GroupTerms,
    *,
    of: str = "best",
    weights: str = "equal",
    allowed: Tensor | None = None,
) -> Tensor:
    """The share q of each response in what its group imitates, (N,) float64.

    The candidates are the allowed responses of a group. Nothing is imitated in a group whose best
    candidate has no more than the group's lowest reward: with all responses allowed these are the
    groups of equal rewards. In all other groups the shares sum to 1 over the candidates:

        best, equal      1 / m for each of the m best candidates: the loss `rft`
        soft, equal      softmax(R / beta); at beta -> 0 this is best
        best, reference  proportional to e^p among the m best, p = ref_logprob / tokens
        soft, reference  proportional to e^(R / beta + p)

    p is the reference's mean log-prob per token, so that e^p is the geometric mean of the tokens'
    probabilities. Log-probs of whole responses differ by tens of nats: one response would have all.
    A single best candidate has the share 1 whatever its p.

    Args:
        terms: the checked inputs of the loss; with token counts for `reference`.
        of: best or soft.
        weights: equal or reference.
        allowed: (N,) bool: whether a response may be imitated; None: all may.

    Raises:
        DataError: shapes that differ, or token counts that are missing.
    """
    rewards_N = terms.rewards_N
    allowed_N = torch.ones_like(rewards_N, dtype=torch.bool)
    if allowed is not None:
        allowed_N = _checked("allowed", allowed, terms).bool()
    never = torch.full_like(rewards_N, -math.inf)
    best_G = terms.max(torch.where(allowed_N, rewards_N, never))
    worth_G = best_G > -terms.max(-rewards_N)  # -inf, and so false, where nothing is allowed
    scores_N = rewards_N / terms.beta
    if of == "best":
        scores_N = torch.where(rewards_N == best_G[terms.group_N], 0.0, never)
    if weights == "reference":
        scores_N = scores_N + terms.ref_logprobs_N / _counts(terms)
    scores_N = torch.where(allowed_N & worth_G[terms.group_N], scores_N, never)
    largest_G = torch.where(worth_G, terms.max(scores_N), 0.0)
    parts_N = (scores_N - largest_G[terms.group_N]).exp()
    return parts_N / torch.where(worth_G, terms.sum(parts_N), 1.0)[terms.group_N]


def _counts(terms: GroupTerms) -> Tensor:
    """The token counts of the terms, which `likelihood.checked_counts` checked."""
    if terms.token_counts_N is None:
        raise DataError(
            "imitation weighted by the reference needs the number of counted tokens of each "
            "response",
            received="none",
            remedy="pass token_counts",
        )
    return terms.token_counts_N


def _checked(name: str, values: Tensor, terms: GroupTerms) -> Tensor:
    """`values` on the device of the terms; DataError unless there is one for each row."""
    if values.shape != terms.rewards_N.shape:
        raise DataError(
            f"{name} must have one entry for each of the {len(terms.rewards_N)} rows",
            received=tuple(values.shape),
            remedy="pass the same rows, in the same order, in every argument",
        )
    return to_device(values, terms.rewards_N.device)
