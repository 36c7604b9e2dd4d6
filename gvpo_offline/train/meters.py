"""What a training run measures of itself between two lines of its log."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gvpo_offline.losses import GroupStatistics

if TYPE_CHECKING:
    from accelerate import Accelerator


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
