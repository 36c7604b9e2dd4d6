"""Reading of drawn tokens from the device: once for all rows, and not once for each figure."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gvpo_offline.compute.model import float64_device
from gvpo_offline.errors import DataError


def read(ids_B: Tensor, logprobs_B: Tensor, sums_B: Tensor) -> tuple[list[int], list[float]]:
    """The ids and log-probs of `draw` on the host, in one copy from the device.

    Raises:
        DataError: a logit is NaN or infinite.
    """
    # float64 holds every token id and every float32 exactly; MPS has no float64.
    device = float64_device(ids_B.device)
    parts = [own.to(device).double() for own in (ids_B, logprobs_B, sums_B)]
    ids, logprobs, sums = torch.stack(parts).tolist()
    if not all(map(math.isfinite, sums)):
        raise DataError(
            "a model's logits are finite numbers",
            received="NaN or infinite logits",
            remedy="check the model's weights, or use a wider dtype",
        )
    return [int(own) for own in ids], logprobs
