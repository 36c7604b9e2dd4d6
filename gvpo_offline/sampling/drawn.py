"""Reading of drawn tokens from the device: once for all rows, and not once for each figure."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gvpo_offline.compute.model import float64_device
from gvpo_offline.errors import DataError


def read(ids_B: Tensor, logprobs_B: Tensor) -> tuple[list[int], list[float]]:
    """The ids and log-probs that `decode.draw` gave, on the host, in one copy from the device.

    Raises:
        DataError: a log-prob is not finite: a logit was NaN or infinite.
    """
    # float64 holds every token id and every float32 exactly; MPS has no float64.
    device = float64_device(ids_B.device)
    ids, logprobs = torch.stack(
        [ids_B.to(device).double(), logprobs_B.to(device).double()]
    ).tolist()
    if not all(map(math.isfinite, logprobs)):
        raise DataError(
            "a model's logits are finite numbers",
            received="NaN or infinite logits",
            remedy="check the model's weights, or use a wider dtype",
        )
    return [int(own) for own in ids], logprobs
