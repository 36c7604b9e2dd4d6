"""Comparison of ways to compute a model's log-probs with the model's own forward pass."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
from gvpo_offline.compute.forward import causal_lm
from gvpo_offline.compute.model import attention_of, device_of, no_trace
from gvpo_offline.compute.precision import rounding_of
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
# see `LayoutComparison.allow_rounding`.
LOW_PRECISION_TOLERANCES = (0.5, 0.2)


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


@dataclass(frozen=True, eq=False)
class ProbeAnswer:
    """Log-probs (R,) of the probe's responses, and the gradients of a weighted sum of them."""

    seq_logprobs: Tensor
    grads: list[Tensor] = field(default_factory=list)


class LayoutComparison:
    """Log-probs and gradients of some responses, by the model itself and by other ways."""

    def __init__(
        self, model: nn.Module, gradients: bool, *, groups: list[Group] | None = None
    ) -> None:
        self._model = model
        self._inner = causal_lm(model)
        self._device = device_of(model)
        self._groups = groups or probe_groups(
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

    def allow_rounding(self, exact: ProbeAnswer) -> None:
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

    def allow_own_rounding(self) -> None:
        """Widen the tolerances of a narrow dtype by two own forwards in this dtype.

        No float32 copy of the model is made. One response at a time and over padded rows, the own
        forward rounds in different ways: the difference of two computations with errors of standard
        deviation s per root token has sqrt(2) s, which `rounding_of` measures. Another way that
        rounds as much differs from the own forward by as much: by less than 4 times that, for all
        but one in 10^4 responses.
        """
        if self._tolerances == TOLERANCES:
            return
        self.set_attention("padded")
        path = ComputePath("padded", attention_of(self._inner), "logits")
        try:
            answer = self._answer(Engine(path, CostModel("padded", 1 << 20)))
        except Exception:  # it is tried again, and then the reason is noted
            logger.debug("%s", path, exc_info=True)
            return
        nats, relative = _difference(answer, self.truth)
        lengths = [len(response) for _, response in sequences_of(self._groups)]
        errors = (answer.seq_logprobs - self.truth.seq_logprobs).double()
        scaled = [own[None] / n**0.5 for own, n in zip(errors, lengths, strict=True)]
        found = rounding_of(scaled)
        if found is not None and np.isfinite(nats) and np.isfinite(relative):
            self._tolerances = (
                max(self._tolerances[0], 4 * found.of(max(lengths))),
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

    def _answer(self, engine: Engine) -> ProbeAnswer:
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
        return ProbeAnswer(torch.cat(sums), grads)

    def _accumulated(self, engine: Engine, groups: Sequence[Group], weights: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def objective(seq_logprobs: Tensor) -> Tensor:
            seen.append(seq_logprobs.detach().cpu())
            return (seq_logprobs * weights.to(seq_logprobs.device)).sum()

        def backward(scalar: Tensor) -> None:
            scalar.backward()  # type: ignore[no-untyped-call]

        engine.accumulate(self._model, groups, objective, backward)
        return seen[0]

    def _own_answer(self) -> ProbeAnswer:
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
        return ProbeAnswer(torch.stack(sums), grads)


def _refuse(refused: list[str], name: str, why: str) -> None:
    """Record why a layout was refused, once for several variants of one layout."""
    if not any(said.startswith(name.split()[0]) and said.endswith(why) for said in refused):
        refused.append(f"{name}: {why}")


def _grad_or_zeros(parameter: nn.Parameter) -> Tensor:
    grad = parameter.grad
    return torch.zeros_like(parameter) if grad is None else grad.detach().clone()


def _difference(answer: ProbeAnswer, truth: ProbeAnswer) -> tuple[float, float]:
    """Largest |difference| of log-probs, nats; norm of the gradients' over that of the truth's."""
    nats = float((answer.seq_logprobs - truth.seq_logprobs).abs().max())
    wrong = sum(
        float((a - b).double().square().sum())
        for a, b in zip(answer.grads, truth.grads, strict=True)
    )
    whole = sum(float(grad.double().square().sum()) for grad in truth.grads)
    relative = (wrong / whole) ** 0.5 if whole else 0.0
    return (nats if np.isfinite(nats) else np.inf), (relative if np.isfinite(relative) else np.inf)
