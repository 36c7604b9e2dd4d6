"""The objective as a pure function: flat tensors of whole groups in, loss, weights and sums out.

Group Variance Policy Optimization (arXiv 2504.19599). A group is one prompt with k responses; with

    l_i = seq_logprob_i - ref_logprob_i                  log-ratio, nats
    r_i = R_i - beta * l_i                               residual
    w_i = r_i - mean_group(r)                            weight; sums to zero in each group

a group's loss is sum(w^2) / (2 (k - 1)), and a batch's loss is the mean over its groups. A group's
gradient is -beta / (k - 1) * sum(w_i * grad seq_logprob_i). The prompt's partition function cancels
in w, and the sampler's probabilities appear nowhere. Both need the whole group in one call, while
the groups may be cut into calls and spread over ranks in any way.

All of it is float64, on one device, without a loop over groups. A further loss on the same rows is
one more function with `gvpo_loss`'s signature that starts from `GroupTerms.build` and returns a
`GVPOLoss`; metrics then need nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from gvpo_offline.errors import ConfigError, DataError

__all__ = ["GVPOLoss", "GroupStatistics", "GroupTerms", "gvpo_loss"]


@dataclass(frozen=True, eq=False)
class GroupTerms:
    """What a loss on groups starts from: checked, float64, on one device.

    `group_N` (int64) numbers the groups 0..G-1 in ascending order of the ids that came in. Only
    `log_ratios_N` has a gradient. `response_weights_N` has mean 1 per group; ones without weights.
    """

    log_ratios_N: Tensor
    rewards_N: Tensor
    response_weights_N: Tensor
    group_N: Tensor
    group_sizes_G: Tensor
    beta: float
    anchor: float

    @classmethod
    def build(cls, named: Mapping[str, Tensor], beta: float, anchor: float) -> GroupTerms:
        """Check a loss's tensors, by argument name, and settings; errors as in `gvpo_loss`."""
        _check_settings(beta, anchor)
        _check_shapes(named)
        group_index = named["group_index"].long()
        # Sorting and counting happen where the ids live: ids kept on the CPU spare a GPU the wait.
        ids_G, group_N, sizes_G = torch.unique(group_index, return_inverse=True, return_counts=True)
        _check_group_sizes(ids_G, group_N, sizes_G)
        # Apple's MPS has no float64; these are a few numbers per response, so the CPU takes them.
        policy_N = named["seq_logprobs"]
        device = torch.device("cpu") if policy_N.is_mps else policy_N.device
        # Sizes as float64 too: a Python float times an integer tensor would be float32.
        group_N, sizes_G = group_N.to(device), sizes_G.to(device).double()
        float_N = {name: values.to(device).double() for name, values in named.items()}
        rewards_N = float_N["rewards"].detach()
        weights_N = torch.ones_like(rewards_N)
        if "response_weights" in named:
            raw_N = float_N["response_weights"].detach()
            # abs: two negative weights must stay negative, to be found below.
            mean_G = _group_sum(raw_N.abs(), group_N, sizes_G) / sizes_G
            weights_N = raw_N / mean_G[group_N]
        ratios_N = float_N["seq_logprobs"] - float_N["ref_logprobs"].detach()
        terms = cls(ratios_N, rewards_N, weights_N, group_N, sizes_G, float(beta), float(anchor))
        # The one question per call to the device: a bad input shows in the residual or the weight.
        sound_N = torch.isfinite(terms.residuals_N.detach() * weights_N) & (weights_N > 0)
        if not bool(sound_N.all()):
            _raise_unsound(sound_N, named)
        return terms

    @property
    def residuals_N(self) -> Tensor:
        """r = R - beta * l, in units of reward."""
        return self.rewards_N - self.beta * self.log_ratios_N

    def sum(self, values_N: Tensor) -> Tensor:
        """Sum of `values_N` in each group, (G,)."""
        return _group_sum(values_N, self.group_N, self.group_sizes_G)

    def max(self, values_N: Tensor) -> Tensor:
        """Largest of `values_N` in each group, (G,), detached."""
        lowest_G = values_N.new_full(self.group_sizes_G.shape, -math.inf)
        return lowest_G.scatter_reduce(0, self.group_N, values_N.detach(), "amax")

    def mean(self, values_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
        """Mean of `values_N` in each group, (G,), weighted where weights are given."""
        if weights_N is None:
            return self.sum(values_N) / self.group_sizes_G
        return self.sum(weights_N * values_N) / self.sum(weights_N)

    def centre(self, values_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
        """`values_N` less their group's (weighted) mean, (N,).

        The group's largest value is taken off first: equal values then give exact zeros, and a
        large constant common to a group costs no precision.
        """
        shifted_N = values_N - self.max(values_N)[self.group_N]
        return shifted_N - self.mean(shifted_N, weights_N)[self.group_N]


@dataclass(frozen=True, eq=False)
class GroupStatistics:
    """Sums over groups and responses, from which `metrics` are defined, here and nowhere else.

    They add: over micro-batches with `+`, over ranks by all-reducing `to_tensor()`. Means of
    metrics would depend on how the groups were cut.
    `sums` is (15,) float64 in the order of `NAMES`; only `as_dict` and `metrics` ask the device.
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
        """A copy of the sums, (15,) float64, free to be all-reduced in place."""
        return self.sums.clone()

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
        """
        total = self.as_dict()
        n_groups, n_responses = total["n_groups"], total["n_responses"]
        unexplained = _ratio(total["residual_sq"], total["reward_sq"])
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
        }


@dataclass(frozen=True, eq=False)
class GVPOLoss:
    """What a loss on groups returns.

    Attributes:
        loss: scalar float64, the mean over this call's groups, with the gradient.
        weights: (N,) float64, detached, by input row: the gradient of the loss in seq_logprobs is
            -beta / (k - 1) * weights / n_groups.
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
        """Groups in this call, known without asking the device."""
        return self.group_losses.shape[0]

    @cached_property
    def statistics(self) -> GroupStatistics:
        """This call's sums, computed when first asked for; add them up over calls and ranks."""
        return _statistics(self)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """This call's own metrics (`GroupStatistics.metrics`); asks the device when first read."""
        return self.statistics.metrics()


def gvpo_loss(
    seq_logprobs: Tensor,
    ref_logprobs: Tensor,
    rewards: Tensor,
    group_index: Tensor,
    *,
    beta: float,
    anchor: float = 0.0,
    response_weights: Tensor | None = None,
) -> GVPOLoss:
    """GVPO's loss of whole groups (arXiv 2504.19599), and its two documented variants.

    Args:
        seq_logprobs: (N,) float, the policy's log-probability of each response in nats, summed over
            its trained tokens. The gradient flows here, in this tensor's dtype.
        ref_logprobs: (N,) the fixed reference's, over the same tokens. Constant.
        rewards: (N,) as they are: dividing them by their spread moves the optimum. Constant.
        group_index: (N,) integers; equal numbers are one group. Any numbers, rows in any order,
            k >= 2 rows each, k free to differ. Sorting is cheapest when it lies on the CPU.
        beta: > 0, reward per nat: the optimum's log-ratio gap is (max R - min R) / beta nats.
        anchor: 0 <= a <= 1 adds a * k * beta^2 / 2 * (mean l)^2 to the group's squares before the
            division by k - 1. It holds log-ratios near zero in the mean and **biases the optimum**;
            a = 1 is the PMD-mean loss (Kimi k1.5, arXiv 2501.12599).
        response_weights: (N,) f > 0, fixed per prompt and response (GVPO++, arXiv 2609.21432).
            Scaled to mean 1 in each group, they weigh the squares and both means:
            r_bar = sum(f r) / sum(f), w = f * (r - r_bar), loss sum(f (r - r_bar)^2) / (2 (k - 1)).
            The optimum stays where it is. All equal is the plain loss.

    Returns:
        `GVPOLoss`; with an anchor its weights are f * (r - r_bar - a * beta * mean l), which are
        those of the gradient and no longer sum to zero.

    Raises:
        ConfigError: beta or anchor out of range.
        DataError: shapes that differ, no rows, ids that are no integers, a group of one response,
            a value that is not finite, a response weight that is not positive.

    Example (worked): rewards 1, 0 and log-ratios 0.5, -0.5 at beta 0.5 give residuals 0.75, 0.25,
    weights 0.25, -0.25, and the loss (0.25^2 + 0.25^2) / (2 * 1) = 0.0625.
    """
    named = {
        "seq_logprobs": seq_logprobs,
        "ref_logprobs": ref_logprobs,
        "rewards": rewards,
        "group_index": group_index,
    }
    if response_weights is not None:
        named["response_weights"] = response_weights
    terms = GroupTerms.build(named, beta, anchor)
    factors_N = terms.response_weights_N
    centred_N = terms.centre(terms.residuals_N, factors_N)
    squares_G = terms.sum(factors_N * centred_N.square())
    weights_N = centred_N.detach()
    if terms.anchor:
        # The weighted mean, so that anchor 1 is (weighted) PMD-mean, sum f (R - R_bar - beta l)^2.
        pull_G = terms.beta * terms.mean(terms.log_ratios_N, factors_N)
        squares_G = squares_G + terms.anchor * terms.group_sizes_G * pull_G.square()
        weights_N = weights_N - terms.anchor * pull_G.detach()[terms.group_N]
    group_losses_G = squares_G / (2 * (terms.group_sizes_G - 1))
    return GVPOLoss(group_losses_G.mean(), factors_N * weights_N, group_losses_G, terms)


@torch.no_grad()
def _statistics(result: GVPOLoss) -> GroupStatistics:
    """The sums of one call, in the order of `GroupStatistics.NAMES`."""
    terms, weights_N = result.terms, result.weights
    log_ratios_N, rewards_N = terms.log_ratios_N.detach(), terms.rewards_N
    reward_sq_N = terms.centre(rewards_N).square()
    best_N = (rewards_N == terms.max(rewards_N)[terms.group_N]).double()
    concordant, comparable = _pair_counts(terms, log_ratios_N)
    sums = {
        "n_groups": weights_N.new_tensor(result.n_groups),
        "n_responses": weights_N.new_tensor(rewards_N.shape[0]),
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
    }
    return GroupStatistics(torch.stack([sums[name] for name in GroupStatistics.NAMES]))


def _pair_counts(terms: GroupTerms, log_ratios_N: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of unequal reward that the log-ratios put in the same order, and all such pairs.

    Lists the sum of k^2 ordered pairs of all groups: exact for any mixture of k, no padding.
    """
    order_N = torch.argsort(terms.group_N, stable=True)
    rewards_N, log_ratios_N = terms.rewards_N[order_N], log_ratios_N[order_N]
    group_N, sizes_G = terms.group_N[order_N], terms.group_sizes_G.long()
    partners_N = sizes_G[group_N]
    first_N = (sizes_G.cumsum(0) - sizes_G)[group_N]
    left_P = torch.repeat_interleave(partners_N)
    within_P = torch.arange(left_P.shape[0], device=left_P.device)
    within_P = within_P - (partners_N.cumsum(0) - partners_N)[left_P]
    right_P = first_N[left_P] + within_P
    better_P = rewards_N[left_P] > rewards_N[right_P]
    gap_P = log_ratios_N[left_P] - log_ratios_N[right_P]
    agreement_P = (gap_P > 0).double() + 0.5 * (gap_P == 0).double()
    return (better_P * agreement_P).sum(), better_P.double().sum()


def _group_sum(values_N: Tensor, group_N: Tensor, sizes_G: Tensor) -> Tensor:
    """Sum of `values_N` in each group, (G,)."""
    return values_N.new_zeros(sizes_G.shape[0]).index_add(0, group_N, values_N)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _std(total: float, total_sq: float, count: float) -> float:
    """Standard deviation (population) from sums; rounding must not make a variance negative."""
    return math.sqrt(max(_ratio(total_sq, count) - _ratio(total, count) ** 2, 0.0))


def _check_settings(beta: float, anchor: float) -> None:
    if not isinstance(beta, Real) or not math.isfinite(beta) or beta <= 0:
        remedy = "it is the reference's strength in reward per nat; 0.1 suits rewards in 0..1"
        raise ConfigError("beta must be a finite number above 0", received=beta, remedy=remedy)
    if not isinstance(anchor, Real) or not 0 <= anchor <= 1:
        remedy = "0 leaves the optimum where it is; 1 is the PMD-mean loss"
        raise ConfigError("anchor must be a number from 0 to 1", received=anchor, remedy=remedy)


def _check_shapes(named: Mapping[str, Tensor]) -> None:
    """Equal (N,) shapes, N > 0, integer group ids."""
    for name, values in named.items():
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        if not isinstance(values, Tensor) or values.ndim != 1 or len(values) == 0:
            rule = f"{name} must be a tensor of shape (N,) with N > 0"
            remedy = "pass one number per response, the groups laid end to end"
            raise DataError(rule, received=shape, remedy=remedy)
        if len(values) != len(named["seq_logprobs"]):
            rule = f"{name} must have one entry for each of the {len(named['seq_logprobs'])} rows"
            remedy = "pass the same rows, in the same order, in every argument"
            raise DataError(rule, received=shape, remedy=remedy)
    dtype = named["group_index"].dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        remedy = "number the groups, for instance with torch.repeat_interleave"
        raise DataError("group_index must hold integers", received=dtype, remedy=remedy)


def _check_group_sizes(ids_G: Tensor, group_N: Tensor, sizes_G: Tensor) -> None:
    """No group of a single response: it has no contrast, and k - 1 would be 0."""
    if bool((sizes_G >= 2).all()):
        return
    lonely = int((sizes_G < 2).nonzero()[0])
    row, group = int((group_N == lonely).nonzero()[0]), str(int(ids_G[lonely]))
    rule = "a group needs at least 2 responses in the same call"
    remedy = "keep a group's responses together, and drop prompts that were answered once"
    raise DataError(rule, received=1, remedy=remedy, row=row, group=group)


def _raise_unsound(sound_N: Tensor, named: Mapping[str, Tensor]) -> None:
    """Name the first value that made a row's residual or weight unsound; the slow path."""
    rule, bad_N = "a row's inputs must stay finite in float64 when combined", ~sound_N
    received: object = "an overflow"
    for name, values in named.items():
        positive = name == "response_weights"
        unsound_N = ~torch.isfinite(values) | (values <= 0 if positive else False)
        if bool(unsound_N.any()):
            rule, bad_N = f"{name} must be finite" + " and above 0" * positive, unsound_N
            received = values[unsound_N][0].item()
            break
    row = int(bad_N.nonzero()[0])
    remedy = "find where this response's value was computed, and mend it or drop the response"
    group = str(int(named["group_index"][row]))
    raise DataError(rule, received=received, remedy=remedy, row=row, group=group)
