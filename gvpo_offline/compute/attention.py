"""Attention over a packed row, as transformers' models call it.

Models are not changed. They look their attention function up by name; `use_tree_attention` gives
them a name under which `tree_attention` is registered. It reads a packed row's tree from the
keyword argument `packed_row`, which models hand through to it; calls without one go to the
implementation that the model had before.

What a layer lets a token see (all before it, a window, a chunk) is asked of transformers' own mask
functions, by depth in the tree and not by place in the row.
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

from gvpo_offline.compute.pieces import PiecePlan, piecewise_attention
from gvpo_offline.compute.settings import TREE_OVER
from gvpo_offline.compute.tree import Rule, Tree, visible

Kernel = Literal["pieces", "flex", "dense"]
States = dict[nn.Module, tuple[Tensor, Tensor]]

_KINDS: tuple[Literal["full", "window", "chunk"], ...] = ("full", "window", "chunk")
_in_packed_forward: contextvars.ContextVar[bool] = contextvars.ContextVar("packed", default=False)


class UnsupportedAttentionError(Exception):
    """A model's attention is none that a packed row can be computed with; says why."""


@dataclass(eq=False)
class PackedRow:
    """A packed row on its way through a model.

    Attributes:
        tree: its segments.
        kernel: what computes it.
        prefix_states: keys and values, (1, Hkv, P, D) each, of the tree's prefix by attention
            module.
        recorded: where keys and values are left as they are computed, or None.
        used: whether an attention layer has seen the row.
    """

    tree: Tree
    kernel: str
    prefix_states: States | None = None
    recorded: States | None = None
    used: bool = False
    _plans: dict[Any, Any] = field(default_factory=dict, repr=False)

    def check_used(self) -> None:
        """Raise UnsupportedAttentionError unless the row reached an attention layer."""
        if not self.used:
            raise UnsupportedAttentionError(
                "the model does not look its attention up in transformers' AttentionInterface"
            )

    def plan(self, key: Any, make: Callable[[], Any]) -> Any:
        """What a kernel derives from the tree, made once for all layers."""
        if key not in self._plans:
            self._plans[key] = make()
        return self._plans[key]


def use_tree_attention(model: nn.Module) -> None:
    """Let a transformers model compute packed rows; what it computes without one stays the same.

    Raises:
        UnsupportedAttentionError: the model does not look its attention up by name.
    """
    current = str(getattr(model.config, "_attn_implementation", None))
    if current.startswith(TREE_OVER):
        return
    name = TREE_OVER + current
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
    if current.startswith(TREE_OVER):
        model.set_attn_implementation(current.removeprefix(TREE_OVER))  # type: ignore[operator]


def kernels(device: torch.device) -> tuple[Kernel, ...]:
    """The kernels that a kind of device has, the fastest first."""
    fastest: dict[str, tuple[Kernel, ...]] = {"cpu": ("pieces",), "cuda": ("flex",)}
    return (*fastest.get(device.type, ()), "dense")


@contextlib.contextmanager
def packed_forward() -> Iterator[None]:
    """Within it, models are given rules in place of attention masks."""
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
    """An attention function of transformers' interface; for a packed row, over its tree.

    Args:
        module: the attention layer.
        query: (1, H, T, D); key and value: (1, Hkv, T, D).
        attention_mask: what `_mask_or_rule` made.
        otherwise: the implementation that computes calls without a packed row.
        packed_row: the row; None for an ordinary call.
        scaling, dropout, softcap, s_aux: as transformers passes them; `s_aux` are sinks.
        kwargs: not needed over a tree: positions are in the keys, windows in the rule.

    Returns:
        (1, T, H, Dv), and no attention weights.

    Raises:
        UnsupportedAttentionError: the row cannot be computed with what the layer asks for.
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
        # Gradient checkpointing computes a layer twice; what the first time left has the graph.
        packed_row.recorded.setdefault(module, (key, value))
    if packed_row.prefix_states is not None:
        prefix_key, prefix_value = packed_row.prefix_states[module]
        key, value = torch.cat([prefix_key, key], 2), torch.cat([prefix_value, value], 2)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    asked = Asked(query, key, value, scale, softcap, s_aux)
    return _KERNELS[packed_row.kernel](packed_row, rule, asked), None


# ---- kernels: a row, a layer's rule and what it asks for -> (1, T, H, Dv) ----


class Asked(NamedTuple):
    """What a layer asks for: query (1, H, T, D), key and value (1, Hkv, P + T, ·), options."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None


