"""Operations of a training step, by matrix products: layers, attention over visible pairs, head.

A product of (m, n) by (n, p) has 2 m n p operations. The backward pass has twice those of the
forward pass: the gradients of the inputs, and those of the weights, if these are trained. The
scores that flash attention computes again in its backward pass are not counted, as in the usual
definitions of model and hardware FLOPs utilisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gvpo_offline.plan.shapes import LayerShape, ModelShape
from gvpo_offline.stream.plan import GroupShape


@dataclass(frozen=True)
class Work:
    """What some groups make a model compute.

    Attributes:
        tokens: input tokens in the layout.
        scored: hidden rows that the output layer is computed for.
        groups: their lengths, for the attention.
        layout: of the model's input.
    """

    tokens: int
    scored: int
    groups: tuple[GroupShape, ...]
    layout: str

    @classmethod
    def of(cls, groups: Iterable[GroupShape], layout: str = "shared") -> Work:
        """The work of groups in a layout."""
        groups = tuple(groups)
        scored = sum(
            1 + sum(group.responses) - group.rows
            if layout in ("shared", "continued")
            else sum(group.responses)
            for group in groups
        )
        return cls(sum(group.tokens(layout) for group in groups), scored, groups, layout)

    def pairs(self, layer: LayerShape) -> float:
        """Pairs of a query and a key that it sees in a layer."""
        shared = self.layout in ("shared", "continued")
        total = 0.0
        for group in self.groups:
            prompt = _pairs(group.prompt, layer)
            rows = sum(_pairs(group.prompt + n - 1, layer) for n in group.responses)
            total += rows - (group.rows - 1) * prompt if shared else rows
        return total


def _pairs(length: int, layer: LayerShape) -> float:
    """Visible pairs of one row of a length."""
    size = layer.window
    if layer.kind in ("linear", "conv"):
        return 0.0
    if not size or length <= size:
        return length * (length + 1) / 2
    if layer.kind == "window":
        return size * (size + 1) / 2 + (length - size) * size
    whole, rest = divmod(length, size)
    return whole * size * (size + 1) / 2 + rest * (rest + 1) / 2


@dataclass(frozen=True)
class Operations:
    """Operations of a step.

    Attributes:
        layers: of the layers' matrices.
        attention: of scores and their products with values.
        head: of the output layer.
        again: of the forward passes that are computed again: activation checkpointing, and logits
            that were not kept.
    """

    layers: float
    attention: float
    head: float
    again: float

    @property
    def model(self) -> float:
        """Without what is computed again; model FLOPs utilisation is of these."""
        return self.layers + self.attention + self.head

    @property
    def total(self) -> float:
        """All that are computed."""
        return self.model + self.again


def operations(
    shape: ModelShape,
    work: Work,
    *,
    frozen: bool = False,
    checkpointing: bool = False,
    recomputed_logits: float = 0.0,
) -> Operations:
    """The operations of a forward and a backward pass.

    Args:
        shape: of the model.
        work: the groups.
        frozen: the model's weights have no gradient, as with an adapter, whose own products are
            not counted.
        checkpointing: layers are computed again in the backward pass.
        recomputed_logits: share of the logits that are computed again, if weights are trained.
    """
    return operations_of(
        shape,
        tokens=work.tokens,
        scored=work.scored,
        pairs=[work.pairs(layer) for layer in shape.layers],
        frozen=frozen,
        checkpointing=checkpointing,
        recomputed_logits=recomputed_logits,
    )


def operations_of(
    shape: ModelShape,
    *,
    tokens: float,
    scored: float,
    pairs: Sequence[float],
    frozen: bool = False,
    checkpointing: bool = False,
    recomputed_logits: float = 0.0,
) -> Operations:
    """As `operations`, for numbers of tokens, scored rows, and visible pairs of each layer."""
    layers = 2.0 * shape.active * tokens
    attention = sum(
        2.0 * (layer.query + layer.output) * own + _state(layer) * tokens
        for layer, own in zip(shape.layers, pairs, strict=True)
    )
    head = 2.0 * shape.embedding * scored
    passes = 2.0 if frozen else 3.0
    again = (layers + attention) if checkpointing else 0.0
    # A frozen output layer takes its gradient in the forward pass: nothing is computed again.
    again += 0.0 if frozen else recomputed_logits * head
    return Operations(passes * layers, 3.0 * attention, passes * head, again)


def _state(layer: LayerShape) -> float:
    """Operations of a token with the state of linear attention: decay, write and read."""
    if layer.kind != "linear":
        return 0.0
    return 6.0 * layer.value * layer.key / max(layer.heads, 1)
