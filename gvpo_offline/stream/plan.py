"""How the groups of a step are shared over ranks and cut into micro-batches: arithmetic on lengths.

Every rank plans for all of them from the same lengths, so no rank has to ask another how many
micro-batches it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gvpo_offline.schema import Group


@dataclass(frozen=True, slots=True)
class GroupShape:
    """What a group costs when its responses are padded rows.

    Attributes:
        rows: its responses.
        width: tokens of its longest prompt-and-response row.
    """

    rows: int
    width: int

    @property
    def padded_tokens(self) -> int:
        """Tokens computed for the group alone."""
        return self.rows * self.width


def shape_of(group: Group) -> GroupShape:
    """The shape of a group."""
    return GroupShape(group.group_size, len(group.prompt_token_ids) + max(group.response_lengths))


def share_out(costs: Sequence[int], world_size: int) -> list[list[int]]:
    """Deal items to ranks, dearest first, each to the rank with the least so far.

    Args:
        costs: one cost per item.
        world_size: number of ranks.

    Returns:
        For each rank the indices of its items, ascending. Ties go to the lower index and rank.
    """
    loads = [0] * world_size
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(world_size), key=lambda r: (loads[r], r))
        loads[rank] += costs[index]
        shares[rank].append(index)
    return [sorted(share) for share in shares]


def pack(shapes: Sequence[GroupShape], budget: int) -> list[list[int]]:
    """Cut whole groups into micro-batches of at most `budget` padded tokens.

    First fit over groups from wide to narrow, so that rows of like width meet. A group that is
    larger than the budget alone is a micro-batch of its own.

    Returns:
        For each micro-batch the indices of its groups.
    """
    bins: list[tuple[int, list[int]]] = []  # (width, members); the first member is the widest
    rows: list[int] = []
    for index in sorted(range(len(shapes)), key=lambda i: (-shapes[i].width, -shapes[i].rows, i)):
        shape = shapes[index]
        for number, (width, members) in enumerate(bins):
            if (rows[number] + shape.rows) * width <= budget:
                members.append(index)
                rows[number] += shape.rows
                break
        else:
            bins.append((shape.width, [index]))
            rows.append(shape.rows)
    return [members for _, members in bins]


def plan_step(
    shapes: Sequence[GroupShape], *, world_size: int, rank: int, budget: int
) -> list[list[int]]:
    """The micro-batches of one rank for one step.

    Returns:
        Indices into `shapes`, micro-batch by micro-batch. All ranks get the same number of
        micro-batches (sharded models compute in lockstep); a rank with fewer gets empty ones.
    """
    shares = share_out([shape.padded_tokens for shape in shapes], world_size)
    plans = [
        [[share[i] for i in members] for members in pack([shapes[i] for i in share], budget)]
        for share in shares
    ]
    longest = max(len(plan) for plan in plans)
    return plans[rank] + [[] for _ in range(longest - len(plans[rank]))]
