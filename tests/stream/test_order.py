"""The order of training: every group once an epoch, at a position that depends on nothing read."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gvpo_offline.errors import DataError
from gvpo_offline.stream.order import GroupOrder, IndexArray, Selection

sizes_strategy = st.lists(st.integers(1, 9), min_size=1, max_size=12).map(
    lambda sizes: np.array(sizes, np.int64)
)
seeds = st.integers(-(2**70), 2**70)
windows = st.integers(1, 6)


def all_groups(sizes: IndexArray) -> list[tuple[int, int]]:
    """(row group, row) of every group."""
    return [(index, row) for index, size in enumerate(sizes.tolist()) for row in range(size)]


def taken(order: GroupOrder, start: int, stop: int) -> list[tuple[int, int]]:
    """Draws start to stop - 1 as (row group, row)."""
    row_groups, rows = order.take(start, stop)
    assert row_groups.dtype == rows.dtype == np.int64
    return list(zip(row_groups.tolist(), rows.tolist(), strict=True))


def random_selection(sizes: IndexArray, seed: int) -> Selection:
    """About half of the groups, at least one."""
    rng = np.random.default_rng(seed)
    masks = [rng.random(size) < 0.5 for size in sizes.tolist()]
    masks[0][0] = True
    return Selection(sizes, lambda index: masks[index])


@given(sizes_strategy, seeds, windows, st.integers(0, 5))
def test_every_epoch_has_every_group_once(
    sizes: IndexArray, seed: int, window: int, epoch: int
) -> None:
    order = GroupOrder(sizes, seed=seed, window=window)
    n = order.n_groups
    assert n == sizes.sum()
    assert sorted(taken(order, epoch * n, (epoch + 1) * n)) == all_groups(sizes)


@given(sizes_strategy, seeds, windows, st.integers(0, 2**32))
def test_every_epoch_has_every_selected_group_once(
    sizes: IndexArray, seed: int, window: int, chosen: int
) -> None:
    selection = random_selection(sizes, chosen)
    order = GroupOrder(sizes, seed=seed, window=window, selection=selection)
    expected = [
        (index, row) for index in range(len(sizes)) for row in selection.rows(index).tolist()
    ]
    assert order.n_groups == len(expected) == selection.n_groups
    for epoch in range(2):
        first = epoch * order.n_groups
        assert sorted(taken(order, first, first + order.n_groups)) == expected


@given(sizes_strategy, seeds, windows, st.data())
def test_draws_do_not_depend_on_how_they_are_asked_for(
    sizes: IndexArray, seed: int, window: int, data: st.DataObject
) -> None:
    n = int(sizes.sum())
    a, b, c = sorted(data.draw(st.tuples(*[st.integers(0, 3 * n)] * 3)))
    whole = taken(GroupOrder(sizes, seed=seed, window=window), 0, 3 * n)
    fresh = GroupOrder(sizes, seed=seed, window=window)
    assert taken(fresh, a, c) == whole[a:c]
    late = taken(fresh, b, c)  # later draws first: nothing that came before is needed
    assert taken(fresh, a, b) + late == whole[a:c]


@given(sizes_strategy, seeds, windows)
def test_an_order_survives_pickling_with_its_caches(
    sizes: IndexArray, seed: int, window: int
) -> None:
    order = GroupOrder(sizes, seed=seed, window=window, selection=random_selection(sizes, 1))
    expected = taken(order, 0, 2 * order.n_groups)
    copied = pickle.loads(pickle.dumps(order))
    assert taken(copied, 0, 2 * order.n_groups) == expected
    assert taken(order, 0, 2 * order.n_groups) == expected


@given(sizes_strategy, seeds, windows)
def test_a_stretch_of_draws_touches_few_row_groups(
    sizes: IndexArray, seed: int, window: int
) -> None:
    """What is begun is finished before more than `window` row groups are open."""
    order = GroupOrder(sizes, seed=seed, window=window)
    left = dict(enumerate(sizes.tolist()))
    open_now: set[int] = set()
    stretch: set[int] = set()
    for row_group, _ in taken(order, 0, order.n_groups):
        stretch.add(row_group)
        left[row_group] -= 1
        open_now = {index for index in stretch if left[index]}
        assert len(stretch) <= window
        if not open_now:
            stretch = set()
    assert not open_now


def test_without_shuffling_the_order_is_the_datasets_own() -> None:
    sizes = np.array([3, 1, 4], np.int64)
    order = GroupOrder(sizes, seed=7, window=2, shuffle=False)
    assert taken(order, 0, 16) == all_groups(sizes) * 2


def test_seeds_and_epochs_change_the_order() -> None:
    sizes = np.full(10, 20, np.int64)
    epochs = {
        (seed, epoch): tuple(
            taken(GroupOrder(sizes, seed=seed, window=2), 200 * epoch, 200 * (epoch + 1))
        )
        for seed in (0, 1, 2**64 + 1, -1)
        for epoch in (0, 1)
    }
    # A seed counts modulo 2^64, so 2^64 + 1 is 1.
    assert len(set(epochs.values())) == 6
    assert epochs[1, 0] == epochs[2**64 + 1, 0]


def test_the_order_is_the_same_in_every_release() -> None:
    """Written down from this very code; a change would break the resuming of running runs."""
    order = GroupOrder(np.array([4, 4, 2], np.int64), seed=42, window=2)
    assert taken(order, 0, 10) == PINNED


PINNED = [(1, 0), (1, 3), (1, 1), (2, 1), (1, 2), (2, 0), (0, 2), (0, 1), (0, 0), (0, 3)]


def spread(positions: IndexArray, n_groups: int) -> float:
    """How evenly neighbours on disk lie over an epoch, 1 for a global permutation.

    The mean distance of two groups that are neighbours on disk, over what it is if both fall
    anywhere: a third of the epoch.
    """
    return float(np.abs(np.diff(positions)).mean() / (n_groups / 3))


def test_a_window_mixes_its_row_groups_and_the_epoch_mixes_the_windows() -> None:
    """Within a window neighbours spread like in a permutation of it; windows of a few row groups
    then come in random order.
    """
    sizes = np.full(64, 256, np.int64)
    n = int(sizes.sum())
    order = GroupOrder(sizes, seed=3, window=4)
    row_groups, rows = order.take(0, n)
    position = np.empty(n, np.int64)
    position[row_groups * 256 + rows] = np.arange(n)
    # Neighbours within one row group lie in one window of 1,024 draws.
    inside = np.abs(np.diff(position.reshape(64, 256), axis=1)).mean()
    assert inside == pytest.approx(1024 / 3, rel=0.02)
    # Row groups next to one another on disk lie anywhere in the epoch.
    assert spread(position.reshape(64, 256).mean(axis=1), n) == pytest.approx(1, abs=0.25)
    # One window over everything is a global permutation.
    row_groups, rows = GroupOrder(sizes, seed=3, window=64).take(0, n)
    position[row_groups * 256 + rows] = np.arange(n)
    assert spread(position, n) == pytest.approx(1, abs=0.02)


def test_hashed_permutations_are_uniform() -> None:
    """Each of 4 groups stands at each of 4 places in a quarter of 4,000 seeds: chi-squared."""
    counts = np.zeros((4, 4))
    for seed in range(4000):
        row_groups, rows = GroupOrder(np.array([2, 2], np.int64), seed=seed, window=2).take(0, 4)
        counts[np.arange(4), row_groups * 2 + rows] += 1
    chi_squared = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_squared < 27.9  # 9 degrees of freedom, p = 0.001


def test_a_selection_of_nothing_is_refused() -> None:
    sizes = np.array([3, 2], np.int64)
    nothing = Selection(sizes, lambda index: np.zeros(sizes[index], bool))
    with pytest.raises(DataError, match=r"at least one group.*eval_fraction"):
        GroupOrder(sizes, seed=0, window=1, selection=nothing)


@given(sizes_strategy, st.integers(0, 2**32))
def test_a_selection_is_named_by_what_it_selects(sizes: IndexArray, chosen: int) -> None:
    one, same = random_selection(sizes, chosen), random_selection(sizes, chosen)
    rng = np.random.default_rng(chosen)
    masks = [rng.random(size) < 0.5 for size in sizes.tolist()]
    masks[0][0] = True
    assert one.fingerprint == same.fingerprint
    assert [one.rows(i).tolist() for i in range(len(sizes))] == [
        np.flatnonzero(mask).tolist() for mask in masks
    ]
    masks[-1][-1] ^= True
    assert Selection(sizes, lambda index: masks[index]).fingerprint != one.fingerprint
