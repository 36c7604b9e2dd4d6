"""The loss of a micro-batch of groups, and the sums that are logged between two lines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gvpo_offline.errors import DataError
from gvpo_offline.group import Group
from gvpo_offline.losses import GroupStatistics

if TYPE_CHECKING:
    from accelerate import Accelerator

from typing import Any

from gvpo_offline.losses import GroupLoss, group_loss


@dataclass(frozen=True)
class Objective:
    """A loss and its settings.

    Attributes:
        beta: reward per nat.
        loss_type: as `losses.LOSS_TYPES`.
        anchor: as `gvpo_loss`.
        response_weights: "equal", or "inverse_length": f = 1 / counted tokens of a response, as
            `gvpo_loss` weighs squares.
    """

    beta: float
    loss_type: str = "gvpo"
    anchor: float = 0.0
    response_weights: str = "equal"

    def __call__(self, logprobs_N: Tensor, groups: Sequence[Group]) -> GroupLoss:
        """The loss of whole groups.

        Args:
            logprobs_N: (N,) the policy's, nats, response after response.
            groups: whose responses they are.

        Raises:
            DataError: as `group_loss`; it names the group by its id.
        """
        own = LossInputs.of(groups)
        more: dict[str, Any] = {}
        if self.loss_type == "topr":
            held = [g.sampler_seq_logprobs for g in groups if g.sampler_seq_logprobs is not None]
            if len(held) == len(groups):
                more["sampler_logprobs"] = torch.from_numpy(np.concatenate(held))
        if self.response_weights == "inverse_length":
            more["response_weights"] = 1.0 / _counted_tokens(groups)
        try:
            return group_loss(
                self.loss_type,
                logprobs_N,
                own.ref_seq_logprobs,
                own.rewards,
                own.group_index,
                beta=self.beta,
                anchor=self.anchor,
                **more,
            )
        except DataError as error:
            if error.group is None or not error.group.isdigit():
                raise
            group = groups[int(error.group)].group_id
            raise DataError(
                error.rule, received=error.received, remedy=error.remedy, group=group
            ) from error


def _counted_tokens(groups: Sequence[Group]) -> Tensor:
    """Tokens of each response that count, (N,) float64."""
    counts = [
        len(ids) if group.loss_mask is None else int(group.loss_mask[i].sum())
        for group in groups
        for i, ids in enumerate(group.response_token_ids)
    ]
    return torch.tensor(counts, dtype=torch.float64)


class StepMeter:
    """Sums since the last `drain`: statistics of the groups, tokens, and time spent on data."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.clear()

    def clear(self) -> None:
        """Begin again."""
        self._statistics = GroupStatistics.zeros(self._device)
        self._entropy = torch.zeros(2, dtype=torch.float64, device=self._device)
        self._tokens = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def add(self, statistics: GroupStatistics) -> None:
        """Count one micro-batch's groups."""
        self._statistics = self._statistics + statistics

    def add_entropy(self, entropy_M: Tensor) -> None:
        """Count the entropies of (M,) scored tokens, nats."""
        own = entropy_M.to(self._entropy)
        self._entropy += torch.stack([own.sum(), torch.ones_like(own).sum()])

    def add_tokens(self, tokens: int) -> None:
        """Count tokens, each prompt once."""
        self._tokens += tokens

    def add_wait(self, seconds: float) -> None:
        """Count time in which the device waited for data."""
        self._waited += seconds

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """The metrics over all ranks since the last call; every rank has to call.

        Beside those of `GroupStatistics.metrics` (but the loss, which transformers logs):
        `tokens_per_second` (prompt counted once per group, all ranks) and `data_wait_share` (of the
        wall time, mean over ranks); `entropy` (nats, mean over scored tokens) if it was counted.
        """
        wall = max(time.perf_counter() - self._since, 1e-9)
        own = self._statistics.to_tensor()
        extra = torch.tensor([self._tokens, self._waited], dtype=own.dtype, device=own.device)
        total = reduced_sum(accelerator, torch.cat([own, extra, self._entropy]))
        tokens, waited, entropy, scored = total[-4:].tolist()
        metrics = GroupStatistics.from_tensor(total[:-4]).metrics()
        del metrics["loss"]
        metrics["tokens_per_second"] = tokens / wall
        metrics["data_wait_share"] = waited / wall / accelerator.num_processes
        if scored:
            metrics["entropy"] = entropy / scored
        self.clear()
        return metrics


class ReferenceMeter:
    """Log-ratios of the responses of the first step: the largest, and their mean, in size."""

    def __init__(self, device: torch.device) -> None:
        self._largest = torch.zeros((), dtype=torch.float64, device=device)
        self._total = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, log_ratios: Tensor) -> None:
        """Count (R,) log-ratios, nats."""
        sizes = log_ratios.detach().abs().to(self._total)
        self._largest = torch.maximum(self._largest, sizes.max())
        self._total += torch.stack([sizes.sum(), torch.ones_like(sizes).sum()])

    def result(self, accelerator: Accelerator) -> tuple[float, float]:
        """Largest and mean |log-ratio| over all ranks, nats; every rank has to call."""
        largest = accelerator.gather(self._largest.reshape(1)).max()
        total = reduced_sum(accelerator, self._total)
        return float(largest), float(total[0] / total[1])


def reduced_sum(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Sum of a tensor over all ranks."""
    summed: Tensor = accelerator.reduce(values, reduction="sum")
    return summed


@dataclass(frozen=True, eq=False)
class LossInputs:
    """What a loss takes of groups, R responses in all, on the CPU.

    Attributes:
        group_index: (R,) int64, which of the groups a response belongs to.
        rewards: (R,) float64; empty (0,) where groups have none.
        ref_seq_logprobs: (R,) float64, nats; empty (0,) where groups have none.
    """

    group_index: Tensor
    rewards: Tensor
    ref_seq_logprobs: Tensor

    @classmethod
    def of(cls, groups: Sequence[Group]) -> LossInputs:
        """The constants of at least one group.

        Raises:
            DataError: some groups have rewards or reference log-probs and others do not.
        """
        sizes = [group.group_size for group in groups]
        index = torch.from_numpy(np.repeat(np.arange(len(groups)), sizes))
        return cls(index, _scalars(groups, "rewards"), _scalars(groups, "ref_seq_logprobs"))


def _scalars(groups: Sequence[Group], name: str) -> Tensor:
    values = [getattr(group, name) for group in groups]
    present = [value for value in values if value is not None]
    if not present:
        return torch.zeros(0, dtype=torch.float64)
    if len(present) != len(values):
        missing = next(g for g, value in zip(groups, values, strict=True) if value is None)
        raise DataError(f"every group has {name}", received="none", group=missing.group_id)
    return torch.from_numpy(np.concatenate(present).astype(np.float64))
