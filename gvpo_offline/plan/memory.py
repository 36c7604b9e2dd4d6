"""Bytes of a training step on one rank, from shapes.

The bytes of a token in a layer are the tensors that autograd keeps in transformers' code of a
Llama: for each normalisation its input, the normalised tensor and the input of the products that
follow; queries, keys, values and output of the attention; four tensors of the width of the MLP.
docs/howto/plan.md has the arithmetic of one model by hand, and how far measurements are off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gvpo_offline.plan.shapes import LayerShape, ModelShape

Sharding = Literal["none", "ddp", "fsdp2", "zero3"]
# Most bytes of a block of logits, and fewest columns, as in compute/vocabulary.py, which needs
# torch.
_BLOCK = {"cpu": 64 << 20, "gpu": 1 << 30}
_MIN_COLUMNS = 1024
# DeepSpeed's stage3_max_live_parameters.
_LIVE = 1e9
# Tensors of the size of the weights that an optimizer keeps, and bytes of one of their numbers; 0:
# those of a weight. Others have two of the weights' type, as AdamW.
_STATES: tuple[tuple[str, float, float], ...] = (
    ("adafactor", 0.01, 4),  # a row and a column of each matrix
    ("lion_8bit", 1, 1.02),
    ("8bit", 2, 1.02),  # with the scales of blocks
    ("lion", 1, 0),
    ("sgd", 0, 0),
    ("adagrad", 1, 0),
    ("rmsprop", 1, 0),
)


@dataclass(frozen=True)
class TrainingShape:
    """How a model is trained.

    Attributes:
        weight_bytes: of a weight: 4 or 2.
        autocast: whether products of float32 weights are in 16 bits.
        lora_r: rank of an adapter on all linear layers but the output layer; 0: the whole model is
            trained.
        adapter_bytes: of a weight of the adapter: PEFT's are float32.
        quantised: bits of a weight of frozen linear layers, 4 or 8; 0: not quantised.
        optim: name of the optimizer, as transformers has it.
        ranks: processes, each with a device.
        sharding: how they divide the model.
        checkpointing: activations of layers are computed again.
        kept_logits: bytes of logits that are kept for the backward pass.
        device: "gpu" or "cpu".
    """

    weight_bytes: int = 4
    autocast: bool = False
    lora_r: int = 0
    adapter_bytes: int = 4
    quantised: int = 0
    optim: str = "adamw_torch_fused"
    ranks: int = 1
    sharding: Sharding = "none"
    checkpointing: bool = False
    kept_logits: float = 1024e6
    device: Literal["gpu", "cpu"] = "gpu"

    @property
    def narrow(self) -> bool:
        """Whether products are in 16 bits."""
        return self.autocast or self.weight_bytes == 2

    @property
    def shards(self) -> int:
        """Among how many ranks weights, gradients and optimizer states are divided."""
        return self.ranks if self.sharding in ("fsdp2", "zero3") else 1

    @property
    def trained_bytes(self) -> int:
        """Bytes of a weight that is trained."""
        return self.adapter_bytes if self.lora_r else self.weight_bytes

    def trained(self, shape: ModelShape) -> int:
        """Weights that are trained."""
        if not self.lora_r:
            return shape.parameters
        return sum(self.lora_r * (a + b) for layer in shape.layers for a, b in _adapted(layer))

    def recomputed_logits(self, shape: ModelShape, scored: int) -> float:
        """Share of the logits of a micro-batch that are not kept."""
        size = _product_bytes(self) * scored * shape.vocabulary
        return 0.0 if size <= self.kept_logits else 1 - self.kept_logits / size


@dataclass(frozen=True)
class StepBytes:
    """Bytes at the peak of a step.

    Attributes:
        held: what is there throughout: weights, gradients, optimizer states, buffers.
        phases: what else is there at each moment that may be the peak.
    """

    held: Mapping[str, float]
    phases: Mapping[str, Mapping[str, float]]

    @property
    def peak(self) -> str:
        """The phase with most bytes."""
        return max(self.phases, key=lambda name: math.fsum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """All parts at the peak."""
        parts = {**self.held, **self.phases[self.peak]}
        return {name: size for name, size in parts.items() if size}

    @property
    def total(self) -> float:
        """Their sum."""
        return math.fsum(self.parts.values())


def step_bytes(shape: ModelShape, how: TrainingShape, *, tokens: int, scored: int) -> StepBytes:
    """The bytes of a step on one rank.

    Args:
        shape: of the model.
        how: it is trained.
        tokens: input tokens of the largest micro-batch, padding included.
        scored: rows of it that predict a token of a response.
    """
    held = {**_states(shape, how), **_buffers(shape, how)}
    residual = how.weight_bytes
    kept = [tokens * layer_bytes(shape, layer, how) for layer in shape.layers]
    largest = max(kept)
    layer = shape.layers[kept.index(largest)]
    inputs = float(residual * shape.width * tokens * len(kept))
    activations: dict[str, float] = (
        {"inputs of all layers": inputs}
        if how.checkpointing
        else {"activations of all layers": math.fsum(kept)}
    )
    copies = _copies(shape, how)
    last = float((4 + 2 * residual) * shape.width * tokens)
    weight = 0.0 if how.lora_r else float(how.weight_bytes * shape.embedding)
    head = {**_head(shape, how, scored), "gradient of the output layer": weight}
    again: dict[str, float] = {"one layer, computed again": largest} if how.checkpointing else {}
    again["gradients of its activations" if how.checkpointing else "gradients of a layer"] = (
        2.0 * tokens * (residual * shape.width + _product_bytes(how) * layer.mlp)
    )
    # The gradient of a tied output layer waits for that of the embedding.
    waiting = {"gradient of the output layer": weight if shape.tied else 0.0}
    return StepBytes(
        held,
        {
            "output layer": {**activations, **copies, "last hidden states": last, **head},
            "last layer": {
                **activations,
                **copies,
                **again,
                "gradient of the last hidden states": float(residual * shape.width * tokens),
                **waiting,
            },
            "embedding": {**waiting, "gradient of the embedding": weight},
        },
    )


def layer_bytes(shape: ModelShape, layer: LayerShape, how: TrainingShape) -> float:
    """Bytes of a token that a layer keeps for its backward pass, its input included."""
    size, residual, width = _product_bytes(how), how.weight_bytes, shape.width
    frozen = bool(how.lora_r)
    norms = 0.0
    for products in (3, 2 if layer.gated else 1):
        # Under autocast each product has its own copy in 16 bits of the float32 input.
        following = size * products if residual > size else size
        if layer.layer_norm:
            norms += residual + following
        else:
            norms += 4 + (0 if frozen else residual) + following
    norms += 8.0 * (layer.norms - 2)
    attention = size * (layer.query + layer.output + layer.key + layer.value) + 4 * layer.heads
    if layer.query_norm:
        attention += (4 + (0 if frozen else size)) * (layer.query + layer.key)
    if layer.kind == "linear":  # inputs and outputs of the convolution, float32 states of chunks
        attention += 2 * size * (2 * layer.key + layer.value) + 8 * (2 * layer.key + layer.value)
    mlp = (4 if layer.gated else 2) * size * layer.mlp
    routed = 2.0 * size * layer.experts_per_token * width
    adapter = 0.0
    if frozen and residual < how.adapter_bytes:  # an adapter's wider copies of its inputs
        adapter = float(how.adapter_bytes) * sum(a for a, _ in _adapted(layer))
    return norms * width + attention + mlp + routed + adapter


def _adapted(layer: LayerShape) -> tuple[tuple[int, int], ...]:
    return (*layer.matrices, *(layer.expert * layer.experts))


def _product_bytes(how: TrainingShape) -> int:
    return 2 if how.narrow else 4


def _states(shape: ModelShape, how: TrainingShape) -> dict[str, float]:
    """Weights, gradients and optimizer states of one rank."""
    size, trained = how.weight_bytes, how.trained(shape)
    own = how.trained_bytes
    weights = float(size * shape.parameters)
    if how.quantised:
        linear = sum(a * b for layer in shape.layers for a, b in _adapted(layer))
        weights += linear * (how.quantised / 8 * 1.03 - size)
    if how.lora_r:
        weights += own * trained
    if how.sharding == "zero3" and how.narrow:
        weights += 4.0 * trained  # DeepSpeed's float32 copy
    states = next(((n, b or own) for name, n, b in _STATES if name in how.optim), (2.0, float(own)))
    return {
        "weights": weights / how.shards,
        "gradients": own * trained / how.shards,
        "optimizer states": states[0] * states[1] * trained / how.shards,
    }


def _buffers(shape: ModelShape, how: TrainingShape) -> dict[str, float]:
    """What ranks need to communicate."""
    size = 2 if how.narrow else how.weight_bytes
    largest = max(layer.parameters for layer in shape.layers)
    if how.sharding == "ddp":
        return {"buckets of gradients": float(how.trained_bytes * how.trained(shape))}
    if how.sharding == "fsdp2":
        outer = shape.parameters - shape.decoder
        gathered = size * (2.0 * largest + outer)
        reduced = 0.0 if how.lora_r else 2.0 * size * largest
        return {"gathered layers": gathered + reduced}
    if how.sharding == "zero3":
        return {"gathered layers": size * min(float(shape.parameters), _LIVE)}
    return {}


def _copies(shape: ModelShape, how: TrainingShape) -> dict[str, float]:
    """The copies in 16 bits of float32 weights that autocast makes; FSDP2 gathers such copies."""
    if not how.autocast or how.weight_bytes == 2 or how.sharding in ("fsdp2", "zero3"):
        return {}
    # Copies of frozen weights are not cached: they last as long as the layer needs them.
    one = bool(how.lora_r) and how.checkpointing
    held = max(layer.parameters for layer in shape.layers) if one else shape.decoder
    return {"copies of the weights in 16 bits": 2.0 * held}


def _head(shape: ModelShape, how: TrainingShape, scored: int) -> dict[str, float]:
    """The log-probs of a micro-batch and their backward pass."""
    size, rows = _product_bytes(how), max(scored, 1)
    most = max(_BLOCK[how.device] // (4 * rows), _MIN_COLUMNS)
    block = 4.0 * rows * math.ceil(shape.vocabulary / max(math.ceil(shape.vocabulary / most), 1))
    logits = float(size) * rows * shape.vocabulary
    kept = 0.0 if how.lora_r else min(how.kept_logits, logits)
    if size == 4 and kept == logits:
        block = 0.0  # the kept logits are the blocks
    copied = how.autocast and how.weight_bytes == 4 and how.device == "gpu"
    return {
        "kept logits": kept,
        "a block of logits": block,
        "copy of the output layer": 2.0 * shape.embedding if copied else 0.0,
        "scored rows and their gradients": (how.weight_bytes + 8.0 + size) * shape.width * rows,
    }