def _pieces(row: PackedRow, rule: Rule, asked: Asked) -> Tensor:
    query, key, value, scale, softcap, sinks = asked
    if softcap:
        raise UnsupportedAttentionError("attention scores are soft-capped")
    plan = row.plan(("pieces", rule, query.dtype), lambda: PiecePlan(row.tree, rule, query.dtype))
    return piecewise_attention(query, key, value, plan, scale, sinks)


def _flex(row: PackedRow, rule: Rule, asked: Asked) -> Tensor:
    from gvpo_offline.compute.flex import FlexPlan, flex_tree_attention

    query, key, value, scale, softcap, sinks = asked
    plan = row.plan(("flex", rule), lambda: FlexPlan(row.tree, rule, query.device))
    return flex_tree_attention(query, key, value, plan, scale, softcap, sinks)


def _dense(row: PackedRow, rule: Rule, asked: Asked) -> Tensor:
    """The definition, in scores of (H, T, P + T)."""
    query, key, value, scale, softcap, sinks = asked
    seen: Tensor = row.plan(
        ("dense", rule), lambda: torch.from_numpy(visible(row.tree, rule)).to(query.device)
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


_Compute = Callable[[PackedRow, Rule, Asked], Tensor]
_KERNELS: dict[str, _Compute] = {"pieces": _pieces, "flex": _flex, "dense": _dense}


# ---- masks ----


def _mask_or_rule(*args: Any, otherwise: str, **kwargs: Any) -> Tensor | None:
    """transformers' mask function; in a packed forward a (1, 1, 1, 2) tensor: the layer's rule."""
    if not _in_packed_forward.get():
        plain = ALL_MASK_ATTENTION_FUNCTIONS.get(otherwise)
        mask: Tensor | None = None if plain is None else plain(*args, **kwargs)
        return mask
    rule = _rule_of(kwargs["mask_function"], kwargs.get("local_size"))
    return torch.tensor([_KINDS.index(rule.kind), rule.size]).view(1, 1, 1, 2)


def _rule_of(mask_function: Callable[..., Any], size: int | None) -> Rule:
    """The rule that a mask function follows, tried at its edges."""

    def sees(query: int, key: int) -> bool:
        zero = torch.zeros((), dtype=torch.int64)
        return bool(mask_function(zero, zero, zero + query, zero + key))

    try:
        if (not sees(1, 0) and size != 1) or sees(0, 1):
            raise UnsupportedAttentionError("a layer's attention is not causal")
        if size is None:
            if sees(1 << 20, 0):
                return Rule()
        elif sees(size - 1, 0) and not sees(size, 0):
            if sees(size, 1):
                return Rule("window", size)
            if not sees(size, size - 1):
                return Rule("chunk", size)
    except (IndexError, RuntimeError) as error:
        raise UnsupportedAttentionError("a layer's mask depends on more than positions") from error
    raise UnsupportedAttentionError("a layer's mask is neither causal nor a window nor chunks")


def _rule_from(mask: Tensor | None) -> Rule:
    if mask is None or mask.shape != (1, 1, 1, 2) or mask.dtype != torch.int64:
        raise UnsupportedAttentionError("the model makes its attention masks itself")
    kind, size = mask.flatten().tolist()
    return Rule(_KINDS[kind], size)


# ---- the rest ----


def _plain(module: nn.Module, name: str) -> Callable[..., Any]:
    found = ALL_ATTENTION_FUNCTIONS.get(name)
    if found is None:  # eager: each model brings its own
        found = sys.modules[type(module).__module__].eager_attention_forward
    return found  # type: ignore[no-any-return]


def _matmul_dtype(query: Tensor) -> torch.dtype:
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
