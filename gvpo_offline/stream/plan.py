"""Assignment of a step's groups to ranks and micro-batches, computed from lengths.

Every rank computes the plan of all ranks from the same lengths, without communication.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from gvpo_offline.errors import DataError
from gvpo_offline.group import Group


@dataclass(frozen=True, slots=True)
class GroupShape:
    """The lengths of a group, in tokens.

    Attributes:
        prompt: length of its prompt.
        responses: (K,) lengths of its responses. The last token of each is not an input.
    """

    prompt: int
    responses: tuple[int, ...]

    @property
    def width(self) -> int:
        """Input tokens of its longest prompt with one response."""
        return self.prompt + max(self.responses) - 1

    @property
    def rows(self) -> int:
        """Number of responses."""
        return len(self.responses)

    def tokens(self, layout: str) -> int:
        """Input tokens of the group alone in a layout of `compute.paths`."""
        if layout == "shared":
            return self.prompt + sum(self.responses) - self.rows
        if layout == "packed":
            return self.rows * (self.prompt - 1) + sum(self.responses)
        if layout == "continued":
            return self.prompt + self.rows * (max(self.responses) - 1)
        return self.rows * self.width

    @property
    def attended(self) -> int:
        """Pairs of a query token and a key that it attends to, with each distinct token once."""
        total = sum(self.responses)
        squares: int = sum(map(operator.mul, self.responses, self.responses))
        # n - 1 input tokens of a response attend to the prompt, and to one another in n (n - 1) / 2
        # pairs.
        own: int = self.prompt * (total - self.rows) + (squares - total) // 2
        return self.prompt * (self.prompt + 1) // 2 + own


def shape_of(group: Group) -> GroupShape:
    """The shape of a group."""
    return GroupShape(len(group.prompt_token_ids), tuple(group.response_lengths))


@dataclass(frozen=True)
class CostModel:
    """Size limit of a micro-batch, and cost of a group.

    Attributes:
        layout: layout of groups in the model's input.
        max_tokens: input tokens of a micro-batch in that layout.
        pairs_per_token: attention pairs that cost as much as all other computation of a token:
            about six times a model's width.
    """

    layout: str
    max_tokens: int
    pairs_per_token: int = 6 * 2048

    def fits(self, shape: GroupShape) -> bool:
        """Whether a group fits into one micro-batch."""
        return shape.tokens(self.layout) <= self.max_tokens

    def work(self, shape: GroupShape) -> float:
        """Cost of a group, in tokens."""
        return shape.tokens(self.layout) + shape.attended / self.pairs_per_token


@dataclass(frozen=True)
class MicroBatchPlan:
    """One micro-batch of one rank.

    Attributes:
        members: indices of its groups; empty if other ranks have more micro-batches.
        n_forwards: forward passes that every rank makes for this micro-batch number: the largest
            number of pieces over all ranks.
    """

    members: tuple[int, ...]
    n_forwards: int = 1


def share_out(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """Assign items to ranks with balanced costs: by descending cost, to the least loaded rank.

    This is Graham's LPT rule: the largest load is at most 4/3 of the optimum.

    Args:
        costs: one cost per item.
        world_size: number of ranks.

    Returns:
        For each rank the indices of its items, ascending. Ties go to the lower index, then rank.
    """
    loads = [(0.0, rank) for rank in range(world_size)]  # a heap
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + costs[index], rank))
        shares[rank].append(index)
    return [sorted(share) for share in shares]


def pack(shapes: Sequence[GroupShape], model: CostModel) -> list[list[int]]:
    """Pack whole groups into micro-batches of at most `model.max_tokens`.

    First fit over groups by descending width (padded layout) or tokens. A group above the limit is
    a micro-batch of its own, which is computed in pieces; these come first.

    Returns:
        For each micro-batch the indices of its groups.
    """
    by_width = model.layout == "padded"
    size = [shape.width if by_width else shape.tokens(model.layout) for shape in shapes]
    rows = [shape.rows for shape in shapes]
    needs = rows if by_width else size
    bins: list[list[int]] = []
    filled: list[int] = []  # rows of the widest member's width, or tokens
    limits: list[int] = []
    smallest = min(needs, default=0)
    not_full: list[int] = []  # bins into which the smallest group still fits
    for index in sorted(range(len(shapes)), key=lambda i: (-size[i], -rows[i], i)):
        need = needs[index]
        number = next((n for n in not_full if filled[n] + need <= limits[n]), len(bins))
        if number == len(bins):
            bins.append([])
            filled.append(0)
            limits.append(model.max_tokens // size[index] if by_width else model.max_tokens)
            not_full.append(number)
        bins[number].append(index)
        filled[number] += need
        if filled[number] + smallest > limits[number]:
            not_full.remove(number)
    return sorted(bins, key=lambda members: n_pieces(shapes, members, model) == 1)


def n_pieces(shapes: Sequence[GroupShape], members: Sequence[int], model: CostModel) -> int:
    """Number of pieces in which a micro-batch is computed."""
    if len(members) != 1 or model.fits(shapes[members[0]]):
        return 1
    return len(cut_group(shapes[members[0]], model))


def cut_group(shape: GroupShape, model: CostModel) -> list[list[int]]:
    """Divide the responses of a group above the limit into pieces that fit.

    Each piece consists of the prompt and some of the responses.

    Returns:
        For each piece the indices of its responses; the piece with the most tokens comes last.

    Raises:
        DataError: the prompt and one response alone are above the limit.
    """
    if shape.width > model.max_tokens:
        raise DataError(
            "a prompt and one of its responses fit into max_tokens_per_micro_batch",
            received=f"{shape.width} tokens, more than {model.max_tokens}",
            remedy="raise max_tokens_per_micro_batch, or leave out responses of this length",
        )
    pieces: list[list[int]] = []
    for index in sorted(range(shape.rows), key=lambda i: (-shape.responses[i], i)):
        for piece in pieces:
            together = tuple(shape.responses[i] for i in (*piece, index))
            if model.fits(GroupShape(shape.prompt, together)):
                piece.append(index)
                break
        else:
            pieces.append([index])
    pieces.sort(key=lambda piece: sum(shape.responses[i] for i in piece))
    return [sorted(piece) for piece in pieces]


def plan_step(
    shapes: Sequence[GroupShape], model: CostModel, *, world_size: int, rank: int
) -> list[MicroBatchPlan]:
    """The micro-batches of one rank for one step.

    All ranks get the same number of micro-batches with the same `n_forwards`, because sharded
    models communicate in every forward pass; a rank with fewer gets empty ones. The last has one
    forward pass on every rank, so that gradients can be synchronized in its backward pass.
    """
    shares = share_out([model.work(shape) for shape in shapes], world_size)
    plans = [
        [[share[i] for i in members] for members in pack([shapes[i] for i in share], model)]
        for share in shares
    ]
    pieces = [[n_pieces(shapes, members, model) for members in plan] for plan in plans]
    length = max(len(plan) for plan in plans)
    n_forwards = [max((p[i] for p in pieces if i < len(p)), default=1) for i in range(length)]
    if n_forwards[-1] > 1:
        n_forwards.append(1)
    own = plans[rank]
    return [
        MicroBatchPlan(tuple(own[i]) if i < len(own) else (), count)
        for i, count in enumerate(n_forwards)
    ]
