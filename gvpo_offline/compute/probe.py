"""The start-up probe: chooses the cheapest layout that gives a model's own log-probs.

Each layout computes a few short responses, and the results are compared with the model's own
forward pass on one response at a time. The probe tries layouts in ascending order of cost, takes
the first that agrees, and reports why the cheaper ones were refused. A layout that does not agree
is never used, even if the settings name it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from gvpo_offline.compute.attention import (
    UnsupportedAttentionError,
    kernels,
    restore_attention,
    use_tree_attention,
)
from gvpo_offline.compute.context import context_length
from gvpo_offline.compute.engine import Engine
from gvpo_offline.compute.forward import DEFAULT_KEPT_BYTES, causal_lm, install
from gvpo_offline.compute.model import attention_of, in_float32, no_trace
from gvpo_offline.compute.probe_groups import (
    batches_of,
    probe_groups,
    probe_parameters,
    sequences_of,
    vocab_size_of,
)
from gvpo_offline.compute.settings import ComputePath, LayoutName
from gvpo_offline.errors import ConfigError
from gvpo_offline.group import Group
from gvpo_offline.stream.plan import CostModel

logger = logging.getLogger(__name__)

# Differences that rounding can cause on the probe's short responses, far below those of a wrong
# layout: log-prob of a response in nats, and relative error of the gradient.
TOLERANCES = (1e-3, 1e-3)
# The same in bfloat16 and float16, for a model that is not more sensitive to rounding than others;
# see `_Probe.allow_rounding`.
LOW_PRECISION_TOLERANCES = (0.5, 0.2)
_NARROW = (torch.bfloat16, torch.float16)
_LAYOUTS: tuple[LayoutName, ...] = ("shared", "continued", "packed", "padded")


@dataclass(frozen=True)
class Choice:
    """The result of the probe.

    Attributes:
        path: the chosen layout, attention and head.
        prompt_once: whether the pieces of a large group may share their prompt's states.
        refused: the cheaper layouts, with the reason why each was refused.
        error: largest difference of a response's log-prob to the model's own, nats.
    """

    path: ComputePath
    prompt_once: bool
    refused: tuple[str, ...]
    error: float

    def describe(self) -> str:
        """One line for the log."""
        why = f"; not {'; not '.join(self.refused)}" if self.refused else ""
        return f"{self.path} (agrees with the model's own forward to {self.error:.1e} nats{why})"


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


@dataclass(frozen=True, eq=False)
class _Answer:
    """Log-probs (R,) of the probe's responses, and the gradients of a weighted sum of them."""

    seq_logprobs: Tensor
    grads: list[Tensor] = field(default_factory=list)


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
    probe = _Probe(model, gradients)
    refused: list[str] = []
    names = _LAYOUTS if layout == "auto" else (layout,)
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

    answer: _Answer
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
    if not any(tensor.dtype in _NARROW for tensor in model.parameters()):
        return None
    reasons: list[str] = []
    with in_float32(model):
        try:
            probe = _Probe(model, gradients)
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


