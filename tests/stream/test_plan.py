"""How a step's groups are shared over ranks, cut into micro-batches and, if large, into pieces."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.builders import make_group

from gvpo_offline.compute.layout import lay_out
from gvpo_offline.compute.settings import LayoutName
from gvpo_offline.errors import DataError
from gvpo_offline.group import Group
from gvpo_offline.stream.plan import (
    CostModel,
    GroupShape,
    MicroBatchPlan,
    cut_group,
    n_pieces,
    pack,
    plan_step,
    shape_of,
    share_out,
)

LAYOUTS: tuple[LayoutName, ...] = ("shared", "packed", "continued", "padded")
shape_strategy = st.builds(
    GroupShape,
    prompt=st.integers(1, 40),
    responses=st.lists(st.integers(1, 40), min_size=2, max_size=9).map(tuple),
)
shapes_strategy = st.lists(shape_strategy, min_size=1, max_size=30)
world_sizes = st.sampled_from([1, 2, 3, 4, 8])
layouts = st.sampled_from(LAYOUTS)


@st.composite
def steps_strategy(draw: st.DrawFn) -> tuple[list[GroupShape], CostModel]:
    """The groups of a step, and a budget that takes every prompt with one response."""
    shapes = draw(shapes_strategy)
    longest = max(shape.width for shape in shapes)
    budget = longest + draw(st.integers(0, 60) | st.integers(0, 1500))
    return shapes, CostModel(draw(layouts), budget, pairs_per_token=draw(st.integers(1, 10_000)))


def laid_out(shapes: list[GroupShape], model: CostModel) -> int:
    """Tokens of groups that are computed together: every padded row as long as the longest."""
    if model.layout == "padded":
        return sum(s.rows for s in shapes) * max((s.width for s in shapes), default=0)
    return sum(shape.tokens(model.layout) for shape in shapes)


def plans_of(
    shapes: list[GroupShape], model: CostModel, world_size: int
) -> list[list[MicroBatchPlan]]:
    return [
        plan_step(shapes, model, world_size=world_size, rank=rank) for rank in range(world_size)
    ]


def group_of(shape: GroupShape) -> Group:
    """A group of these lengths whose tokens are all different, so that nothing is shared."""
    tokens = iter(range(shape.prompt + sum(shape.responses)))

    def take(n: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return np.array(list(itertools.islice(tokens, n)), dtype=np.int32)

    return Group(
        group_id="g",
        prompt_token_ids=take(shape.prompt),
        response_token_ids=tuple(take(n) for n in shape.responses),
        samplers=("",) * shape.rows,
        truncated=(False,) * shape.rows,
    )


# ---- lengths ----


def test_the_shape_of_a_group_by_hand() -> None:
    """A prompt of 5 and three responses of 7, 4 and 1 tokens; each last token is not computed.

    Shared: 5 + 6 + 3 + 0 = 14. Packed: 11 + 8 + 5 = 24. Continued: 5 + 3 x 6 = 23. Padded: 3 x 11.
    Pairs: the prompt 1 + .. + 5 = 15; 6 tokens that see 6 to 11, 51; 3 that see 6 to 8, 21: 87.
    """
    group = make_group(
        k=3, prompt_tokens=5, response_token_ids=[np.ones(n, int) for n in (7, 4, 1)]
    )
    shape = shape_of(group)
    assert shape == GroupShape(prompt=5, responses=(7, 4, 1))
    assert (shape.width, shape.rows) == (11, 3)
    assert [shape.tokens(name) for name in LAYOUTS] == [14, 24, 23, 33]
    assert shape.attended == 87
    assert CostModel("shared", 100, pairs_per_token=10).work(shape) == pytest.approx(22.7)


@given(st.lists(shape_strategy, min_size=1, max_size=4), layouts)
def test_tokens_are_counted_as_they_are_laid_out(
    shapes: list[GroupShape], layout: LayoutName
) -> None:
    model = CostModel(layout, 1)
    groups = [group_of(shape) for shape in shapes]
    assert lay_out(groups, layout).n_tokens == laid_out(shapes, model)
    for group, shape in zip(groups, shapes, strict=True):
        assert lay_out([group], layout).n_tokens == shape.tokens(layout)


@given(shape_strategy)
def test_no_layout_has_fewer_tokens_than_the_shared_one(shape: GroupShape) -> None:
    shared, packed, continued, padded = (shape.tokens(name) for name in LAYOUTS)
    assert shape.width <= shared <= min(packed, continued)
    assert max(packed, continued) <= padded


@given(shape_strategy)
def test_attended_pairs_are_those_counted_one_by_one(shape: GroupShape) -> None:
    prompt = sum(range(1, shape.prompt + 1))
    seen = [shape.prompt + i for n in shape.responses for i in range(1, n)]
    assert shape.attended == prompt + sum(seen)


# ---- micro-batches ----


@given(steps_strategy(), world_sizes)
def test_every_group_is_computed_once_whatever_the_world_size(
    step: tuple[list[GroupShape], CostModel], world_size: int
) -> None:
    shapes, model = step
    plans = plans_of(shapes, model, world_size)
    everything = [i for plan in plans for own in plan for i in own.members]
    assert sorted(everything) == list(range(len(shapes)))


@given(steps_strategy(), world_sizes)
def test_ranks_make_the_same_passes_and_none_for_nothing(
    step: tuple[list[GroupShape], CostModel], world_size: int
) -> None:
    """As many as the rank with most pieces needs; one in the last, with which gradients are
    exchanged; a micro-batch without groups on any rank only where there would be none such.
    """
    shapes, model = step
    plans = plans_of(shapes, model, world_size)
    assert len({tuple(own.n_forwards for own in plan) for plan in plans}) == 1
    assert plans[0][-1].n_forwards == 1
    for number, row in enumerate(zip(*plans, strict=True)):
        needed = [n_pieces(shapes, own.members, model) for own in row if own.members]
        assert row[0].n_forwards == max(needed, default=1)
        if not needed:
            assert number == len(plans[0]) - 1
            assert plans[0][number - 1].n_forwards > 1
    for plan in plans:  # the empty ones come last
        filled = [bool(own.members) for own in plan]
        assert filled == sorted(filled, reverse=True)


@given(steps_strategy())
def test_a_micro_batch_keeps_the_budget_unless_it_is_one_larger_group(
    step: tuple[list[GroupShape], CostModel],
) -> None:
    """Larger groups come first: the passes that they ask of other ranks fall together there."""
    shapes, model = step
    bins = pack(shapes, model)
    pieces = [n_pieces(shapes, members, model) for members in bins]
    for members, count in zip(bins, pieces, strict=True):
        tokens = laid_out([shapes[i] for i in members], model)
        assert (tokens <= model.max_tokens) == (count == 1)
        assert count == 1 or len(members) == 1
    assert [count > 1 for count in pieces] == sorted((c > 1 for c in pieces), reverse=True)


@given(steps_strategy())
def test_no_two_micro_batches_could_be_one(step: tuple[list[GroupShape], CostModel]) -> None:
    """First fit opens a micro-batch only for what fits in none before."""
    shapes, model = step
    for one, other in itertools.combinations(pack(shapes, model), 2):
        assert laid_out([shapes[i] for i in (*one, *other)], model) > model.max_tokens


# ---- pieces ----


@given(shape_strategy, layouts, st.integers(0, 200))
def test_pieces_have_every_response_once_and_keep_the_budget(
    shape: GroupShape, layout: LayoutName, room: int
) -> None:
    """Measured on what is laid out; no two of them could be one, and the largest comes last."""
    model = CostModel(layout, shape.width + room)
    pieces = cut_group(shape, model)
    assert sorted(i for piece in pieces for i in piece) == list(range(shape.rows))

    def tokens(which: list[int]) -> int:
        part = GroupShape(shape.prompt, tuple(shape.responses[i] for i in which))
        return lay_out([group_of(part)], layout).n_tokens

    assert all(tokens(piece) <= model.max_tokens for piece in pieces)
    for one, other in itertools.combinations(pieces, 2):
        assert tokens(one + other) > model.max_tokens
    sizes = [sum(shape.responses[i] for i in piece) for piece in pieces]
    assert sizes[-1] == max(sizes)
    assert (len(pieces) == 1) == (shape.tokens(layout) <= model.max_tokens)
    assert n_pieces([shape], [0], model) == len(pieces)


@given(shape_strategy, layouts)
def test_a_prompt_and_a_response_over_the_budget_cannot_be_cut(
    shape: GroupShape, layout: LayoutName
) -> None:
    assume(shape.width > 1)
    cut_group(shape, CostModel(layout, shape.width))
    limit = shape.width - 1
    with pytest.raises(DataError, match=f"{shape.width} tokens, more than {limit}"):
        cut_group(shape, CostModel(layout, limit))


# ---- ranks ----


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


def test_ties_go_to_the_lower_index_and_the_lower_rank() -> None:
    """Equal costs are taken in the order of their indices, and equal loads in the order of ranks.

    Five items of cost 1 on two ranks: 0 goes to rank 0 (loads 0, 0), 1 to rank 1 (1, 0), 2 to
    rank 0 (1, 1), 3 to rank 1 (2, 1), 4 to rank 0 (2, 2). Three ranks, costs 2, 3, 3, 2, 2: items 1
    and 2 (cost 3) go to ranks 0 and 1, items 0 and 3 (cost 2) to rank 2, which has 0, and then to
    rank 2 again, which has 2 against 3 and 3; item 4 goes to rank 0, the lower of two with load 3.
    """
    assert share_out([1, 1, 1, 1, 1], 2) == [[0, 2, 4], [1, 3]]
    assert share_out([2, 3, 3, 2, 2], 3) == [[1, 4], [2], [0, 3]]
    assert share_out([5.0], 3) == [[0], [], []]


@given(st.integers(0, 12), world_sizes)
def test_equal_costs_are_dealt_round_robin(n: int, world_size: int) -> None:
    """Item i goes to rank i mod m where all n items cost the same."""
    expected = [list(range(rank, n, world_size)) for rank in range(world_size)]
    assert share_out([7.0] * n, world_size) == expected


def test_a_plan_worked_by_hand() -> None:
    """Shared, so prompt + computed tokens: 4+3x12=40, 20+2x20=60, 6+2x12=30, 4+2x3=10.

    Two ranks: 60+10 and 40+30. A budget of 70 takes each share at once; one of 60 takes each group
    alone. 45 is less than the second group has: its responses go one by one with their prompt, 40
    tokens each, two passes; the other rank has to make two as well.
    """
    shapes = [
        GroupShape(4, (13, 13, 13)),
        GroupShape(20, (21, 21)),
        GroupShape(6, (13, 13)),
        GroupShape(4, (4, 4)),
    ]

    def members_and_passes(budget: int, rank: int) -> list[tuple[tuple[int, ...], int]]:
        model = CostModel("shared", budget, pairs_per_token=10**9)
        plan = plan_step(shapes, model, world_size=2, rank=rank)
        return [(own.members, own.n_forwards) for own in plan]

    model = CostModel("shared", 60, pairs_per_token=10**9)
    assert [round(model.work(shape)) for shape in shapes] == [40, 60, 30, 10]
    assert share_out([model.work(shape) for shape in shapes], 2) == [[1, 3], [0, 2]]
    assert members_and_passes(70, 0) == [((1, 3), 1)]
    assert members_and_passes(70, 1) == [((0, 2), 1)]
    assert members_and_passes(60, 0) == [((1,), 1), ((3,), 1)]
    assert members_and_passes(60, 1) == [((0,), 1), ((2,), 1)]
    assert members_and_passes(45, 0) == [((1,), 2), ((3,), 1)]
    assert members_and_passes(45, 1) == [((0,), 2), ((2,), 1)]
    alone = plan_step([shapes[1]], CostModel("shared", 45), world_size=1, rank=0)
    assert alone == [MicroBatchPlan((0,), n_forwards=2), MicroBatchPlan(())]


def test_more_ranks_than_groups() -> None:
    plans = plans_of([GroupShape(2, (3, 4))], CostModel("shared", 100), world_size=3)
    assert [[own.members for own in plan] for plan in plans] == [[(0,)], [()], [()]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_plan_does_not_depend_on_chance(world_size: int, layout: LayoutName) -> None:
    shapes = [GroupShape(5 + i % 4, (6,) * (2 + i % 3)) for i in range(20)]
    model = CostModel(layout, 20)
    assert plans_of(shapes, model, world_size) == plans_of(shapes, model, world_size)
