"""The sum of a run's losses over all its steps, which a resumed run goes on with.

transformers' `train_loss` is the mean over the steps since the run was started or resumed. The mean
here is over all steps of the run. Each rank adds its part of each step's loss in float64; a
checkpoint holds the sums of all ranks. On as many ranks as before the same numbers are added in the
same order, so that the mean is bit-identical to that of a run without interruption. On another
number of ranks it differs by rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gvpo_offline.collectives import gather_results

Sums = list[tuple[float, float]]  # of each rank: sum of its losses, number of its steps


class LossSum:
    """Sums of this rank.

    Args:
        device: of the sums; it must support float64.
        saved: what `content` gave at the checkpoint that is resumed; None: a new run, or a
            checkpoint of an earlier version, of which the mean then leaves out the steps.
        rank: of this process.
        world_size: number of ranks.
    """

    def __init__(
        self, device: torch.device, saved: Mapping[str, Any] | None, rank: int, world_size: int
    ) -> None:
        sums, counts = (list(map(float, (saved or {}).get(n, []))) for n in ("sums", "steps"))
        if len(sums) != world_size:
            # Each rank's part of a loss is multiplied by the number of ranks.
            scale = world_size / max(len(sums), 1)
            sums, counts = ([sum(own) * scale, *[0.0] * (world_size - 1)] for own in (sums, counts))
        self._total = torch.tensor([sums[rank], counts[rank]], dtype=torch.float64, device=device)

    def add(self, loss: Tensor) -> None:
        """Add this rank's part of a step's loss, a scalar; without waiting for the device.

        Losses that are not finite are left out, and so are their steps.
        """
        own = loss.detach().to(self._total)
        finite = torch.isfinite(own)
        self._total += torch.stack([torch.where(finite, own, 0), finite.to(own)])

    def gathered(self) -> Sums:
        """The sums of all ranks; every rank must call this."""
        total, steps = self._total.tolist()
        return gather_results(lambda: (total, steps))

    @staticmethod
    def content(sums: Sums) -> dict[str, list[float]]:
        """Sums of all ranks as a seal holds them."""
        return {"sums": [own for own, _ in sums], "steps": [steps for _, steps in sums]}

    @staticmethod
    def mean(sums: Sums) -> float:
        """The mean of all ranks' losses over their steps; 0 before the first step."""
        return sum(own for own, _ in sums) / max(sum(steps for _, steps in sums), 1)
