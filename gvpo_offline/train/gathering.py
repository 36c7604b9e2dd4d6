"""The whole weights of a sharded model, gathered without holding them in memory."""

from __future__ import annotations

import contextlib
import functools
import mmap
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

_ALIGNMENT = 64


@contextlib.contextmanager
def gathered_weights(model: nn.Module, folder: Path, *, keep: bool) -> Iterator[dict[str, Tensor]]:
    """Within it, the whole weights of a model that FSDP2 has sharded; every rank must enter it.

    Tensors are gathered one at a time and kept in a file, whose pages the system can write out: no
    rank needs memory for more than its shards and one tensor. The file has no name, so that none
    is left when a process is killed.

    Args:
        model: the model.
        folder: where the weights will be saved; as much again is taken there while this lasts.
        keep: whether this process gets the weights; others get an empty dictionary.

    Raises:
        StorageError: on every rank; there is no room for the file.
    """
    shards: dict[str, Any] = get_model_state_dict(model)
    kept = raise_together(functools.partial(_space, shards, folder) if keep else _none)
    weights = kept or {}
    for name, shard in shards.items():
        whole = _whole(shard)
        if kept is not None:
            weights[name].copy_(whole)
    yield weights
    weights.clear()


def _none() -> None:
    return None


def _space(shards: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Uninitialised tensors of the whole shapes, in a file of the folder."""
    sizes = {k: own.numel() * own.element_size() for k, own in shards.items()}
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:  # the mapping outlives it
            _reserve(file.fileno(), max(end, 1))  # a page without room would end the process
            mapped = mmap.mmap(file.fileno(), max(end, 1))
    return {
        name: torch.frombuffer(
            mapped, dtype=own.dtype, count=own.numel(), offset=offsets[name]
        ).view(own.shape)
        if own.numel()
        else torch.empty(own.shape, dtype=own.dtype)
        for name, own in shards.items()
    }


def _whole(shard: Tensor) -> Tensor:
    """The whole tensor, on every rank; of a shard offloaded to the CPU too."""
    if not isinstance(shard, DTensor):
        return shard.detach()
    device = shard.device_mesh.device_type
    placed: Any = shard if shard.device.type == device else shard.to(device)
    whole: Tensor = placed.full_tensor()
    return whole.detach()


def _reserve(file: int, size: int) -> None:
    """Make a file `size` bytes long, with its blocks allocated."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)