class _Probe:
    """The probe's responses under a model, and the model's own answer."""

    def __init__(self, model: nn.Module, gradients: bool) -> None:
        self._model = model
        self._inner = causal_lm(model)
        self._device = next(model.parameters()).device
        self._groups = probe_groups(
            vocab_size_of(self._inner), self._device, context_length(self._inner.config)
        )
        n = sum(group.group_size for group in self._groups)
        # Signs mixed, sizes unequal, none 0, so that no error hides, nor two of equal responses.
        self._weights = torch.linspace(-1.0, 2.0, n, dtype=torch.float64)
        self._parameters = probe_parameters(model) if gradients else []
        dtypes = {parameter.dtype for parameter in model.parameters()}
        exact = dtypes <= {torch.float32, torch.float64}
        self._tolerances = TOLERANCES if exact else LOW_PRECISION_TOLERANCES
        self.truth = self._own_answer()
        if not self.truth.seq_logprobs.isfinite().all():
            raise ConfigError(
                "a model's log-probs are finite numbers",
                received=self.truth.seq_logprobs.tolist(),
                remedy="check the model: its weights or logits overflow or are no numbers",
            )

    def allow_rounding(self, exact: _Answer) -> None:
        """Widen the tolerances of a narrow dtype to what its rounding does to this model.

        The own forward, one response at a time and over padded rows, errs by S at most against the
        answer in float32. Another way that errs by no more is within 2 S of the own forward, by the
        triangle inequality. S is large where a tiny change decides: with experts that score
        almost equally, which of them a token is sent to changes with the order of a sum.
        """
        answers = [self.truth]
        self.set_attention("padded")
        path = ComputePath("padded", attention_of(self._inner), "logits")
        try:
            answers.append(self._answer(Engine(path, CostModel("padded", 1 << 20))))
        except Exception:  # it is tried again, and then the reason is noted
            logger.debug("%s", path, exc_info=True)
        errors = [_difference(answer, exact) for answer in answers]
        for nats, relative in errors:
            if np.isfinite(nats) and np.isfinite(relative):
                self._tolerances = (
                    max(self._tolerances[0], 2 * nats),
                    max(self._tolerances[1], 2 * relative),
                )

    def ways(self, names: Sequence[LayoutName], refused: list[str]) -> Iterator[Choice]:
        """The ways that agree with the model's own forward, the cheapest first."""
        head = self.head(refused)
        for name in names:
            for path in self.paths(name, head, refused):
                error = self.try_path(path, refused)
                if error is not None:
                    once = self.prompt_once(path, refused)
                    yield Choice(path, once, tuple(refused), error)

    def set_attention(self, layout: LayoutName) -> None:
        """Let the model attend as a layout asks.

        Raises:
            UnsupportedAttentionError: it cannot for the shared layout.
        """
        if layout == "shared":
            use_tree_attention(self._inner)
        else:
            restore_attention(self._inner)

    def head(self, refused: list[str]) -> Literal["fused", "logits"]:
        """Whether log-probs can be had without the model's logits: tried on padded rows."""
        path = ComputePath("padded", attention_of(self._inner), "fused")
        return "logits" if self.try_path(path, refused) is None else "fused"

    def paths(
        self, layout: LayoutName, head: Literal["fused", "logits"], refused: list[str]
    ) -> Iterator[ComputePath]:
        """The ways to compute a layout, the fastest first."""
        try:
            self.set_attention(layout)
        except UnsupportedAttentionError as error:
            _refuse(refused, "shared layout", str(error))
            return
        if layout != "shared":
            yield ComputePath(layout, attention_of(self._inner), head)
            return
        for kernel in kernels(self._device):
            yield ComputePath(layout, kernel, head)

    def try_path(self, path: ComputePath, refused: list[str]) -> float | None:
        """The error of the log-probs along a path; None, and a reason more, if it is too large."""
        engine = Engine(path, CostModel(path.layout, 1 << 20))
        return self._try(engine, str(path), refused)

    def prompt_once(self, path: ComputePath, refused: list[str]) -> bool:
        """Whether groups in pieces may share their prompt's states."""
        if path.layout != "shared" or path.head != "fused":
            return False
        longest = max(len(response) for _, response in sequences_of(self._groups))
        engine = Engine(path, CostModel(path.layout, longest + 10))
        return self._try(engine, "one prompt for all pieces of a large group", refused) is not None

    def _try(self, engine: Engine, name: str, refused: list[str]) -> float | None:
        try:
            answer = self._answer(engine)
        # A model that nobody has seen may fail in any way; that is an answer too.
        except Exception as error:
            _refuse(refused, name, (str(error).splitlines() or [type(error).__name__])[0][:200])
            logger.debug("%s", name, exc_info=True)
            return None
        nats, relative = _difference(answer, self.truth)
        if nats <= self._tolerances[0] and relative <= self._tolerances[1]:
            return nats
        _refuse(refused, name, f"off by {nats:.2g} nats, gradients by {100 * relative:.2g}%")
        return None

    def _answer(self, engine: Engine) -> _Answer:
        """By the engine; gradients where they fall, in `.grad`, as in training."""
        sums, offset = [], 0
        with no_trace(self._model):
            for groups in batches_of(self._groups, engine.cost.max_tokens):
                n = sum(group.group_size for group in groups)
                weights = self._weights[offset : offset + n]
                offset += n
                if self._parameters:
                    sums.append(self._accumulated(engine, groups, weights))
                else:
                    with torch.no_grad():
                        sums.append(engine.seq_logprobs(self._model, groups).cpu())
            grads = [_grad_or_zeros(parameter) for parameter in self._parameters]
        return _Answer(torch.cat(sums), grads)

    def _accumulated(self, engine: Engine, groups: Sequence[Group], weights: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def objective(seq_logprobs: Tensor) -> Tensor:
            seen.append(seq_logprobs.detach().cpu())
            return (seq_logprobs * weights.to(seq_logprobs.device)).sum()

        def backward(scalar: Tensor) -> None:
            scalar.backward()  # type: ignore[no-untyped-call]

        engine.accumulate(self._model, groups, objective, backward)
        return seen[0]

    def _own_answer(self) -> _Answer:
        """One response at a time, by the model's own logits."""
        sums = []
        with no_trace(self._model), torch.set_grad_enabled(bool(self._parameters)):
            for weight, (prompt, response) in zip(
                self._weights, sequences_of(self._groups), strict=True
            ):
                ids = torch.from_numpy(np.concatenate([prompt, response])).to(self._device)
                logits = self._model(input_ids=ids[None].long(), use_cache=False).logits[0]
                before = torch.log_softmax(logits[len(prompt) - 1 : -1].float(), dim=-1)
                targets = ids[len(prompt) :].long()
                total = before[torch.arange(len(targets)), targets].double().sum()
                if self._parameters:
                    (total * weight).backward()
                sums.append(total.detach().cpu())
            grads = [_grad_or_zeros(parameter) for parameter in self._parameters]
        return _Answer(torch.stack(sums), grads)


def _refuse(refused: list[str], name: str, why: str) -> None:
    """Record why a layout was refused, once for several variants of one layout."""
    if not any(said.startswith(name.split()[0]) and said.endswith(why) for said in refused):
        refused.append(f"{name}: {why}")


def _grad_or_zeros(parameter: nn.Parameter) -> Tensor:
    grad = parameter.grad
    return torch.zeros_like(parameter) if grad is None else grad.detach().clone()


def _difference(answer: _Answer, truth: _Answer) -> tuple[float, float]:
    """Largest |difference| of log-probs, nats; norm of the gradients' over that of the truth's."""
    nats = float((answer.seq_logprobs - truth.seq_logprobs).abs().max())
    wrong = sum(
        float((a - b).double().square().sum())
        for a, b in zip(answer.grads, truth.grads, strict=True)
    )
    whole = sum(float(grad.double().square().sum()) for grad in truth.grads)
    relative = (wrong / whole) ** 0.5 if whole else 0.0
    return (nats if np.isfinite(nats) else np.inf), (relative if np.isfinite(relative) else np.inf)
