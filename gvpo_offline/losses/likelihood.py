"""Weights of logged responses in metrics that estimate the reward of the policy's own answers.

These metrics weight logged responses by pi / pi_ref. The estimate is right for responses that the
reference sampled. It is wrong for responses that the policy never samples, such as a person's: the
log-prob of such a text may rise by many nats while its probability stays negligible, and its ratio
is then larger than all others together. Two rules limit the weight of a single response.

**What the reference finds unlikely does not count.** For a response y of T tokens, m = log
pi_ref(y) / T, and m* is the median of m in the group (the more likely of the middle two for an even
number of responses). The weight of the response is

    w = min(1, pi_ref(y) / exp(T (m* - SLACK)))

which is the importance weight pi_ref / mu, capped at 1, of a sampler mu that gives its own
responses m* - SLACK nats per token. Responses within SLACK of the median count fully, and these are
at least half of each group. Beyond it the weight falls with the whole log-prob that is missing, so
that no log-ratio that training reaches makes up for it.

**Ratios are capped.** The mean of e^l over responses of the reference is 1. Where the
weighted mean of a group is above 1, the largest ratios are lowered to a common cap so that it is 1:
a response can gain only what the others of its group lose.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gvpo_offline.compute.devices import to_device
from gvpo_offline.errors import DataError
from gvpo_offline.losses.terms import GroupTerms

# Nats per token. Answers that one model gives at temperatures 0.5 and 1 differ by this much under
# that model (docs/howto/tuning.md), and all of them are its own.
SLACK = 2.0
_LARGEST_EXPONENT = 700.0  # e^709 overflows float64


def checked_counts(
    token_counts: Tensor | None, group_index: Tensor, terms: GroupTerms
) -> Tensor | None:
    """Token counts as the terms hold them, (N,) float64; None for None.

    The metrics that begin with likely_ are computed of them (without them they count all responses
    alike), and the shares of imitation with the weights of the reference.

    Raises:
        DataError: there is not one for each row, or one is below 1 or not finite.
    """
    if token_counts is None:
        return None
    if token_counts.shape != terms.rewards_N.shape:
        raise DataError(
            f"token_counts must have one entry for each of the {len(terms.rewards_N)} rows",
            received=tuple(token_counts.shape),
            remedy="pass the same rows, in the same order, in every argument",
        )
    # On the device of the counts: there on the CPU, they cost no synchronisation with a GPU.
    sound_N = torch.isfinite(token_counts) & (token_counts >= 1)
    if not bool(sound_N.all()):
        row = int((~sound_N).nonzero()[0])
        raise DataError(
            "token_counts are at least 1",
            received=token_counts[row].item(),
            remedy="drop the response, of which nothing is trained",
            row=row,
            group=str(int(group_index[row])),
        )
    return to_device(token_counts, terms.rewards_N.device).double()


def log_likely_weights(terms: GroupTerms) -> Tensor:
    """log w of each response, (N,) float64, at most 0; zeros if the token counts are not known."""
    if terms.token_counts_N is None:
        return torch.zeros_like(terms.rewards_N)
    per_token_N = terms.ref_logprobs_N / terms.token_counts_N
    table_GK, _ = _by_size(per_token_N, terms)
    sizes_G = terms.group_sizes_G.long()
    # Ascending, behind -inf in the places that a smaller group does not fill.
    from_top_G = table_GK.shape[1] - 1 - (sizes_G - 1) // 2
    median_G = table_GK.gather(1, from_top_G[:, None])[:, 0]
    excess_N = per_token_N - (median_G - SLACK)[terms.group_N]
    return terms.token_counts_N * excess_N.clamp(max=0.0)


def conserved_log_ratios(terms: GroupTerms, log_weights_N: Tensor, log_ratios_N: Tensor) -> Tensor:
    """Log-ratios, (N,), lowered to a cap in each group where sum w e^l exceeds sum w.

    The cap c solves sum w min(e^l, c) = sum w. With the ratios in ascending order, c is the largest
    of (sum w - sum of w e^l over the first j) / (sum of w over the others), for j = 0, 1 …, k - 1.

    Args:
        terms: the groups.
        log_weights_N: log w, at most 0, and 0 for at least one response of each group.
        log_ratios_N: l, nats.
    """
    ratios_GK, place_N = _by_size(log_ratios_N.clamp(max=_LARGEST_EXPONENT), terms)
    ratios_GK = ratios_GK.exp()  # 0 in the places that are not filled
    weights_GK = torch.zeros_like(ratios_GK)
    weights_GK[terms.group_N, place_N] = log_weights_N.exp()
    masses_GK = weights_GK * ratios_GK
    total_G1 = weights_GK.sum(1, keepdim=True)
    before_GK = masses_GK.cumsum(1) - masses_GK
    rest_GK = weights_GK.flip(1).cumsum(1).flip(1)
    caps_GK = torch.where(rest_GK > 0, (total_G1 - before_GK) / rest_GK, 0.0)
    exceeds_G = masses_GK.sum(1) > total_G1[:, 0]
    cap_G = torch.where(exceeds_G, caps_GK.amax(1).log(), math.inf)
    return torch.minimum(log_ratios_N, cap_G[terms.group_N])


def _by_size(values_N: Tensor, terms: GroupTerms) -> tuple[Tensor, Tensor]:
    """The values of each group in ascending order at the end of a row, (G, K), K the largest group,
    behind -inf; and the column of each value, (N,) int64.
    """
    order_N = torch.argsort(values_N, stable=True)
    order_N = order_N[torch.argsort(terms.group_N[order_N], stable=True)]
    sizes_G = terms.group_sizes_G.long()
    width = terms.largest_group
    ends_G = sizes_G.cumsum(0)
    rows_N = torch.arange(values_N.shape[0], device=values_N.device)
    columns_N = width - ends_G[terms.group_N[order_N]] + rows_N
    place_N = torch.empty_like(columns_N).scatter_(0, order_N, columns_N)
    table_GK = values_N.new_full((sizes_G.shape[0], width), -math.inf)
    table_GK[terms.group_N, place_N] = values_N
    return table_GK, place_N
