"""The result of a loss on groups, and the sums from which metrics are computed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from gvpo_offline.losses.likelihood import conserved_log_ratios, log_likely_weights
from gvpo_offline.losses.terms import GroupTerms


@dataclass(frozen=True, eq=False)
class GroupStatistics:
    """Sums over groups and responses; all metrics are computed from them, in `metrics`.

    Sums are added over micro-batches with `+` and over ranks by all-reducing `to_tensor()`. Means
    of metrics would depend on how groups are distributed over micro-batches.
    `sums` is (25,) float64 in the order of `NAMES`; only `as_dict` and `metrics`
    synchronise with the device.
    """

    NAMES: ClassVar[tuple[str, ...]] = (
        "n_groups",
        "n_responses",
        "loss",  # over groups, of a group's loss
        "residual_sq",  # (r - mean r)^2, before response weights and anchor
        "reward",
        "reward_sq",  # (R - mean R)^2
        "reward_variance",  # over groups, of sum (R - mean R)^2 / (k - 1)
        "log_ratio",
        "log_ratio_sq",
        "weight",
        "weight_sq",
        "weight_abs",
        "best_log_ratio",  # over groups, of the mean l of the best-rewarded responses
        "concordant_pairs",  # unequal rewards, log-ratios in the same order; equal ones count 1/2
        "comparable_pairs",  # unequal rewards
        "group_reward",  # over groups, of mean R
        "reweighted_reward",  # over groups, of sum R e^l / sum e^l
        "log_mass",  # over groups, of log mean e^l
        # With the weights w of `losses.likelihood`, over groups:
        "likely_reward",  # of sum w R / sum w
        "likely_reweighted_reward",  # of sum w R e^l / sum w e^l, with e^l capped
        "likely_log_mass",  # of log (sum w e^l / sum w)
        "likely_share",  # of mean w
        "imitating_groups",  # groups whose loss has the term of imitation
        "imitation",  # over these groups, of -sum q log pi
        "imitation_part",  # over these groups, of alpha beta D times the same
    )

    sums: Tensor

    @classmethod
    def zeros(cls, device: torch.device | str | None = None) -> GroupStatistics:
        """The statistics of no group at all: the start of a sum, or an idle rank's share."""
        return cls(torch.zeros(len(cls.NAMES), dtype=torch.float64, device=device))

    @classmethod
    def from_tensor(cls, sums: Tensor) -> GroupStatistics:
        """Statistics from the tensor that `to_tensor` gave, after an all-reduce (sum) of it."""
        if sums.shape != (len(cls.NAMES),):
            raise ValueError(f"expected {len(cls.NAMES)} sums, received shape {tuple(sums.shape)}")
        return cls(sums.detach().double())

    def to_tensor(self) -> Tensor:
        """A copy of the sums, (25,) float64, free to be all-reduced in place."""
        return self.sums.clone()

    def where(self, sound: Tensor) -> GroupStatistics:
        """These sums if the scalar `sound` is true, else those of no group."""
        return GroupStatistics(torch.where(sound, self.sums, 0.0))

    def __add__(self, other: GroupStatistics) -> GroupStatistics:
        return GroupStatistics(self.sums + other.sums.to(self.sums.device))

    def as_dict(self) -> dict[str, float]:
        """The sums by name."""
        return dict(zip(self.NAMES, self.sums.tolist(), strict=True))

    def metrics(self) -> dict[str, float]:
        """What is worth logging; nan where a figure has nothing to be computed from.

        loss is a mean over groups; explained_variance 1 - sum (r - mean r)^2 / sum (R - mean R)^2.
        log_ratio_* (nats), weight_* and reward_mean are over responses, best_log_ratio_mean over
        groups, ties averaged. reward_std is the root of the mean within-group variance (by k - 1).
        pair_accuracy is the share of pairs of unequal reward that the log-ratios order alike.

        Over groups: reweighted_reward_mean is what the logged responses would earn if each were as
        much likelier as the policy made it, sum R e^l / sum e^l, the self-normalised estimate of
        the reward of sampler * policy / reference; group_reward_mean the same before, so that their
        difference is a gain. log_mass_mean is log mean e^l (nats): for responses drawn from the
        reference the mean of e^l is 1 in expectation. Far below 0, the policy's probability has
        gone to responses that nobody logged.

        likely_reweighted_reward_mean, likely_reward_mean and likely_log_mass_mean are these three
        with each response weighted by how likely the reference finds it per token, so that writers
        whom the policy never imitates do not count; in the first, a response gains at most what
        others of its group lose (`losses.likelihood`). likely_share, in (0, 1], is the mean weight.
        Without token counts every weight is 1.

        With imitation also imitation_loss, the mean over groups of the negative log-prob of the
        imitated responses (nats), and squares_loss, the loss without the term of imitation.
        """
        total = self.as_dict()
        n_groups, n_responses = total["n_groups"], total["n_responses"]
        unexplained = _ratio(total["residual_sq"], total["reward_sq"])
        parts = {}
        if total["imitating_groups"]:
            parts["squares_loss"] = _ratio(total["loss"] - total["imitation_part"], n_groups)
            parts["imitation_loss"] = _ratio(total["imitation"], n_groups)
        return {
            "loss": _ratio(total["loss"], n_groups),
            "explained_variance": 1.0 - unexplained,
            "log_ratio_mean": _ratio(total["log_ratio"], n_responses),
            "log_ratio_std": _std(total["log_ratio"], total["log_ratio_sq"], n_responses),
            "best_log_ratio_mean": _ratio(total["best_log_ratio"], n_groups),
            "weight_std": _std(total["weight"], total["weight_sq"], n_responses),
            "weight_abs_mean": _ratio(total["weight_abs"], n_responses),
            "reward_mean": _ratio(total["reward"], n_responses),
            "reward_std": math.sqrt(_ratio(total["reward_variance"], n_groups)),
            "pair_accuracy": _ratio(total["concordant_pairs"], total["comparable_pairs"]),
            "group_reward_mean": _ratio(total["group_reward"], n_groups),
            "reweighted_reward_mean": _ratio(total["reweighted_reward"], n_groups),
            "log_mass_mean": _ratio(total["log_mass"], n_groups),
            "likely_reward_mean": _ratio(total["likely_reward"], n_groups),
            "likely_reweighted_reward_mean": _ratio(total["likely_reweighted_reward"], n_groups),
            "likely_log_mass_mean": _ratio(total["likely_log_mass"], n_groups),
            "likely_share": _ratio(total["likely_share"], n_groups),
            **parts,
        }


