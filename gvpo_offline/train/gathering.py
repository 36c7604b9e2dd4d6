"""The whole weights of a sharded model, gathered without holding them in memory."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from gvpo_offline.collectives import raise_together
from gvpo_offline.files import storage_errors


@contextlib.contextmanager
def gathered_weights(model: nn.Module, folder: Path, *, keep: bool) -> Iterator[dict[str, Tensor]]:
    """Within it, the whole weights of a model that FSDP2 has sharded; every rank must enter it.

    Tensors are gathered one at a time, and kept in temporary files in `folder`, whose pages the
    system can write out: no rank needs memory for more than its shards and one tensor.

    Args:
        model: the model.
        folder: where the weights will be saved; it gets as much again while this lasts.
        keep: whether this process gets the weights; others get an empty dictionary.

    Raises:
        StorageError: on every rank; the temporary files do not fit.
    """
    shards: dict[str, Any] = get_model_state_dict(model)
    with contextlib.ExitStack() as stack:
        scratch: Path | None = None
        if keep:
            folder.mkdir(parents=True, exist_ok=True)
            own = tempfile.TemporaryDirectory(prefix="gathering-", dir=folder)
            scratch = Path(stack.enter_context(own))
        weights: dict[str, Tensor] = {}
        for number, (name, shard) in enumerate(shards.items()):
            whole = _whole(shard)
            stored = raise_together(functools.partial(_in_file, whole, scratch, number))
            if stored is not None:
                weights[name] = stored
        yield weights
        weights.clear()


def _whole(shard: Tensor) -> Tensor:
    """The whole tensor, on every rank; of a shard offloaded to the CPU too."""
    if not isinstance(shard, DTensor):
        return shard.detach()
    device = shard.device_mesh.device_type
    placed: Any = shard if shard.device.type == device else shard.to(device)
    whole: Tensor = placed.full_tensor()
    return whole.detach()


def _in_file(whole: Tensor, scratch: Path | None, number: int) -> Tensor | None:
    """A copy of a tensor in a file of a folder; None without a folder."""
    if scratch is None:
        return None
    if not whole.numel():
        return whole.cpu()
    file = scratch / str(number)
    with storage_errors(file):
        with file.open("wb") as opened:  # a page that does not fit would end the process
            _reserve(opened.fileno(), whole.numel() * whole.element_size())
        flat = torch.from_file(str(file), shared=True, size=whole.numel(), dtype=whole.dtype)
        stored = flat.view(whole.shape)
        return stored.copy_(whole)


def _reserve(file: int, size: int) -> None:
    """Make a file `size` bytes long, with its blocks allocated."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)
