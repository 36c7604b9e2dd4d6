"""The inputs of every loss: checked rows in float64, and reductions over groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from gvpo_offline.compute.devices import to_device
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.losses.checks import require

# Exponents are clamped to this many nats, so that exp does not overflow.
LARGEST_EXPONENT = 20.0


@dataclass(frozen=True, eq=False)
class GroupTerms:
    """The checked inputs of a loss: float64, on one device.

    `group_N` (int64) numbers the groups 0..G-1 in ascending order of the input ids. Only
    `log_ratios_N` has a gradient. `response_weights_N` has mean 1 in each group (all ones if no
    weights were given). `sampler_logprobs_N` is None if the log does not hold them, and
    `reference_N` (bool: which responses the reference wrote) if it is not known. `imitation_G` is
    the factor alpha D of imitation in each group (None: no imitation), and `imitated_N` the share
    of each response in what its group imitates.
    `baseline_shift` is AsymRE's delta. `token_counts_N` (float64) is the number of tokens that each
    log-prob sums over, None if it is not known. `host_sizes` are the sizes of the groups, on the
    host.
    """

    log_ratios_N: Tensor
    ref_logprobs_N: Tensor
    rewards_N: Tensor
    response_weights_N: Tensor
    group_N: Tensor
    group_sizes_G: Tensor
    beta: float
    anchor: float = 0.0
    sampler_logprobs_N: Tensor | None = None
    imitation_G: Tensor | None = None
    imitated_N: Tensor | None = None
    reference_N: Tensor | None = None
    link: str = "log"
    baseline_shift: float = 0.0
    token_counts_N: Tensor | None = None
    host_sizes: tuple[int, ...] | None = None

    @classmethod
    def build(
        cls,
        seq_logprobs: Tensor,
        ref_logprobs: Tensor,
        rewards: Tensor,
        group_index: Tensor,
        *,
        beta: float,
        anchor: float = 0.0,
        response_weights: Tensor | None = None,
        sampler_logprobs: Tensor | None = None,
        reference_rows: Tensor | None = None,
    ) -> GroupTerms:
        """Check a loss's tensors and settings; arguments and errors as in `group_loss`."""
        given = {
            "seq_logprobs": seq_logprobs,
            "ref_logprobs": ref_logprobs,
            "rewards": rewards,
            "group_index": group_index,
            "response_weights": response_weights,
            "sampler_logprobs": sampler_logprobs,
            "reference_rows": reference_rows,
        }
        named = {name: tensor for name, tensor in given.items() if tensor is not None}
        _check_settings(beta, anchor)
        _check_shapes(named)
        group_index = named["group_index"].long()
        # Sorting runs on the device of the ids: ids on the CPU avoid a GPU synchronisation.
        ids_G, group_N, sizes_G = torch.unique(group_index, return_inverse=True, return_counts=True)
        _check_group_sizes(ids_G, group_N, sizes_G)
        host_sizes = tuple(sizes_G.tolist())
        # Apple's MPS has no float64; these few numbers per response are moved to the CPU.
        policy_N = named["seq_logprobs"]
        device = torch.device("cpu") if policy_N.is_mps else policy_N.device
        # Sizes are float64 too: a Python float times an integer tensor would be float32.
        group_N, sizes_G = to_device(group_N, device), to_device(sizes_G, device).double()
        float_N = {name: to_device(own, device).double() for name, own in named.items()}
        rewards_N, ref_N = float_N["rewards"].detach(), float_N["ref_logprobs"].detach()
        weights_N = torch.ones_like(rewards_N)
        if "response_weights" in named:
            weights_N = _relative(float_N["response_weights"].detach(), group_N, sizes_G)
        sampler_N = float_N["sampler_logprobs"].detach() if "sampler_logprobs" in named else None
        terms = cls(
            log_ratios_N=float_N["seq_logprobs"] - ref_N,
            ref_logprobs_N=ref_N,
            rewards_N=rewards_N,
            response_weights_N=weights_N,
            group_N=group_N,
            group_sizes_G=sizes_G,
            beta=float(beta),
            anchor=float(anchor),
            sampler_logprobs_N=sampler_N,
            reference_N=float_N["reference_rows"] != 0 if "reference_rows" in named else None,
            host_sizes=host_sizes,
        )
        terms._check_sound(named)
        return terms

    def _check_sound(self, named: Mapping[str, Tensor]) -> None:
        # The only check of values: a bad input makes residual or weight non-finite.
        weights_N = self.response_weights_N
        sound_N = torch.isfinite(self.residuals_N.detach() * weights_N) & (weights_N > 0)
        if self.sampler_logprobs_N is not None:
            sound_N &= torch.isfinite(self.sampler_logprobs_N)
        require(sound_N, lambda: _raise_unsound(sound_N, named))

    @property
    def _sizes(self) -> tuple[int, ...]:
        """The sizes of the groups; waits for the device if they are not known on the host."""
        if self.host_sizes is None:
            return tuple(map(int, self.group_sizes_G.tolist()))
        return self.host_sizes

    @property
    def largest_group(self) -> int:
        """Number of responses of the largest group."""
        return max(self._sizes)

    @property
    def residuals_N(self) -> Tensor:
        """r = R - beta * l, in units of reward; with the link of chi-squared, l as linked."""
        return self.rewards_N - self.beta * self.linked_N

    @property
    def linked_N(self) -> Tensor:
        """What beta is multiplied by: the log-ratio l, or l + e^l - 1 with link chi_squared.

        That is the link of chi-squared preference optimisation (arXiv 2407.13399), phi(z) = z +
        log z of z = pi / pi_ref, minus the 1 that makes it 0 at the reference and cancels in
        differences. The exponent is clipped to 20 nats, so that e^l does not overflow.
        """
        if self.link == "log":
            return self.log_ratios_N
        return self.log_ratios_N + self.log_ratios_N.clamp(max=LARGEST_EXPONENT).exp() - 1

    @property
    def seq_logprobs_N(self) -> Tensor:
        """The policy's log-probability of each response, nats, with the gradient."""
        return self.log_ratios_N + self.ref_logprobs_N

    @property
    def imitation_losses_G(self) -> Tensor:
        """Negative log-prob of the imitated responses by their shares, (G,) nats; 0 if none."""
        if self.imitated_N is None:
            return torch.zeros_like(self.group_sizes_G)
        return -self.sum(self.imitated_N * self.seq_logprobs_N)

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
        """`values_N` minus the (weighted) mean of their group, (N,).

        The largest value of the group is subtracted first: equal values then give exact zeros, and
        a large constant common to the group costs no precision.
        """
        shifted_N = values_N - self.max(values_N)[self.group_N]
        return shifted_N - self.mean(shifted_N, weights_N)[self.group_N]

    def log_softmax(self, values_N: Tensor) -> Tensor:
        """`values_N` as log-probabilities over their group, (N,)."""
        shifted_N = values_N - self.max(values_N)[self.group_N]
        return shifted_N - self.sum(shifted_N.exp()).log()[self.group_N]

    def pairs(self) -> tuple[Tensor, Tensor]:
        """All k^2 ordered pairs of rows of each group, a row with itself too: two (P,) int64."""
        order_N = torch.argsort(self.group_N, stable=True)
        sizes_G = self.group_sizes_G.long()
        sorted_N = self.group_N[order_N]
        partners_N = sizes_G[sorted_N]
        first_N = (sizes_G.cumsum(0) - sizes_G)[sorted_N]
        n_pairs = sum(size * size for size in self._sizes)
        left_P = torch.repeat_interleave(partners_N, output_size=n_pairs)
        within_P = torch.arange(left_P.shape[0], device=left_P.device)
        within_P = within_P - (partners_N.cumsum(0) - partners_N)[left_P]
        return order_N[left_P], order_N[first_N[left_P] + within_P]

    def best_and_worst(self) -> tuple[Tensor, Tensor]:
        """The rows of each group's best and worst response by reward, two (G,) int64.

        Ties take the first best and the last worst response, so that the two always differ.
        """
        n_rows = self.rewards_N.shape[0]
        rows_N = torch.arange(n_rows, device=self.rewards_N.device)
        best_N = self.rewards_N == self.max(self.rewards_N)[self.group_N]
        worst_N = -self.rewards_N == self.max(-self.rewards_N)[self.group_N]
        none = torch.full(self.group_sizes_G.shape, -1, device=rows_N.device)
        # Values in place of a mask: the number of rows in a mask is not known on the host.
        last_G = none.scatter_reduce(0, self.group_N, torch.where(worst_N, rows_N, -1), "amax")
        none = none + n_rows + 1
        firsts_N = torch.where(best_N, rows_N, n_rows)
        first_G = none.scatter_reduce(0, self.group_N, firsts_N, "amin")
        return first_G, last_G


