"""Log-probs of groups and their gradients, in no more memory than the token budget asks for.

A micro-batch that fits is one forward pass and one backward pass. A group that does not is cut into
pieces, each the prompt with some of the responses. That is exact, because a loss needs one number
of each response: a first pass finds all sequence log-probs, the loss's gradient in them follows,
and each piece is computed once more and sent back with its share of that gradient.

Where keys and values can be handed from one pass to another, the prompt is computed once for all
pieces: they take its keys, values and last hidden state as leaves, and what gradient gathers there
is sent back through the prompt at the end. The last piece of the first pass keeps its graph, so it
is not computed twice either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gvpo_offline.compute.forward import (
    DEFAULT_KEPT_BYTES,
    LayoutCall,
    PromptCall,
    PromptStates,
    TokenLogprobs,
    prompt_states,
    token_logprobs,
)
from gvpo_offline.compute.layout import Layout, Targets, below_prompt, lay_out
from gvpo_offline.compute.model import float64_device
from gvpo_offline.compute.settings import ComputePath
from gvpo_offline.errors import DataError
from gvpo_offline.group import Group
from gvpo_offline.stream.plan import CostModel, cut_group, shape_of


class Piece(NamedTuple):
    """What one pass computes: a layout, and which of the micro-batch's responses it holds."""

    layout: Layout
    responses: tuple[int, ...]


@dataclass(frozen=True)
class Engine:
    """Computes log-probs of groups along one path.

    Models are those that `forward.install` was called for, possibly wrapped since. Groups are some
    that fit into the budget together, or one that does not; none at all gives passes over nothing,
    because sharded models compute in lockstep. `passes` is the number of forward passes to make
    where other ranks need more than this one.

    Attributes:
        path: the way that the start-up probe chose.
        cost: how groups are laid out, and the budget of tokens.
        kept_bytes: how much of the size scored tokens x vocabulary may stay between a forward and
            its backward pass; what is beyond is computed twice.
        prompt_once: whether a large group's prompt is computed once for all its pieces; not for
            models in shards, whose passes must be alike on every rank.
        on_entropy: called with the entropies, (M,) float32, nats, of the scored tokens of each
            pass; None: they are not computed.
    """

    path: ComputePath
    cost: CostModel
    kept_bytes: int = DEFAULT_KEPT_BYTES
    prompt_once: bool = True
    on_entropy: Callable[[Tensor], None] | None = None

    def seq_logprobs(self, model: nn.Module, groups: Sequence[Group], passes: int = 1) -> Tensor:
        """log pi(response | prompt) of every response, over the tokens that count.

        Returns:
            (R,) float64, nats; with a graph where gradients are on, and then in whatever memory
            that takes: `accumulate` keeps to the budget.
        """
        pieces, prompt = self._begin(model, groups, passes)
        sums = [self._sums(model, piece, prompt) for piece in pieces]
        return _in_order(pieces, sums)

    def token_logprobs(self, model: nn.Module, groups: Sequence[Group]) -> list[Tensor]:
        """log pi of every token of every response, counted or not: (T_i,) float32 each, nats."""
        pieces, prompt = self._begin(model, groups, 1, counted_only=False)
        found: dict[int, Tensor] = {}
        for piece in pieces:
            values_M = self._tokens(model, piece, prompt).values_M
            own = torch.split(values_M, piece.layout.targets.lengths_R.tolist())
            found |= dict(zip(piece.responses, own, strict=True))
        return [found[number] for number in range(len(found))]

    def accumulate(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        objective: Callable[[Tensor], Tensor],
        backward: Callable[[Tensor], None],
        passes: int = 1,
    ) -> Tensor:
        """Add the gradient of a loss of sequence log-probs to the model's gradients.

        Args:
            model, groups, passes: as above.
            objective: the loss, a scalar, of (R,) float64 sequence log-probs of all groups.
            backward: sends a scalar back through its graph.

        Returns:
            The loss, without its graph; 0 without groups.
        """
        pieces, prompt = self._begin(model, groups, passes)
        if len(pieces) == 1:
            sums_R = self._sums(model, pieces[0], None)
            loss = objective(sums_R) if groups else sums_R.sum() * 0.0
            backward(loss)
            return loss.detach()
        leaves = _leaves(prompt)
        with torch.no_grad():
            sums = [self._sums(model, piece, leaves) for piece in pieces[:-1]]
        last = self._sums(model, pieces[-1], leaves)
        sums_R = _in_order(pieces, [*sums, last.detach()]).requires_grad_()
        loss = objective(sums_R) if groups else sums_R.sum() * 0.0
        (grad_R,) = torch.autograd.grad(loss, sums_R)
        backward(_share(last, grad_R, pieces[-1]))
        quiet = replace(self, on_entropy=None)  # the first pass has told
        for piece in pieces[:-1]:
            backward(_share(quiet._sums(model, piece, leaves), grad_R, piece))
        _send_back(prompt, leaves)
        return loss.detach()

    def _begin(
        self, model: nn.Module, groups: Sequence[Group], passes: int, *, counted_only: bool = True
    ) -> tuple[list[Piece], PromptStates | None]:
        """The pieces of a micro-batch, and the prompt's states if they go without their prompt."""
        whole = len(groups) != 1 or self.cost.fits(shape_of(groups[0]))
        if whole:
            n_responses = sum(group.group_size for group in groups)
            layout = lay_out(groups, self.path.layout, counted_only=counted_only)
            pieces = [Piece(layout, tuple(range(n_responses)))]
        else:
            pieces = self._cut(groups[0], counted_only)
        nothing = Piece(lay_out([], self.path.layout), ())
        pieces = [nothing] * (passes - len(pieces)) + pieces
        if whole or not self._goes_below_prompt:
            return pieces, None
        prompt_ids = groups[0].prompt_token_ids.astype("int64")
        return pieces, prompt_states(model, PromptCall(prompt_ids, self.path))

    @property
    def _goes_below_prompt(self) -> bool:
        return self.prompt_once and self.path.layout == "shared" and self.path.head == "fused"

    def _cut(self, group: Group, counted_only: bool) -> list[Piece]:
        try:
            parts = cut_group(shape_of(group), self.cost)
        except DataError as error:
            raise DataError(
                error.rule, received=error.received, remedy=error.remedy, group=group.group_id
            ) from None
        pieces = []
        for part in parts:
            some = _with_responses(group, part)
            if self._goes_below_prompt:
                layout = below_prompt(some, counted_only=counted_only)
            else:
                layout = lay_out([some], self.path.layout, counted_only=counted_only)
            pieces.append(Piece(layout, tuple(part)))
        return pieces

    def _tokens(self, model: nn.Module, piece: Piece, prompt: PromptStates | None) -> TokenLogprobs:
        wanted = self.on_entropy is not None
        own = prompt if piece.responses else None
        call = LayoutCall(piece.layout, self.path, self.kept_bytes, wanted, own)
        return token_logprobs(model, call)

    def _sums(self, model: nn.Module, piece: Piece, prompt: PromptStates | None) -> Tensor:
        found = self._tokens(model, piece, prompt)
        if self.on_entropy and found.entropy_M is not None and piece.responses:
            self.on_entropy(found.entropy_M)
        return seq_sums(found.values_M, piece.layout.targets)


