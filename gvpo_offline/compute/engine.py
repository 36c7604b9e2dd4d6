"""Log-probs of groups and their gradients, within the token budget of a micro-batch.

A micro-batch that fits is one forward pass and one backward pass. A group that does not fit is cut
into pieces, each of which holds the prompt and some of the responses. The gradient is exact,
because the loss depends on one number per response: first all sequence log-probs are computed
without a graph, then the gradient of the loss with respect to them, and then each piece runs
forward again and backward with its slice of that gradient.

Where the model allows it, the prompt is computed once for all pieces: they use its keys, values and
last hidden state as detached leaves, and the gradients accumulated in these leaves are propagated
through the prompt at the end. The last piece keeps its graph from the start, so it runs forward
only once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gvpo_offline.compute.devices import to_device
from gvpo_offline.compute.forward import (
    DEFAULT_KEPT_BYTES,
    LayoutCall,
    PromptCall,
    PromptStates,
    TokenLogprobs,
    prompt_states,
    token_logprobs,
)
from gvpo_offline.compute.layout import Layout, Targets, lay_out, without_prompt
from gvpo_offline.compute.model import float64_device
from gvpo_offline.compute.settings import ComputePath
from gvpo_offline.errors import DataError
from gvpo_offline.group import Group
from gvpo_offline.stream.plan import CostModel, cut_group, shape_of


class MicroBatchPiece(NamedTuple):
    """Input of one forward pass: a layout, and the indices of its responses in the micro-batch."""

    layout: Layout
    responses: tuple[int, ...]


@dataclass(frozen=True)
class Engine:
    """Computes log-probs of groups with one compute path.

    In all methods, `model` is a model that `forward.install` was called for; it may have been
    wrapped (DDP, FSDP) since. `groups` is a micro-batch: groups that fit into the token budget
    together, or a single group that does not. `n_forwards` is the number of forward passes that
    every rank makes; a rank that needs fewer, for example one without groups, adds forward passes
    over a dummy input, because sharded models need the same number of passes on every rank.

    Attributes:
        path: the compute path, as chosen by the start-up probe.
        cost: token cost of groups in the layout, and the token budget.
        kept_bytes: most bytes of (scored tokens, vocabulary) tensors to keep from a forward pass
            for its backward pass; the rest is recomputed.
        prompt_once: whether the prompt of a large group is computed once for all its pieces; false
            for sharded models, which need the same forward passes on every rank.
        on_entropy: called with the entropies, (M,) float32, nats, of the scored tokens of each
            forward pass; None: entropies are not computed.
    """

    path: ComputePath
    cost: CostModel
    kept_bytes: int = DEFAULT_KEPT_BYTES
    prompt_once: bool = True
    on_entropy: Callable[[Tensor], None] | None = None

    def seq_logprobs(
        self, model: nn.Module, groups: Sequence[Group], n_forwards: int = 1
    ) -> Tensor:
        """log pi(response | prompt) of every response, over the tokens that count.

        Returns:
            (R,) float64, nats. With gradients enabled the result has a graph that holds all pieces
            at once and may exceed the token budget; `accumulate` keeps to the budget.
        """
        pieces, prompt = self._begin(model, groups, n_forwards)
        sums = [self._sums(model, piece, prompt) for piece in pieces]
        return _in_response_order(pieces, sums)

    def token_logprobs(
        self, model: nn.Module, groups: Sequence[Group], n_forwards: int = 1
    ) -> list[Tensor]:
        """log pi of every token of every response, counted or not: (T_i,) float32 each, nats."""
        pieces, prompt = self._begin(model, groups, n_forwards, counted_only=False)
        found: dict[int, Tensor] = {}
        for piece in pieces:
            values_M = self._tokens(model, piece, prompt).values_M
            if not piece.responses:
                continue
            own = torch.split(values_M, piece.layout.targets.lengths_R.tolist())
            found |= dict(zip(piece.responses, own, strict=True))
        return [found[number] for number in range(len(found))]

    def accumulate(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        objective: Callable[[Tensor], Tensor],
        backward: Callable[[Tensor], None],
        n_forwards: int = 1,
    ) -> Tensor:
        """Add the gradient of a loss of sequence log-probs to the model's gradients.

        Args:
            model, groups, n_forwards: see the class.
            objective: the loss, a scalar, of (R,) float64 sequence log-probs of all groups.
            backward: runs the backward pass of a scalar, such as `Accelerator.backward`.

        Returns:
            The detached loss; 0 without groups.
        """
        pieces, prompt = self._begin(model, groups, n_forwards)
        if len(pieces) == 1:
            sums_R = self._sums(model, pieces[0], None)
            loss = objective(sums_R) if groups else sums_R.sum() * 0.0
            backward(loss)
            return loss.detach()
        leaves = _detached_states(prompt)
        with torch.no_grad():
            sums = [self._sums(model, piece, leaves) for piece in pieces[:-1]]
        last = self._sums(model, pieces[-1], leaves)
        sums_R = _in_response_order(pieces, [*sums, last.detach()]).requires_grad_()
        loss = objective(sums_R) if groups else sums_R.sum() * 0.0
        (grad_R,) = torch.autograd.grad(loss, sums_R)
        backward(_piece_loss(last, grad_R, pieces[-1]))
        quiet = replace(self, on_entropy=None)  # already reported above
        for piece in pieces[:-1]:
            backward(_piece_loss(quiet._sums(model, piece, leaves), grad_R, piece))
        _backward_through_prompt(prompt, leaves)
        return loss.detach()

    def _begin(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        n_forwards: int,
        *,
        counted_only: bool = True,
    ) -> tuple[list[MicroBatchPiece], PromptStates | None]:
        """The pieces of a micro-batch; and the prompt's states if pieces exclude their prompt."""
        whole = len(groups) != 1 or self.cost.fits(shape_of(groups[0]))
        if whole:
            n_responses = sum(group.group_size for group in groups)
            layout = lay_out(groups, self.path.layout, counted_only=counted_only)
            pieces = [MicroBatchPiece(layout, tuple(range(n_responses)))]
        else:
            pieces = self._cut(groups[0], counted_only)
        nothing = MicroBatchPiece(lay_out([], self.path.layout), ())
        pieces = [nothing] * (n_forwards - len(pieces)) + pieces
        if whole or not self._goes_below_prompt:
            return pieces, None
        prompt_ids = groups[0].prompt_token_ids.astype("int64")
        return pieces, prompt_states(model, PromptCall(prompt_ids, self.path))

    @property
    def _goes_below_prompt(self) -> bool:
        return self.prompt_once and self.path.layout == "shared" and self.path.head == "fused"

    def _cut(self, group: Group, counted_only: bool) -> list[MicroBatchPiece]:
        try:
            parts = cut_group(shape_of(group), self.cost)
        except DataError as error:
            raise error.replaced(group=group.group_id) from None
        pieces = []
        for part in parts:
            some = with_responses(group, part)
            if self._goes_below_prompt:
                layout = without_prompt(some, counted_only=counted_only)
            else:
                layout = lay_out([some], self.path.layout, counted_only=counted_only)
            pieces.append(MicroBatchPiece(layout, tuple(part)))
        return pieces

    def _tokens(
        self, model: nn.Module, piece: MicroBatchPiece, prompt: PromptStates | None
    ) -> TokenLogprobs:
        wanted = self.on_entropy is not None
        own = prompt if piece.responses else None
        call = LayoutCall(piece.layout, self.path, self.kept_bytes, wanted, own)
        return token_logprobs(model, call)

    def _sums(
        self, model: nn.Module, piece: MicroBatchPiece, prompt: PromptStates | None
    ) -> Tensor:
        found = self._tokens(model, piece, prompt)
        if self.on_entropy and found.entropy_M is not None and piece.responses:
            self.on_entropy(found.entropy_M)
        return seq_sums(found.values_M, piece.layout.targets)