def _relative(weights_N: Tensor, group_N: Tensor, sizes_G: Tensor) -> Tensor:
    """Weights divided by the mean of their group, (N,)."""
    # abs: negative weights must stay negative, so that the check finds them.
    mean_G = _group_sum(weights_N.abs(), group_N, sizes_G) / sizes_G
    return weights_N / mean_G[group_N]


def _group_sum(values_N: Tensor, group_N: Tensor, sizes_G: Tensor) -> Tensor:
    """Sum of `values_N` in each group, (G,)."""
    zeros_G = values_N.new_zeros(sizes_G.shape[0])
    if values_N.is_cuda:
        # index_add uses atomic additions there, whose order, and so the rounding, differs by run.
        return zeros_G.index_put((group_N,), values_N, accumulate=True)
    return zeros_G.index_add(0, group_N, values_N)


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
    """Raise DataError for a group of one response, for which k - 1 is 0."""
    if bool((sizes_G >= 2).all()):
        return
    lonely = int((sizes_G < 2).nonzero()[0])
    row, group = int((group_N == lonely).nonzero()[0]), str(int(ids_G[lonely]))
    rule = "a group needs at least 2 responses in the same call"
    remedy = "keep a group's responses together, and drop prompts that were answered once"
    raise DataError(rule, received=1, remedy=remedy, row=row, group=group)


def _raise_unsound(sound_N: Tensor, named: Mapping[str, Tensor]) -> None:
    """Raise DataError naming the first bad value; slow, called only after the check failed."""
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
