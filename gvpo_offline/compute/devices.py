"""What differs between devices: copies to them, and whether they have autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Types of devices that copy from pinned memory while the host goes on.
PINNING = {"cuda", "xpu"}


def to_device(
    values: NDArray[Any] | Tensor | Sequence[Any],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Values on a device, without waiting for the work that the device has not done yet.

    A plain `.to(device)` of CPU memory ends only when all work queued before it is done. Here the
    values are copied to pinned memory, and from there in the order of the queue.

    Args:
        values: an array, a CPU tensor, or numbers. A tensor of the device is returned as it is.
        device: of the result.
        dtype: of the result; default: that of the values.
    """
    if isinstance(values, np.ndarray):
        tensor = torch.from_numpy(values)
    else:
        tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    tensor = tensor if dtype is None else tensor.to(dtype)
    if tensor.device.type != "cpu" or device.type not in PINNING:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def autocast_dtype_of(device: torch.device) -> torch.dtype | None:
    """The data type of autocast on a device, if it is on; None without it."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context without autocast on a device; some devices, such as "meta", have none."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