def seq_sums(values_M: Tensor, targets: Targets) -> Tensor:
    """Sums over the tokens of each response that count: (R,) float64, nats.

    In float64: over a few thousand tokens float32 errs by thousandths of a nat. Where the device
    has none, the numbers are summed on the CPU.
    """
    device = float64_device(values_M.device)
    values_M = values_M.to(device).double()
    if not targets.counts_M.all():
        values_M = torch.where(torch.from_numpy(targets.counts_M).to(device), values_M, 0.0)
    lengths_R = torch.from_numpy(targets.lengths_R).to(device)
    sums: Tensor = torch.segment_reduce(values_M, "sum", lengths=lengths_R, axis=0)
    return sums


def _with_responses(group: Group, which: Sequence[int]) -> Group:
    """A group with some of its responses, as far as a layout asks."""
    mask = group.loss_mask
    return replace(
        group,
        response_token_ids=tuple(group.response_token_ids[i] for i in which),
        loss_mask=None if mask is None else tuple(mask[i] for i in which),
    )


def _in_order(pieces: Sequence[Piece], sums: Sequence[Tensor]) -> Tensor:
    """(R,) sums of all pieces in the order of the responses; what nothing sums up to, for none."""
    if not pieces[-1].responses or len(pieces) == 1:
        return sums[-1]
    order = [number for piece in pieces for number in piece.responses]
    joined = torch.cat([own for piece, own in zip(pieces, sums, strict=True) if piece.responses])
    return joined[torch.argsort(torch.tensor(order, device=joined.device))]


def _share(sums: Tensor, grad_R: Tensor, piece: Piece) -> Tensor:
    """A scalar whose gradient is a piece's part of the loss's gradient."""
    if not piece.responses:
        return sums.sum() * 0.0
    return (sums * grad_R[list(piece.responses)]).sum()


def _leaves(prompt: PromptStates | None) -> PromptStates | None:
    """The prompt's states cut off from their graph, to gather gradients."""
    if prompt is None:
        return None

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(tensor.requires_grad)

    states = {module: (leaf(k), leaf(v)) for module, (k, v) in prompt.states.items()}
    return PromptStates(states, leaf(prompt.last_hidden))


def _send_back(prompt: PromptStates | None, leaves: PromptStates | None) -> None:
    """What gathered at the leaves goes back through the prompt."""
    if prompt is None or leaves is None:
        return
    pairs = [(prompt.last_hidden, leaves.last_hidden)]
    for module, own in prompt.states.items():
        pairs += zip(own, leaves.states[module], strict=True)
    reached = [(tensor, leaf.grad) for tensor, leaf in pairs if leaf.grad is not None]
    torch.autograd.backward([tensor for tensor, _ in reached], [grad for _, grad in reached])
