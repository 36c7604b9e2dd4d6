"""The start-up probe: chooses the cheapest layout that gives a model's own log-probs.

Each layout computes a few short responses, and the results are compared with the model's own
forward pass on one response at a time. The probe tries layouts in ascending order of cost, takes
the first that agrees, and reports why the cheaper ones were refused. A layout that does not agree
is never used, even if the settings name it.

Models of more than a million weights are compared by a small model of the same classes
(`compute.twin`), and then by one short group of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from gvpo_offline.compute.attention import restore_attention
from gvpo_offline.compute.comparison import Choice, LayoutComparison, ProbeAnswer
from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.forward import DEFAULT_KEPT_BYTES, causal_lm, install
from gvpo_offline.compute.model import in_float32
from gvpo_offline.compute.probe_twin import choose_on_twin
from gvpo_offline.compute.settings import LayoutName
from gvpo_offline.compute.widening import NARROW
from gvpo_offline.errors import ConfigError
from gvpo_offline.stream.plan import CostModel

logger = logging.getLogger(__name__)

_LAYOUTS: tuple[LayoutName, ...] = ("shared", "continued", "packed", "padded")


def prepare_engine(
    model: nn.Module,
    *,
    max_tokens: int,
    layout: LayoutName | Literal["auto"] = "auto",
    gradients: bool = True,
    kept_bytes: int = DEFAULT_KEPT_BYTES,
    what: str = "log-probs",
) -> Engine:
    """Choose how to compute log-probs of a model, and return the engine that does it.

    Several layouts are tried on two small groups, the cheapest first, and compared with the model's
    own forward pass; the first that agrees is taken. The choice and its reasons are logged.

    Args:
        model: a transformers causal language model, or a PEFT model around one, on its device, with
            dropout off, and in training mode if it will be trained.
        max_tokens: token budget of one forward pass.
        layout: test this layout only, and refuse it if it is wrong.
        gradients: compare gradients too; False for inference.
        kept_bytes: bytes of logits that stay between a forward and its backward; more: made again.
        what: the beginning of the logged line, for a program that loads several models.

    Raises:
        ConfigError: no layout agrees with the model's own forward pass, or not the given one.
    """
    choice = choose_path(model, layout=layout, gradients=gradients)
    logger.info("%s: %s", what, choice.describe())
    return engine_for(model, choice, max_tokens=max_tokens, kept_bytes=kept_bytes)


def engine_for(
    model: nn.Module, choice: Choice, *, max_tokens: int, kept_bytes: int = DEFAULT_KEPT_BYTES
) -> Engine:
    """An engine by a choice that was made before."""
    config = causal_lm(model).config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    # Attention on 6 x width keys costs as much as the matrix products of a token in a layer.
    pairs = 6 * int(getattr(text, "hidden_size", 0) or 2048)
    cost = CostModel(choice.path.layout, max_tokens, pairs)
    return Engine(choice.path, cost, kept_bytes=kept_bytes, prompt_once=choice.prompt_once)


def choose_path(
    model: nn.Module,
    *,
    layout: LayoutName | Literal["auto"] = "auto",
    gradients: bool = True,
) -> Choice:
    """Find the cheapest way to compute log-probs that is right for a model, and prepare it.

    Args:
        model: a transformers causal language model, or PEFT's around one, as it will be computed:
            on its device, dropout off, in training mode for training.
        layout: take this one, or none.
        gradients: also compare gradients.

    Raises:
        ConfigError: no way agrees, or not the one that was asked for; says by how much. Or the
            model's own log-probs are not finite.
    """
    install(model)
    names = _LAYOUTS if layout == "auto" else (layout,)
    found_on_twin = choose_on_twin(model, names, gradients)
    if found_on_twin is not None:
        return found_on_twin
    probe = LayoutComparison(model, gradients)
    refused: list[str] = []
    proof = _prove_in_float32(model, names, gradients)
    if proof is None:
        for found in probe.ways(names, refused):
            return found
    else:
        probe.allow_rounding(proof.answer)
        for proven in proof.ways:
            probe.set_attention(proven.path.layout)
            error = probe.try_path(proven.path, refused)
            if error is not None:
                once = proven.prompt_once and probe.prompt_once(proven.path, refused)
                return Choice(proven.path, once, (*proven.refused, *refused), error)
        refused = [*proof.refused, *refused]
    restore_attention(causal_lm(model))
    raise ConfigError(
        "log-probs agree with the model's own forward, one response at a time",
        received="; ".join(refused),
        remedy="set layout to auto or padded"
        if layout not in ("auto", "padded")
        else "load the model in float32, or report it: none of the layouts computes it right",
    )


@dataclass(frozen=True)
class _Proof:
    """What the probe finds for a narrow model's weights converted to float32.

    Attributes:
        answer: of the model's own forward, one response at a time.
        ways: those that agree with it, the cheapest first.
        refused: the reasons why others do not.
    """

    answer: ProbeAnswer
    ways: tuple[Choice, ...]
    refused: tuple[str, ...]


def _prove_in_float32(
    model: nn.Module, names: Sequence[LayoutName], gradients: bool
) -> _Proof | None:
    """The ways that are right in float32, for a bfloat16 or float16 model; None for others.

    Rounding in 8 bits can hide an error (a short convolution across responses errs by less over
    the probe's short responses), and can feign one (a token that is sent to another expert). So
    float32 decides which layouts, heads and shared prompts are right. None also for models that
    cannot be computed in float32.
    """
    if not any(tensor.dtype in NARROW for tensor in model.parameters()):
        return None
    reasons: list[str] = []
    with in_float32(model):
        try:
            probe = LayoutComparison(model, gradients)
        except Exception as error:  # what computes in narrow types only
            logger.warning(
                "layouts are compared in %s only: %s", next(model.parameters()).dtype, error
            )
            return None
        ways = tuple(
            replace(way, refused=tuple(f"{reason} (in float32)" for reason in way.refused))
            for way in probe.ways(names, reasons)
        )
    return _Proof(probe.truth, ways, tuple(f"{reason} (in float32)" for reason in reasons))