def seq_sums(values_M: Tensor, targets: Targets) -> Tensor:
    """Sums over the counted tokens of each response: (R,) float64, nats.

    float64, because a float32 sum of a few thousand log-probs has an error of thousandths of a nat.
    On devices without float64 the sums are computed on the CPU.
    """
    device = float64_device(values_M.device)
    values_M = values_M.to(device).double()
    if not targets.counts_M.all():
        values_M = torch.where(to_device(targets.counts_M, device), values_M, 0.0)
    lengths_R = to_device(targets.lengths_R, device)
    # The check of the lengths would wait for the device; those of a layout are right.
    sums: Tensor = torch.segment_reduce(values_M, "sum", lengths=lengths_R, axis=0, unsafe=True)
    return sums


def with_responses(group: Group, which: Sequence[int]) -> Group:
    """A group with only the given responses; sets only the fields that layouts read."""
    mask = group.loss_mask
    return replace(
        group,
        response_token_ids=tuple(group.response_token_ids[i] for i in which),
        loss_mask=None if mask is None else tuple(mask[i] for i in which),
    )


def _in_response_order(pieces: Sequence[MicroBatchPiece], sums: Sequence[Tensor]) -> Tensor:
    """(R,) sums of all pieces in the order of the responses; the dummy's without responses."""
    if not pieces[-1].responses or len(pieces) == 1:
        return sums[-1]
    order = [number for piece in pieces for number in piece.responses]
    joined = torch.cat([own for piece, own in zip(pieces, sums, strict=True) if piece.responses])
    return joined[to_device(np.argsort(order), joined.device)]


def _piece_loss(sums: Tensor, grad_R: Tensor, piece: MicroBatchPiece) -> Tensor:
    """A scalar whose gradient is the piece's part of the gradient of the loss."""
    if not piece.responses:
        return sums.sum() * 0.0
    own = to_device(np.array(piece.responses, dtype=np.int64), grad_R.device)
    return (sums * grad_R[own]).sum()


def _detached_states(prompt: PromptStates | None) -> PromptStates | None:
    """The prompt's states, detached from their graph, as leaves that accumulate gradients."""
    if prompt is None:
        return None

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(tensor.requires_grad)

    states = {module: (leaf(k), leaf(v)) for module, (k, v) in prompt.states.items()}
    return PromptStates(states, leaf(prompt.last_hidden))


def _backward_through_prompt(prompt: PromptStates | None, leaves: PromptStates | None) -> None:
    """Propagate the gradients accumulated in the leaves through the prompt."""
    if prompt is None or leaves is None:
        return
    pairs = [(prompt.last_hidden, leaves.last_hidden)]
    for module, own in prompt.states.items():
        pairs += zip(own, leaves.states[module], strict=True)
    reached = [(tensor, leaf.grad) for tensor, leaf in pairs if leaf.grad is not None]
    torch.autograd.backward([tensor for tensor, _ in reached], [grad for _, grad in reached])
