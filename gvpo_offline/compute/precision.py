"""Rounding noise of log-probs in bfloat16 and float16, measured on a model or assumed.

A log-prob in a 16-bit type differs from that of the same weights in float32, and the difference
changes with everything that changes the order or the shapes of the computation: what a response is
packed with, the layout, a kernel, a small change of the weights. The errors of a response's tokens
are nearly independent, so the error of the log-prob of T tokens grows like sqrt(T). One number
describes it: its standard deviation per root token. It is proportional to the type's epsilon, with
a factor that depends on the model: how much a relative error of the hidden states moves the
difference between the token's logit and the log-sum-exp. `measured_rounding` finds it by computing
a few responses in both types.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from gvpo_offline.compute.engine import Engine, with_responses
from gvpo_offline.compute.model import autocast, in_float32
from gvpo_offline.group import Group

logger = logging.getLogger(__name__)

# Spacing of the numbers next to 1, by the name of the type that limits precision. int8: rows of
# activations are rounded to 127 steps.
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7, "int8": 2.0**-7}
# Standard deviation per root token over epsilon, where it is not measured. benchmarks/precision.py
# finds 4 to 6 for a language model under autocast and 6 to 13 with bfloat16 weights, and half of
# that between two packings; below 1 for random weights.
ASSUMED_FACTOR = 8.0
# Tokens of the responses that the noise is measured on, prompts included. The standard deviation
# over a few hundred tokens is known to 1 / sqrt(2 * 300), 4%, if their errors are independent.
_MOST_TOKENS = 512
_RESPONSES_OF_A_GROUP = 2


@dataclass(frozen=True)
class Rounding:
    """The rounding error of log-probs in one data type.

    Attributes:
        per_root_token: standard deviation of the error of one token's log-prob, nats; that of a
            response of T tokens is sqrt(T) times as large.
        n_responses: responses that it was measured on; 0: it is assumed.
    """

    per_root_token: float
    n_responses: int = 0

    def of(self, tokens: float) -> float:
        """Standard deviation of the error of the log-prob of a response of `tokens`, nats."""
        return self.per_root_token * math.sqrt(tokens)

    def at_least(self, per_root_token: float) -> Rounding:
        """This rounding, or a larger one, nats per root token."""
        return replace(self, per_root_token=max(self.per_root_token, per_root_token))


def assumed_rounding(dtype: str) -> Rounding:
    """The rounding of a data type (a key of `EPSILON`) for a model that was not measured."""
    return Rounding(ASSUMED_FACTOR * EPSILON[dtype])


def measured_rounding(
    model: nn.Module,
    engine: Engine,
    groups: Sequence[Group],
    autocast_dtype: torch.dtype | None,
) -> Rounding | None:
    """Compute some responses as training does and in float32, and compare.

    Costs two forward passes over at most 512 tokens, or over one response if the first is longer.

    Args:
        model: a model that `forward.install` was called for, on its device, not yet wrapped.
        engine: how training computes its log-probs.
        groups: groups of the training data.
        autocast_dtype: data type of autocast, or None.

    Returns:
        The rounding; None if there are no responses, or if the model cannot compute in float32.
    """
    chosen = _some(groups, min(_MOST_TOKENS, engine.cost.max_tokens))
    if not chosen:
        return None
    quiet = replace(engine, on_entropy=None)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            with autocast(device, autocast_dtype):
                rounded = quiet.token_logprobs(model, chosen)
            with in_float32(model, by_layers=True):
                exact = quiet.token_logprobs(model, chosen)
    except Exception as error:  # kernels that compute in narrow types only
        logger.info("the rounding noise is not measured: %s", str(error).splitlines()[:1])
        return None
    finally:
        model.train(training)
    return rounding_of([a.double() - b.double() for a, b in zip(rounded, exact, strict=True)])


def rounding_of(errors: Sequence[torch.Tensor]) -> Rounding | None:
    """The rounding that (T_i,) errors of the tokens of each response show, nats.

    The larger of two estimates: the root mean square of the tokens' errors, and that of the
    responses' sums over sqrt(T), which is larger if the errors of a response are correlated.
    """
    held = [own for own in errors if len(own)]
    if not held or not all(bool(own.isfinite().all()) for own in held):
        return None
    of_tokens = float(torch.cat(held).square().mean().sqrt())
    sums = torch.stack([own.sum() / math.sqrt(len(own)) for own in held])
    return Rounding(max(of_tokens, float(sums.square().mean().sqrt())), len(held))


def _some(groups: Sequence[Group], left: int) -> list[Group]:
    """The first groups, each with its first responses, of at most `left` tokens if possible."""
    chosen: list[Group] = []
    for group in groups:
        items: list[int] = []
        cost = len(group.prompt_token_ids)
        for item, ids in enumerate(group.response_token_ids[:_RESPONSES_OF_A_GROUP]):
            if cost + len(ids) <= left or not (chosen or items):
                items.append(item)
                cost += len(ids)
        if items:
            chosen.append(with_responses(group, items))
            left -= cost
        if left <= 0:
            break
    return chosen
