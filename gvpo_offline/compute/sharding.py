"""Weights divided among the ranks of a launcher (FSDP2), for inference."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gvpo_offline.compute.model import outermost_layers
from gvpo_offline.compute.widening import widen, widens


def shard_model(model: nn.Module, device: torch.device) -> None:
    """Divide a model's weights among all ranks; every rank must call this, at the same time.

    Each layer is gathered for as long as it computes; the embedding, the output layer and the last
    norm stay gathered between passes. Weights move to the device a layer at a time, so that no
    device holds more than its shards and one layer.

    Args:
        model: a model in host memory, with the same weights on every rank. Where they are to be
            float32 (see `widening.widen_later`), each rank converts its shards.
        device: this rank's device.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    model.requires_grad_(False)
    for layer in outermost_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if widens(model):
        widen(model)
