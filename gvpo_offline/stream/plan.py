"""How the groups of a step are shared over ranks and cut into micro-batches: arithmetic on lengths.

Every rank plans for all of them from the same lengths, so no rank has to ask another how many
micro-batches it has.
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
        prompt: of its prompt.
        responses: of its responses. Their last tokens predict nothing and are not computed.
    """

    prompt: int
    responses: tuple[int, ...]

    @property
    def width(self) -> int:
        """Computed tokens of its longest prompt-and-response row."""
        return self.prompt + max(self.responses) - 1

    @property
    def rows(self) -> int:
        """Its responses."""
        return len(self.responses)

    def tokens(self, layout: str) -> int:
        """Tokens that the group alone costs in a layout, as `compute.paths` names them."""
        if layout == "shared":
            return self.prompt + sum(self.responses) - self.rows
        if layout == "packed":
            return self.rows * (self.prompt - 1) + sum(self.responses)
        if layout == "continued":
            return self.prompt + self.rows * (max(self.responses) - 1)
        return self.rows * self.width

    @property
    def attended(self) -> int:
        """Pairs of a token and one that it sees, each distinct token once."""
        total = sum(self.responses)
        squares: int = sum(map(operator.mul, self.responses, self.responses))
        # n - 1 computed tokens of a response see the prompt, and n (n - 1) / 2 see one another.
        own: int = self.prompt * (total - self.rows) + (squares - total) // 2
        return self.prompt * (self.prompt + 1) // 2 + own


def shape_of(group: Group) -> GroupShape:
    """The shape of a group."""
    return GroupShape(len(group.prompt_token_ids), tuple(group.response_lengths))


@dataclass(frozen=True)
class CostModel:
    """What a micro-batch may hold, and what a group's computation costs.

    Attributes:
        layout: how groups are laid out.
        max_tokens: tokens of a micro-batch, as laid out.
        pairs_per_token: pairs of attention that cost as much as the rest of a token: about six
            times a model's width.
    """

    layout: str
    max_tokens: int
    pairs_per_token: int = 6 * 2048

    def fits(self, shape: GroupShape) -> bool:
        """Whether a group can be one micro-batch."""
        return shape.tokens(self.layout) <= self.max_tokens

    def work(self, shape: GroupShape) -> float:
        """A group's cost, in tokens."""
        return shape.tokens(self.layout) + shape.attended / self.pairs_per_token


@dataclass(frozen=True)
class MicroBatchPlan:
    """One micro-batch of one rank.

    Attributes:
        members: indices of its groups; none where other ranks have more micro-batches.
        passes: forward passes that every rank makes for the micro-batches at this place: 1, or as
            many as the largest of them has pieces.
    """

    members: tuple[int, ...]
    passes: int = 1


def share_out(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """Deal items to ranks, dearest first, each to the rank with the least so far.

    Args:
        costs: one cost per item.
        world_size: number of ranks.

    Returns:
        For each rank the indices of its items, ascending. Ties go to the lower index and rank.
    """
    loads = [(0.0, rank) for rank in range(world_size)]  # a heap
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + costs[index], rank))
        shares[rank].append(index)
    return [sorted(share) for share in shares]


def pack(shapes: Sequence[GroupShape], model: CostModel) -> list[list[int]]:
    """Cut whole groups into micro-batches of at most `model.max_tokens`.

    First fit over groups from wide to narrow (padded) or from large to small. A group that is
    larger than the budget is a micro-batch of its own, to be computed in pieces; those come first.

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
    not_full: list[int] = []  # bins that a smallest group would still fit into
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
    """How many pieces a micro-batch is computed in."""
    if len(members) != 1 or model.fits(shapes[members[0]]):
        return 1
    return len(cut_group(shapes[members[0]], model))


def cut_group(shape: GroupShape, model: CostModel) -> list[list[int]]:
    """Cut the responses of a group that is larger than the budget into pieces that are not.

    Each piece has the prompt and some of the responses.

    Returns:
        For each piece the indices of its responses; the piece with the most tokens comes last.

    Raises:
        DataError: the prompt and one response alone are larger than the budget.
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

    All ranks get the same number of micro-batches with the same number of passes (sharded models
    compute in lockstep); a rank with fewer gets empty ones. The last has one pass on every rank, so
    that gradients can be exchanged with it.
    """
    shares = share_out([model.work(shape) for shape in shapes], world_size)
    plans = [
        [[share[i] for i in members] for members in pack([shapes[i] for i in share], model)]
        for share in shares
    ]
    pieces = [[n_pieces(shapes, members, model) for members in plan] for plan in plans]
    length = max(len(plan) for plan in plans)
    passes = [max((p[i] for p in pieces if i < len(p)), default=1) for i in range(length)]
    if passes[-1] > 1:
        passes.append(1)
    own = plans[rank]
    return [
        MicroBatchPlan(tuple(own[i]) if i < len(own) else (), count)
        for i, count in enumerate(passes)
    ]
