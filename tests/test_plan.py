"""How a step's groups are shared over ranks and cut into micro-batches."""

from __future__ import annotations

import itertools

import pytest
from builders import make_group
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo_offline.stream.plan import GroupShape, pack, plan_step, shape_of, share_out

shapes_strategy = st.lists(
    st.builds(GroupShape, rows=st.integers(2, 9), width=st.integers(2, 60)), max_size=40
)
world_sizes = st.sampled_from([1, 2, 3, 4, 8])
budgets = st.integers(1, 1500)


def padded(shapes: list[GroupShape], members: list[int]) -> int:
    """Tokens of the micro-batch, every row as long as the longest."""
    rows = sum(shapes[i].rows for i in members)
    return rows * max((shapes[i].width for i in members), default=0)


@given(shapes_strategy, world_sizes, budgets)
def test_every_group_is_computed_once_whatever_the_world_size(
    shapes: list[GroupShape], world_size: int, budget: int
) -> None:
    plans = [
        plan_step(shapes, world_size=world_size, rank=rank, budget=budget)
        for rank in range(world_size)
    ]
    everything = [i for plan in plans for members in plan for i in members]
    assert sorted(everything) == list(range(len(shapes)))


@given(shapes_strategy, world_sizes, budgets)
def test_ranks_have_equally_many_micro_batches_and_none_is_empty_for_all(
    shapes: list[GroupShape], world_size: int, budget: int
) -> None:
    plans = [
        plan_step(shapes, world_size=world_size, rank=rank, budget=budget)
        for rank in range(world_size)
    ]
    assert len({len(plan) for plan in plans}) == 1
    for members in zip(*plans, strict=True):
        assert any(members)
    for plan in plans:  # the empty ones come last
        assert [bool(members) for members in plan] == sorted(map(bool, plan), reverse=True)


@given(shapes_strategy, budgets)
def test_a_micro_batch_keeps_the_budget_unless_it_is_one_larger_group(
    shapes: list[GroupShape], budget: int
) -> None:
    for members in pack(shapes, budget):
        assert padded(shapes, members) <= budget or len(members) == 1


@given(shapes_strategy, budgets)
def test_no_two_micro_batches_could_be_one(shapes: list[GroupShape], budget: int) -> None:
    """First fit leaves at most one micro-batch that is at most half full, for equal widths."""
    equal = [GroupShape(shape.rows, 10) for shape in shapes]
    sizes = [padded(equal, members) for members in pack(equal, budget)]
    assert sum(2 * size <= budget for size in sizes) <= 1


def loads_of(costs: list[int], world_size: int) -> list[int]:
    """Cost of each rank's share."""
    shares = share_out(costs, world_size)
    assert sorted(itertools.chain.from_iterable(shares)) == list(range(len(costs)))
    return [sum(costs[i] for i in share) for share in shares]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), world_sizes)
def test_no_rank_has_more_than_its_part_and_one_group(costs: list[int], world_size: int) -> None:
    """The dearest rank took its last item when no other had less: mean + (1 - 1/m) of that item."""
    loads = loads_of(costs, world_size)
    assert max(loads) <= sum(costs) / world_size + (1 - 1 / world_size) * max(costs)
    assert max(loads) - min(loads) <= max(costs)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=7), st.sampled_from([2, 3]))
def test_longest_first_is_within_a_third_of_the_best(costs: list[int], world_size: int) -> None:
    """R. L. Graham, Bounds on multiprocessing timing anomalies (1969): 4/3 - 1/(3 m)."""
    best = min(
        max(sum(c for c, r in zip(costs, dealt, strict=True) if r == rank) for rank in dealt)
        for dealt in itertools.product(range(world_size), repeat=len(costs))
    )
    assert max(loads_of(costs, world_size)) <= (4 / 3 - 1 / (3 * world_size)) * best + 1e-9


def test_a_plan_worked_by_hand() -> None:
    """Costs 4x10=40, 2x30=60, 3x10=30, 2x5=10 on two ranks: 60+10 and 40+30.

    Rank 0 with budget 60: the group of 2x30, then 2x5 (together 4 rows of 30 are 120): two micro-
    batches. Rank 1: 4x10 and 3x10 together 70 > 60: two as well.
    """
    shapes = [GroupShape(4, 10), GroupShape(2, 30), GroupShape(3, 10), GroupShape(2, 5)]
    assert share_out([shape.padded_tokens for shape in shapes], 2) == [[1, 3], [0, 2]]
    assert plan_step(shapes, world_size=2, rank=0, budget=60) == [[1], [3]]
    assert plan_step(shapes, world_size=2, rank=1, budget=60) == [[0], [2]]
    assert plan_step(shapes, world_size=2, rank=1, budget=70) == [[0, 2], []]
    assert plan_step(shapes, world_size=2, rank=0, budget=70) == [[1], [3]]


def test_more_ranks_than_groups() -> None:
    shapes = [GroupShape(2, 5)]
    plans = [plan_step(shapes, world_size=3, rank=rank, budget=100) for rank in range(3)]
    assert plans == [[[0]], [[]], [[]]]


def test_the_shape_of_a_group_is_its_padded_rows() -> None:
    """3 responses, prompt of 5, longest response of 7: 3 rows of 12, 36 tokens."""
    group = make_group(k=3, prompt_tokens=5, response_tokens=7)
    assert shape_of(group) == GroupShape(rows=3, width=12)
    assert shape_of(group).padded_tokens == 36


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_plan_does_not_depend_on_chance(world_size: int) -> None:
    shapes = [GroupShape(2 + i % 3, 10 + i % 4) for i in range(20)]
    one, two = (
        [plan_step(shapes, world_size=world_size, rank=r, budget=90) for r in range(world_size)]
        for _ in range(2)
    )
    assert one == two
