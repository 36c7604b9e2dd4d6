"""Baselines: other published losses on the same groups, to compare GVPO with.

Each function takes checked terms and returns one loss per group, (G,), with a gradient in
`log_ratios_N`. A batch's loss is the mean over groups, as for GVPO. Losses that assume responses
sampled from the policy say so in their docstring. beta has GVPO's unit: reward per nat.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gvpo_offline.losses.terms import LARGEST_EXPONENT, GroupTerms

# The published constants: AWR clips its weights at omega_max = 20 (arXiv 1910.00177; weight_clip in
# the authors' code), and PPO clips ratios to [1 - 0.2, 1 + 0.2] (arXiv 1707.06347).
AWR_LARGEST_WEIGHT = 20.0
CLIP = 0.2


def rebel(terms: GroupTerms) -> Tensor:
    """Square of the best-against-worst pair's residual, over 4 (REBEL, arXiv 2404.16767).

    ((R_b - R_w) - beta (l_b - l_w))^2 / 4, which is GVPO for groups of two. The optimum is GVPO's.
    Of larger groups it uses two responses only.
    """
    best_G, worst_G = terms.best_and_worst()
    residuals_N = terms.residuals_N
    return (residuals_N[best_G] - residuals_N[worst_G]).square() / 4


def ipo(terms: GroupTerms) -> Tensor:
    """(l_b - l_w - 1 / (2 beta))^2 of best against worst (IPO, arXiv 2310.12036), in nats^2.

    It ignores the size of the reward difference. The loss of a group with equal rewards is 0.
    """
    gaps_G, preferred_G = _preference(terms)
    return preferred_G * (gaps_G - 1 / (2 * terms.beta)).square()


def dpo(terms: GroupTerms) -> Tensor:
    """-log sigmoid(beta (l_b - l_w)) of best against worst (DPO, arXiv 2305.18290), in nats.

    On fixed pairs the gap l_b - l_w has no finite optimum. The loss of a group with equal rewards
    is 0.
    """
    gaps_G, preferred_G = _preference(terms)
    return preferred_G * functional.softplus(-terms.beta * gaps_G)


def listwise(terms: GroupTerms) -> Tensor:
    """KL of the policy within the group to pi_ref exp(R / beta) within the group, in nats.

    With q = softmax(ref_logprob + R / beta) and p = softmax(seq_logprob) over a group, sum q log
    (q / p): ListNet's cross-entropy (Cao et al., ICML 2007) with GVPO's optimum as target, minus
    the target's entropy. It is zero where GVPO's loss is zero, and its gradient p - q is bounded.
    """
    target_N = terms.log_softmax(terms.ref_logprobs_N + terms.rewards_N / terms.beta)
    own_N = terms.log_softmax(terms.seq_logprobs_N)
    return terms.sum(target_N.exp() * (target_N - own_N))


def rft(terms: GroupTerms) -> Tensor:
    """Mean negative log-probability of a group's best responses (RFT, arXiv 2308.01825), in nats.

    Tied best responses count equally. The loss of a group with equal rewards is 0. beta and the
    reference are not used.
    """
    best_N = (terms.rewards_N == terms.max(terms.rewards_N)[terms.group_N]).double()
    unequal_G = (terms.sum(best_N) < terms.group_sizes_G).double()
    return -unequal_G * terms.mean(terms.seq_logprobs_N, best_N)


def sft(terms: GroupTerms) -> Tensor:
    """Negative log-probability of the best response of every group, the first of ties, in nats.

    Supervised fine-tuning on the best logged answers. Unlike `rft` it also imitates in groups of
    equal rewards, right or wrong. beta and the reference are not used.
    """
    best_G, _ = terms.best_and_worst()
    return -terms.seq_logprobs_N[best_G]


def awr(terms: GroupTerms) -> Tensor:
    """Log-likelihood weighted by min(exp((R - mean R) / beta), 20) (AWR, arXiv 1910.00177).

    The cap of 20 is the paper's omega_max.

    The reference is not used: the optimum is the reweighted distribution of the sampler.
    """
    advantages_N = terms.centre(terms.rewards_N)
    weights_N = (advantages_N / terms.beta).exp().clamp(max=AWR_LARGEST_WEIGHT)
    return -terms.mean(weights_N * terms.seq_logprobs_N)


def grpo(terms: GroupTerms) -> Tensor:
    """GRPO (arXiv 2402.03300) with the reference in place of the unknown sampler.

    A control: off-policy, its optimum is not GVPO's. Computed by sequence:

    -min(A rho, A clip(rho, 0.8, 1.2)) + beta KL, with rho = exp(l), A = (R - mean R) / std R and
    the estimate exp(-l) + l - 1 of the KL.
    """
    centred_N = terms.centre(terms.rewards_N)
    std_G = (terms.sum(centred_N.square()) / (terms.group_sizes_G - 1)).sqrt()
    advantages_N = centred_N / (std_G + 1e-4)[terms.group_N]
    ratios_N = _exp(terms.log_ratios_N)
    clipped_N = ratios_N.clamp(1 - CLIP, 1 + CLIP)
    gains_N = torch.minimum(advantages_N * ratios_N, advantages_N * clipped_N)
    return terms.mean(terms.beta * _kl_estimate(terms) - gains_N)


def rloo(terms: GroupTerms) -> Tensor:
    """RLOO (arXiv 2402.14740) without importance weights, plus beta times the KL.

    A control: it assumes responses of the policy. -A log pi, with A = R minus the mean reward of
    the group's other responses. (With beta l inside the reward, its gradient would be GVPO's
    divided by beta.)
    """
    scale_G = terms.group_sizes_G / (terms.group_sizes_G - 1)
    advantages_N = terms.centre(terms.rewards_N) * scale_G[terms.group_N]
    return terms.mean(terms.beta * _kl_estimate(terms) - advantages_N * terms.seq_logprobs_N)


def topr(terms: GroupTerms) -> Tensor:
    """Tapered off-policy REINFORCE (TOPR, arXiv 2503.14286): -c A log pi with A = R - mean R.

    c is 1 where A > 0, else min(pi / mu, 1), held constant. mu is the sampler, whose log-probs the
    log must hold. Neither beta nor the reference is used.
    """
    assert terms.sampler_logprobs_N is not None  # group_loss checks it
    advantages_N = terms.centre(terms.rewards_N)
    ratios_N = (terms.seq_logprobs_N.detach() - terms.sampler_logprobs_N).clamp(max=0).exp()
    taper_N = torch.where(advantages_N > 0, 1.0, ratios_N)
    return -terms.mean(taper_N * advantages_N * terms.seq_logprobs_N)


def asymre(terms: GroupTerms) -> Tensor:
    """-(R - mean R - delta) log pi with delta < 0 (AsymRE, arXiv 2506.20520).

    REINFORCE without importance weights whose baseline lies below the mean reward of the log, so
    that good responses count for more than bad ones. With delta >= 0 the policy's support
    collapses. Neither beta nor the reference is used.
    """
    advantages_N = terms.centre(terms.rewards_N) - terms.baseline_shift
    return -terms.mean(advantages_N * terms.seq_logprobs_N)


def _preference(terms: GroupTerms) -> tuple[Tensor, Tensor]:
    """Gap of best and worst response in (linked) log-ratios, (G,) nats; and (G,) 1.0 if their
    rewards differ.
    """
    best_G, worst_G = terms.best_and_worst()
    preferred_G = (terms.rewards_N[best_G] > terms.rewards_N[worst_G]).double()
    linked_N = terms.linked_N
    return linked_N[best_G] - linked_N[worst_G], preferred_G


def _kl_estimate(terms: GroupTerms) -> Tensor:
    """exp(-l) + l - 1, (N,): an estimate of the KL, unbiased for the policy's own responses."""
    return _exp(-terms.log_ratios_N) + terms.log_ratios_N - 1


def _exp(values_N: Tensor) -> Tensor:
    return values_N.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).exp()
