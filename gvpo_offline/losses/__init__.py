"""Losses as pure functions: flat tensors of whole groups in; loss, weights and sums out.

Losses are computed in float64 on one device, without a loop over groups. All responses of a group
must be in one call; groups may be distributed over calls and ranks in any way. A new loss is a
function of `GroupTerms` in `baselines`, a line in `BASELINES` and in `settings.LossType`, and a
test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gvpo_offline.losses import anchored, baselines
from gvpo_offline.losses.gvpo import gvpo, gvpo_loss
from gvpo_offline.losses.imitation import fixed_gap, imitated_shares, with_imitation
from gvpo_offline.losses.likelihood import checked_counts
from gvpo_offline.losses.needs import check_references, needed_inputs
from gvpo_offline.losses.result import GroupLoss, GroupStatistics
from gvpo_offline.losses.terms import GroupTerms
from gvpo_offline.settings import (
    ASYMRE_DELTA,
    check_imitation,
    check_loss,
    checked_delta,
)

__all__ = ["LOSS_TYPES", "GroupLoss", "GroupStatistics", "GroupTerms", "group_loss", "gvpo_loss"]

BASELINES: dict[str, Callable[[GroupTerms], Tensor]] = {
    "rebel": baselines.rebel,
    "ipo": baselines.ipo,
    "dpo": baselines.dpo,
    "listwise": baselines.listwise,
    "rft": baselines.rft,
    "awr": baselines.awr,
    "grpo": baselines.grpo,
    "rloo": baselines.rloo,
    "topr": baselines.topr,
    "oapl": anchored.oapl,
    "qrpo": anchored.qrpo,
    "asymre": baselines.asymre,
    "sft": baselines.sft,
}
LOSS_TYPES = ("gvpo", "pmd_mean", *BASELINES)


def group_loss(
    loss_type: str,
    seq_logprobs: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor,
    group_index: Tensor,
    *,
    beta: float,
    anchor: float = 0.0,
    response_weights: Tensor | None = None,
    link: str = "log",
    asymre_delta: float = ASYMRE_DELTA,
    sampler_logprobs: Tensor | None = None,
    reference_rows: Tensor | None = None,
    imitation: float = 0.0,
    imitation_of: str = "best",
    imitation_weights: str = "equal",
    imitated: Tensor | None = None,
    token_counts: Tensor | None = None,
) -> GroupLoss:
    """Compute the loss named `loss_type` on whole groups.

    Args:
        loss_type: one of `LOSS_TYPES`; `pmd_mean` is GVPO with anchor 1.
        seq_logprobs, ref_logprobs, rewards, group_index, beta: as `gvpo_loss`.
        anchor, response_weights: as `gvpo_loss`; only `gvpo` accepts them.
        link: log or chi_squared: `GroupTerms.linked_N`. asymre_delta: below 0; only for `asymre`.
        sampler_logprobs: (N,) as seq_logprobs, of each response under its sampler; required by
            topr, and by oapl without reference_rows. Constant.
        reference_rows: (N,) bool: the reference's responses, some in each group; for qrpo, oapl.
        imitation: alpha >= 0 of `losses.imitation`; above 0 only with losses of squares.
        imitation_of, imitation_weights, imitated: `of`, `weights`, `allowed` of `imitated_shares`.
        token_counts: (N,) the tokens that each log-prob sums over; `checked_counts` says what for.

    Raises:
        ConfigError: there is no such loss, or it does not accept a setting that was passed.
        DataError: as `gvpo_loss` and `imitated_shares`; or what the loss requires is missing.
    """
    check_loss(loss_type, anchor=anchor, weighted=response_weights is not None, link=link)
    check_imitation(loss_type, imitation, of=imitation_of, weights=imitation_weights)
    given = {"sampler_logprobs": sampler_logprobs, "reference_rows": reference_rows}
    terms = GroupTerms.build(
        seq_logprobs,
        ref_logprobs,
        rewards,
        group_index,
        beta=beta,
        anchor=1.0 if loss_type == "pmd_mean" else anchor,
        response_weights=response_weights,
        **needed_inputs(loss_type, given),
    )
    if link != "log" or loss_type == "asymre":
        terms = replace(terms, link=link, baseline_shift=checked_delta(asymre_delta))
    terms = replace(terms, token_counts_N=checked_counts(token_counts, group_index, terms))
    check_references(terms, group_index)
    result = _result(loss_type, terms)
    if not imitation:
        return result
    shares_N = imitated_shares(terms, of=imitation_of, weights=imitation_weights, allowed=imitated)
    return with_imitation(result, float(imitation), shares_N, gap=fixed_gap(loss_type, beta))


def _result(loss_type: str, terms: GroupTerms) -> GroupLoss:
    if loss_type not in ("gvpo", "pmd_mean"):
        return _finished(terms, BASELINES[loss_type])
    # The closed form of the weights is that of the plain link.
    return gvpo(terms) if terms.link == "log" else _finished(terms, _gvpo_losses)


def _gvpo_losses(terms: GroupTerms) -> Tensor:
    return gvpo(terms).group_losses


def _finished(terms: GroupTerms, loss: Callable[[GroupTerms], Tensor]) -> GroupLoss:
    """The `GroupLoss` of a function that returns one loss per group.

    The weights are the gradient with respect to the log-ratios. It is computed once, here, and the
    same numbers are passed on to the policy.
    """
    with torch.enable_grad():
        leaf_N = terms.log_ratios_N.detach().requires_grad_()
        losses_G = loss(replace(terms, log_ratios_N=leaf_N))
        (gradient_N,) = torch.autograd.grad(losses_G.sum(), leaf_N)
    moves_N = (
        terms.log_ratios_N - terms.log_ratios_N.detach()
    )  # zeros, with the gradient of log_ratios_N
    group_losses_G = losses_G.detach() + terms.sum(gradient_N * moves_N)
    weights_N = -gradient_N * (terms.group_sizes_G[terms.group_N] - 1) / terms.beta
    return GroupLoss(group_losses_G.mean(), weights_N, group_losses_G, terms)