_PRINTED = (  # metrics in the text of a GroupLoss
    *("explained_variance", "best_log_ratio_mean", "log_ratio_mean", "log_ratio_std"),
    *("likely_log_mass_mean", "pair_accuracy", "reward_mean", "reward_std"),
)


@dataclass(frozen=True, eq=False)
class GroupLoss:
    """The result of a loss on groups.

    Attributes:
        loss: scalar float64, the mean over this call's groups, with the gradient.
        weights: (N,) float64, detached, by input row, in units of reward: the gradient of the loss
            with respect to seq_logprobs is -beta / (k - 1) * weights / n_groups.
        group_losses: (G,) float64 with the gradient, in ascending order of the group ids. A step of
            several micro-batches backpropagates `group_losses.sum()` over the step's group count.
        terms: the checked inputs.
    """

    loss: Tensor
    weights: Tensor
    group_losses: Tensor
    terms: GroupTerms = field(repr=False)

    @property
    def n_groups(self) -> int:
        """Number of groups in this call; does not synchronise with the device."""
        return self.group_losses.shape[0]

    def __repr__(self) -> str:
        """The loss and the main metrics; synchronises with the device."""
        own = self.metrics
        gradient = ", with a gradient" if self.group_losses.requires_grad else ""
        head = (
            f"GroupLoss({own['loss']:.6g}{gradient}: {self.n_groups:,} groups, "
            f"{self.weights.shape[0]:,} responses, beta {self.terms.beta:g})"
        )
        width = max(map(len, _PRINTED))
        lines = [f"  {name:<{width}}  {own[name]:>10.4g}" for name in _PRINTED]
        return "\n".join([head, *lines, "  .metrics has all of them"])

    @cached_property
    def statistics(self) -> GroupStatistics:
        """The sums of this call, computed on first access; add them over calls and ranks."""
        return _statistics(self)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The metrics of this call (`GroupStatistics.metrics`); synchronises with the device."""
        return self.statistics.metrics()


@torch.no_grad()
def _statistics(result: GroupLoss) -> GroupStatistics:
    """The sums of one call, in the order of `GroupStatistics.NAMES`."""
    terms, weights_N = result.terms, result.weights
    log_ratios_N, rewards_N = terms.log_ratios_N.detach(), terms.rewards_N
    reward_sq_N = terms.centre(rewards_N).square()
    best_N = (rewards_N == terms.max(rewards_N)[terms.group_N]).double()
    concordant, comparable = _pair_counts(terms, log_ratios_N)
    largest_G = terms.max(log_ratios_N)
    ratios_N = (log_ratios_N - largest_G[terms.group_N]).exp()  # of probabilities, the largest 1
    sums = {
        "n_groups": weights_N.new_full((), result.n_groups),
        "n_responses": weights_N.new_full((), rewards_N.shape[0]),
        "loss": result.group_losses.detach().sum(),
        "residual_sq": terms.centre(terms.residuals_N.detach()).square().sum(),
        "reward": rewards_N.sum(),
        "reward_sq": reward_sq_N.sum(),
        "reward_variance": (terms.sum(reward_sq_N) / (terms.group_sizes_G - 1)).sum(),
        "log_ratio": log_ratios_N.sum(),
        "log_ratio_sq": log_ratios_N.square().sum(),
        "weight": weights_N.sum(),
        "weight_sq": weights_N.square().sum(),
        "weight_abs": weights_N.abs().sum(),
        "best_log_ratio": terms.mean(log_ratios_N, best_N).sum(),
        "concordant_pairs": concordant,
        "comparable_pairs": comparable,
        "group_reward": terms.mean(rewards_N).sum(),
        "reweighted_reward": terms.mean(rewards_N, ratios_N).sum(),
        "log_mass": (largest_G + terms.mean(ratios_N).log()).sum(),
        **_likely_sums(terms, log_ratios_N),
        **_imitation_sums(terms, result.n_groups),
    }
    return GroupStatistics(torch.stack([sums[name] for name in GroupStatistics.NAMES]))


def _likely_sums(terms: GroupTerms, log_ratios_N: Tensor) -> dict[str, Tensor]:
    """The sums by the rules of `losses.likelihood`."""
    log_weights_N = log_likely_weights(terms)
    capped_N = conserved_log_ratios(terms, log_weights_N, log_ratios_N)
    reweighted_N = terms.log_softmax(log_weights_N + capped_N).exp()
    weights_N = log_weights_N.exp()
    products_N = log_weights_N + log_ratios_N
    largest_G = terms.max(products_N)
    mass_G = terms.sum((products_N - largest_G[terms.group_N]).exp()).log()
    return {
        "likely_reward": terms.mean(terms.rewards_N, weights_N).sum(),
        "likely_reweighted_reward": terms.sum(reweighted_N * terms.rewards_N).sum(),
        "likely_log_mass": (largest_G + mass_G - terms.sum(weights_N).log()).sum(),
        "likely_share": terms.mean(weights_N).sum(),
    }


def _imitation_sums(terms: GroupTerms, n_groups: int) -> dict[str, Tensor]:
    """The sums about imitation; zeros for a loss without it."""
    if terms.imitation_G is None:
        zero = terms.rewards_N.new_zeros(())
        return {"imitating_groups": zero, "imitation": zero, "imitation_part": zero}
    losses_G = terms.imitation_losses_G.detach()
    return {
        "imitating_groups": losses_G.new_full((), n_groups),
        "imitation": losses_G.sum(),
        "imitation_part": terms.beta * (terms.imitation_G * losses_G).sum(),
    }


def _pair_counts(terms: GroupTerms, log_ratios_N: Tensor) -> tuple[Tensor, Tensor]:
    """The number of pairs with unequal rewards whose log-ratios are in the same order, and of all
    pairs with unequal rewards.

    Enumerates the k^2 ordered pairs of every group, so it is exact for any mixture of k.
    """
    rewards_N = terms.rewards_N
    left_P, right_P = terms.pairs()
    better_P = rewards_N[left_P] > rewards_N[right_P]
    gap_P = log_ratios_N[left_P] - log_ratios_N[right_P]
    agreement_P = (gap_P > 0).double() + 0.5 * (gap_P == 0).double()
    return (better_P * agreement_P).sum(), better_P.double().sum()


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _std(total: float, total_sq: float, count: float) -> float:
    """Standard deviation (population) from sums; rounding must not make a variance negative."""
    return math.sqrt(max(_ratio(total_sq, count) - _ratio(total, count) ** 2, 0.0))
