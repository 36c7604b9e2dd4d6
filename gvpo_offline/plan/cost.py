"""Seconds of a training step, from its operations and bytes and the data sheet of a device."""

from __future__ import annotations

from dataclasses import dataclass

from gvpo_offline.plan.compute import Operations
from gvpo_offline.plan.devices import Device
from gvpo_offline.plan.memory import TrainingShape
from gvpo_offline.plan.shapes import ModelShape

# Of its memory, what a run can use: the rest is for the context of the driver, libraries, and
# memory that is free in pieces too small to use.
USABLE = 0.92


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step on the rank that takes longest.

    Attributes:
        products: of matrix products, at the stated share of the device's peak.
        exchange: of the bytes between ranks, at the link's full bandwidth. Products and exchange
            overlap: the longer one counts.
        update: of reading and writing weights, gradients and optimizer states once.
    """

    products: float
    exchange: float
    update: float

    @property
    def total(self) -> float:
        """Of the step."""
        return max(self.products, self.exchange) + self.update


def step_seconds(
    shape: ModelShape,
    how: TrainingShape,
    work: Operations,
    device: Device,
    *,
    share: float,
    passes: int,
) -> StepSeconds:
    """The seconds of a step.

    Args:
        shape: of the model.
        how: it is trained.
        work: operations of the rank that has most.
        device: of each rank.
        share: of the device's dense peak that products reach.
        passes: forward passes of a step.
    """
    trained, own = how.trained(shape), how.trained_bytes
    part = (how.ranks - 1) / how.ranks
    size = 2 if how.narrow else how.weight_bytes
    moved = 0.0
    if how.sharding == "ddp":
        moved = 2 * part * own * trained
    elif how.sharding in ("fsdp2", "zero3"):
        # Weights are gathered for the forward and for the backward pass, gradients scattered.
        gathered = 2.0 * size * shape.parameters * passes
        scattered = float(size * trained) * (passes if how.sharding == "zero3" else 1)
        moved = part * (gathered + scattered)
    # Weight, gradient and two moments are read, and all but the gradient written.
    update = 7.0 * own * trained / how.shards / device.bandwidth
    seconds = work.total / (share * device.peak(narrow=how.narrow))
    return StepSeconds(seconds, moved / device.link, update)
