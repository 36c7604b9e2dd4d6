"""Attention over a packed row, registered in transformers' AttentionInterface.

The code of models is not changed. Models look up their attention function by name;
`use_tree_attention` sets a name under which `tree_attention` is registered. That function reads the
tree of a packed row from the keyword argument `packed_row`, which models pass through to it. Calls
without `packed_row` go to the implementation that the model had before.

Which earlier tokens a layer attends to (all, a sliding window, a chunk) is read from transformers'
mask functions. They are evaluated on positions in the sequence (depths in the tree), not on
positions in the row.
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gvpo_offline.compute.devices import autocast_dtype_of, to_device
from gvpo_offline.compute.pieces import PiecePlan, piecewise_attention
from gvpo_offline.compute.settings import TREE_ATTENTION_PREFIX
from gvpo_offline.compute.tree import AttentionRule, Tree, visible

Kernel = Literal["pieces", "flex", "dense"]
KeyValueStates = dict[nn.Module, tuple[Tensor, Tensor]]

_KINDS: tuple[Literal["full", "window", "chunk"], ...] = ("full", "window", "chunk")
_in_packed_forward: contextvars.ContextVar[bool] = contextvars.ContextVar("packed", default=False)


class UnsupportedAttentionError(Exception):
    """The attention of a model cannot compute packed rows; the message gives the reason."""


@dataclass(eq=False)
class PackedRow:
    """A packed row, passed to every attention layer of a model.

    Attributes:
        tree: the segments of the row.
        kernel: name of the attention kernel.
        prefix_states: for each attention module the keys and values, (1, Hkv, P, D) each, of the
            tree's prefix; None if the tree has no prefix.
        recorded: filled with the keys and values of each attention module; None: not recorded.
        used: whether an attention layer has received the row.
    """

    tree: Tree
    kernel: str
    prefix_states: KeyValueStates | None = None
    recorded: KeyValueStates | None = None
    used: bool = False
    _plans: dict[Any, Any] = field(default_factory=dict, repr=False)

    def check_used(self) -> None:
        """Raise UnsupportedAttentionError if no attention layer received the row."""
        if not self.used:
            raise UnsupportedAttentionError(
                "the model does not look up its attention in transformers' AttentionInterface"
            )

    def plan(self, key: Any, make: Callable[[], Any]) -> Any:
        """The result of `make()`, computed once per key and shared by all layers."""
        if key not in self._plans:
            self._plans[key] = make()
        return self._plans[key]


def use_tree_attention(model: nn.Module) -> None:
    """Enable packed rows for a transformers model. Calls without a packed row are unchanged.

    Raises:
        UnsupportedAttentionError: the model does not look up its attention function by name.
    """
    current = str(getattr(model.config, "_attn_implementation", None))
    if current.startswith(TREE_ATTENTION_PREFIX):
        return
    name = TREE_ATTENTION_PREFIX + current
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(tree_attention, otherwise=current))
        AttentionMaskInterface.register(name, partial(_mask_or_rule, otherwise=current))
    try:
        model.set_attn_implementation(name)  # type: ignore[operator]
    except (AttributeError, ValueError) as error:
        raise UnsupportedAttentionError(str(error).splitlines()[0]) from error


def restore_attention(model: nn.Module) -> None:
    """Undo `use_tree_attention`."""
    current = str(getattr(model.config, "_attn_implementation", None))
    if current.startswith(TREE_ATTENTION_PREFIX):
        model.set_attn_implementation(current.removeprefix(TREE_ATTENTION_PREFIX))  # type: ignore[operator]


def kernels(device: torch.device) -> tuple[Kernel, ...]:
    """Kernels available on a type of device, fastest first."""
    fastest: dict[str, tuple[Kernel, ...]] = {"cpu": ("pieces",), "cuda": ("flex",)}
    return (*fastest.get(device.type, ()), "dense")


@contextlib.contextmanager
def packed_forward() -> Iterator[None]:
    """Within it, the mask functions return an encoded `AttentionRule` in place of a mask."""
    token = _in_packed_forward.set(True)
    try:
        yield
    finally:
        _in_packed_forward.reset(token)


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    otherwise: str,
    packed_row: PackedRow | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers' AttentionInterface, with support for packed rows.

    Args:
        module: the attention layer.
        query: (1, H, T, D); key and value: (1, Hkv, T, D).
        attention_mask: the result of `_mask_or_rule`.
        otherwise: name of the implementation for calls without a packed row.
        packed_row: the packed row; None for an ordinary call.
        scaling, dropout, softcap, s_aux: as passed by transformers; `s_aux` are attention sinks.
        kwargs: ignored for a packed row: keys already contain positions, the rule contains windows.

    Returns:
        (1, T, H, Dv) and None for the attention weights.

    Raises:
        UnsupportedAttentionError: the layer uses an option that packed rows do not support.
    """
    if packed_row is None:
        given = {"scaling": scaling, "dropout": dropout, "softcap": softcap, "s_aux": s_aux}
        kwargs |= {name: option for name, option in given.items() if option is not None}
        plain = _plain(module, otherwise)
        return plain(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    if dropout:
        raise UnsupportedAttentionError("attention has a dropout")
    packed_row.used = True
    rule = _rule_from(attention_mask)
    dtype = _matmul_dtype(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if packed_row.recorded is not None:
        # Gradient checkpointing runs a layer twice; only the first run's tensors are in the graph.
        packed_row.recorded.setdefault(module, (key, value))
    if packed_row.prefix_states is not None:
        prefix_key, prefix_value = packed_row.prefix_states[module]
        key, value = torch.cat([prefix_key, key], 2), torch.cat([prefix_value, value], 2)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    asked = AttentionInputs(query, key, value, scale, softcap, s_aux)
    return _KERNELS[packed_row.kernel](packed_row, rule, asked), None


# ---- kernels: a packed row, the layer's rule and its inputs -> (1, T, H, Dv) ----


class AttentionInputs(NamedTuple):
    """Inputs of one layer's attention: query (1, H, T, D), key and value (1, Hkv, P + T, ·)."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None


def _pieces(row: PackedRow, rule: AttentionRule, asked: AttentionInputs) -> Tensor:
    query, key, value, scale, softcap, sinks = asked
    if softcap:
        raise UnsupportedAttentionError("attention scores are soft-capped")
    plan = row.plan(("pieces", rule, query.dtype), lambda: PiecePlan(row.tree, rule, query.dtype))
    return piecewise_attention(query, key, value, plan, scale, sinks)


def _flex(row: PackedRow, rule: AttentionRule, asked: AttentionInputs) -> Tensor:
    from gvpo_offline.compute.flex import FlexPlan, flex_tree_attention

    query, key, value, scale, softcap, sinks = asked
    device = query.device  # layers of a model may be on several
    plan = row.plan(("flex", rule, device), lambda: FlexPlan(row.tree, rule, device))
    return flex_tree_attention(query, key, value, plan, scale, softcap, sinks)


def _dense(row: PackedRow, rule: AttentionRule, asked: AttentionInputs) -> Tensor:
    """Reference implementation, which materialises scores of (H, T, P + T)."""
    query, key, value, scale, softcap, sinks = asked
    seen: Tensor = row.plan(
        ("dense", rule, query.device), lambda: to_device(visible(row.tree, rule), query.device)
    )
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if not softcap and sinks is None:
        out: Tensor = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=scale
        )
        return out.transpose(1, 2)
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        own = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, own], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[2]].to(value.dtype)
    return torch.matmul(weights, value).transpose(1, 2)


_Compute = Callable[[PackedRow, AttentionRule, AttentionInputs], Tensor]
_KERNELS: dict[str, _Compute] = {"pieces": _pieces, "flex": _flex, "dense": _dense}


# ---- masks ----


def _mask_or_rule(*args: Any, otherwise: str, **kwargs: Any) -> Tensor | None:
    """transformers' mask function; within `packed_forward` the rule as a (1, 1, 1, 2) tensor."""
    if not _in_packed_forward.get():
        plain = ALL_MASK_ATTENTION_FUNCTIONS.get(otherwise)
        mask: Tensor | None = None if plain is None else plain(*args, **kwargs)
        return mask
    rule = _rule_of(kwargs["mask_function"], kwargs.get("local_size"))
    # On the CPU, where reading it waits for nothing, whatever the default device is.
    encoded = torch.tensor([_KINDS.index(rule.kind), rule.size], device="cpu")
    return encoded.view(1, 1, 1, 2)


def _rule_of(mask_function: Callable[..., Any], size: int | None) -> AttentionRule:
    """The rule that a mask function implements, inferred by evaluating it at its boundaries."""

    def sees(query: int, key: int) -> bool:
        zero = torch.zeros((), dtype=torch.int64, device="cpu")
        return bool(mask_function(zero, zero, zero + query, zero + key))

    try:
        if (not sees(1, 0) and size != 1) or sees(0, 1):
            raise UnsupportedAttentionError("a layer's attention is not causal")
        if size is None:
            if sees(1 << 20, 0):
                return AttentionRule()
        elif sees(size - 1, 0) and not sees(size, 0):
            if sees(size, 1):
                return AttentionRule("window", size)
            if not sees(size, size - 1):
                return AttentionRule("chunk", size)
    except (IndexError, RuntimeError) as error:
        raise UnsupportedAttentionError("a layer's mask depends on more than positions") from error
    raise UnsupportedAttentionError("a layer's mask is neither causal nor a window nor chunks")


def _rule_from(mask: Tensor | None) -> AttentionRule:
    if mask is None or mask.shape != (1, 1, 1, 2) or mask.dtype != torch.int64:
        raise UnsupportedAttentionError("the model builds its attention masks itself")
    kind, size = mask.flatten().tolist()
    return AttentionRule(_KINDS[kind], size)


# ---- helpers ----


def _plain(module: nn.Module, name: str) -> Callable[..., Any]:
    found = ALL_ATTENTION_FUNCTIONS.get(name)
    if found is None:  # eager attention is defined in the model's module
        found = sys.modules[type(module).__module__].eager_attention_forward
    return found  # type: ignore[no-any-return]


def _matmul_dtype(query: Tensor) -> torch.dtype:
    return autocast_dtype_of(query.device) or query.dtype
