"""Random groups with shared prefixes, and expected log-probs from a bare model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from gvpo_offline.compute.engine import Engine
from gvpo_offline.group import Group


def group_of(
    prompt: Sequence[int],
    responses: Sequence[Sequence[int]],
    masks: Sequence[Sequence[bool]] | None = None,
) -> Group:
    """A group with these token ids."""
    return Group(
        group_id="group",
        prompt_token_ids=np.array(prompt, dtype=np.int32),
        response_token_ids=tuple(np.array(ids, dtype=np.int32) for ids in responses),
        samplers=("sampler",) * len(responses),
        truncated=(False,) * len(responses),
        loss_mask=None if masks is None else tuple(np.array(mask, dtype=bool) for mask in masks),
    )


@st.composite
def grown_group(
    draw: st.DrawFn,
    vocab_size: int = 3,
    max_prompt: int = 6,
    max_response: int = 12,
    max_responses: int = 6,
) -> Group:
    """A group whose responses extend prefixes of each other; some are prefixes or duplicates."""
    # Ids from 3 on: models treat padding, which is 0, differently.
    tokens = st.integers(3, 2 + vocab_size)
    responses: list[list[int]] = []
    for _ in range(draw(st.integers(2, max_responses))):
        before = draw(st.sampled_from(responses)) if responses else []
        kept = before[: draw(st.integers(0, len(before)))]
        more = draw(st.lists(tokens, min_size=not kept, max_size=max_response - len(kept)))
        responses.append(kept + more)
    masks = None
    if draw(st.booleans()):
        sizes = [len(ids) for ids in responses]
        flags = [st.lists(st.booleans(), min_size=n, max_size=n).filter(any) for n in sizes]
        masks = [draw(flag) for flag in flags]
    return group_of(draw(st.lists(tokens, min_size=1, max_size=max_prompt)), responses, masks)


def sequences(groups: Sequence[Group]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Prompt, response and loss mask of every response."""
    found = []
    for group in groups:
        for number, ids in enumerate(group.response_token_ids):
            mask = np.ones(len(ids), bool) if group.loss_mask is None else group.loss_mask[number]
            found.append((group.prompt_token_ids, ids, mask))
    return found


def alone(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """(R,) float64 log-probs from the model's own logits, one forward pass per response; nats."""
    sums = []
    for prompt, response, mask in sequences(groups):
        ids = torch.from_numpy(np.concatenate([prompt, response])).long()
        logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        log_p = torch.log_softmax(logits.double(), -1)
        chosen = log_p[torch.arange(len(response)), ids[len(prompt) :]]
        sums.append(chosen[torch.from_numpy(mask)].sum())
    return torch.stack(sums)


def objective(sums_R: Tensor) -> Tensor:
    """A loss whose gradient in each log-prob depends on all of them: sum c_i s_i + var(s) / 50.

    The c_i range from -1 to 1.5, so that gradients do not cancel by symmetry.
    """
    factors = torch.linspace(-1.0, 1.5, len(sums_R), dtype=torch.float64)
    return (sums_R * factors).sum() + sums_R.var(correction=0) / 50


@dataclass(frozen=True)
class Measured:
    """Log-probs (R,), the objective, and its gradient in all trained parameters as one vector."""

    sums_R: Tensor
    loss: Tensor
    gradient: Tensor

    def errors(self, truth: Measured) -> tuple[float, float]:
        """Largest error of a log-prob, nats; relative error of the gradient, in the 2-norm."""
        assert truth.gradient.norm() > 0
        nats = float((self.sums_R - truth.sums_R).abs().max())
        return nats, float((self.gradient - truth.gradient).norm() / truth.gradient.norm())


def measured_alone(model: nn.Module, groups: Sequence[Group]) -> Measured:
    """The expected values, from `alone`."""
    model.zero_grad()
    sums_R = alone(model, groups)
    loss = objective(sums_R)
    loss.backward()
    return Measured(sums_R.detach(), loss.detach(), gradient_of(model))


def measured_by(
    engine: Engine,
    model: nn.Module,
    groups: Sequence[Group],
    *,
    around: Callable[[], Any] | None = None,
    n_forwards: int = 1,
) -> Measured:
    """The values that the engine computes, within the context manager `around`, if given."""
    seen: list[Tensor] = []

    def watched(sums_R: Tensor) -> Tensor:
        seen.append(sums_R.detach())
        return objective(sums_R)

    model.zero_grad()
    if around is None:
        loss = engine.accumulate(model, groups, watched, torch.Tensor.backward, n_forwards)
    else:
        with around():
            loss = engine.accumulate(model, groups, watched, torch.Tensor.backward, n_forwards)
    return Measured(seen[0], loss, gradient_of(model))


def gradient_of(model: nn.Module) -> Tensor:
    """The gradients of all trained parameters as one float64 vector; missing ones are 0."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    return torch.cat([grad.flatten().double() for grad in flat])


def response_alone(model: nn.Module, group: Group, number: int) -> Tensor:
    """(T,) float64 log-probs of the tokens of one response, from the model's own logits; nats."""
    prompt, response = group.prompt_token_ids, group.response_token_ids[number]
    ids = torch.from_numpy(np.concatenate([prompt, response])).long()
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].double()
    before = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return before[torch.arange(len(response)), ids[len(prompt) :]]
