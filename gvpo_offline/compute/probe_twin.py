"""Layouts are compared on a small model of the same kind, then once on the model itself."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence

from torch import nn

from gvpo_offline.compute.attention import UnsupportedAttentionError, restore_attention
from gvpo_offline.compute.comparison import Choice, LayoutComparison
from gvpo_offline.compute.context import context_length
from gvpo_offline.compute.engine import with_responses
from gvpo_offline.compute.forward import causal_lm
from gvpo_offline.compute.model import device_of
from gvpo_offline.compute.probe_groups import probe_groups, probe_parameters, vocab_size_of
from gvpo_offline.compute.settings import LayoutName
from gvpo_offline.compute.twin import NoTwinError, is_small, make_twin
from gvpo_offline.errors import ConfigError
from gvpo_offline.group import Group

logger = logging.getLogger(__name__)


def choose_on_twin(model: nn.Module, names: Sequence[LayoutName], gradients: bool) -> Choice | None:
    """The cheapest layout that is right for a twin, and for one group under the model itself.

    Args:
        model: a model that `forward.install` was called for.
        names: the layouts to try, the cheapest first.
        gradients: also compare gradients.

    Returns:
        The choice, for which the model is prepared. None: compare on the model itself, because it
        is small, no twin can be made, or none of the layouts that are right for the twin is right
        for the model; the log says which.

    Raises:
        ConfigError: the model's own log-probs are not finite.
    """
    if is_small(model):
        return None
    refused: list[str] = []
    try:
        twin = make_twin(model)
        ways = LayoutComparison(twin, gradients).ways(names, refused)
        first = next(ways, None)
    except (NoTwinError, ConfigError, RuntimeError, ValueError, TypeError) as error:
        logger.warning(
            "layouts are compared on the model itself, which takes time and memory in proportion "
            "to its size: no small model of its kind can be made: %s",
            str(error).splitlines()[0],
        )
        return None
    if first is not None:
        with _small_gradients_only(model, gradients):
            own = LayoutComparison(model, gradients, groups=_short_group(model))
            own.allow_own_rounding()
            for way in itertools.chain([first], ways):
                found = _checked(own, way, refused)
                if found is not None:
                    return found
    restore_attention(causal_lm(model))
    logger.warning(
        "layouts are compared on the model itself, which takes time and memory in proportion to "
        "its size: none that is right for a small model of its kind is right for it: %s",
        "; ".join(refused),
    )
    return None


def _checked(own: LayoutComparison, way: Choice, refused: list[str]) -> Choice | None:
    """The choice, if the model's own weights and data type agree with it."""
    try:
        own.set_attention(way.path.layout)
    except UnsupportedAttentionError as error:
        refused.append(f"{way.path.layout} layout: {error}")
        return None
    reasons: list[str] = []
    error = own.try_path(way.path, reasons)
    refused.extend(reasons)
    if error is None:
        return None
    return Choice(way.path, way.prompt_once, tuple(refused), error)


def _short_group(model: nn.Module) -> list[Group]:
    """One group: a response of one token, and two that share a prefix."""
    inner = causal_lm(model)
    groups = probe_groups(vocab_size_of(inner), device_of(model), context_length(inner.config))
    return [with_responses(groups[0], [0, 1, 2])]


@contextlib.contextmanager
def _small_gradients_only(model: nn.Module, gradients: bool) -> Iterator[None]:
    """Within it, only the parameters whose gradients are compared have any.

    So that the check does not hold a gradient for each weight. Not with activation checkpointing,
    whose older form gives no gradients to a layer whose input needs none; nor for sharded weights.
    """
    inner = causal_lm(model)
    sharded = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    checkpointed = any(getattr(part, "gradient_checkpointing", False) for part in inner.modules())
    if not gradients or sharded or checkpointed:
        yield
        return
    kept = {id(parameter) for parameter in probe_parameters(model)}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    try:
        for parameter in others:
            parameter.requires_grad_(requires_grad=False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(requires_grad=True)
