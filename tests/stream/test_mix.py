"""Which dataset each draw goes to: exact quotas, closed-form counts, the same from any draw on."""

from __future__ import annotations

import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo_offline.errors import ConfigError
from gvpo_offline.stream.mix import Mix, MixedOrder, quotas_of
from gvpo_offline.stream.order import GroupOrder

QUOTAS = st.lists(st.integers(0, 3000), min_size=1, max_size=5).filter(any)


@settings(deadline=None, max_examples=60)
@given(QUOTAS, st.integers(0, 2**40), st.data())
def test_any_stretch_is_a_piece_of_one_sequence(
    quotas: list[int], seed: int, data: st.DataObject
) -> None:
    """Draws, and how often each dataset came before, counted by hand over two cycles."""
    mix = Mix(quotas, seed=seed)
    length = 2 * sum(quotas)
    members, draws = mix.take(0, length)
    seen = [0] * len(quotas)
    for member, draw in zip(members.tolist(), draws.tolist(), strict=True):
        assert draw == seen[member]
        seen[member] += 1
    assert seen == [2 * quota for quota in quotas]
    a = data.draw(st.integers(0, length))
    b = data.draw(st.integers(a, min(length, a + 2000)))
    piece = Mix(quotas, seed=seed).take(a, b)
    assert piece[0].tolist() == members[a:b].tolist()
    assert piece[1].tolist() == draws[a:b].tolist()
    assert mix.counts_at(a).tolist() == np.bincount(members[:a], minlength=len(quotas)).tolist()


@settings(deadline=None, max_examples=40)
@given(QUOTAS, st.data())
def test_a_dataset_is_never_a_block_from_its_share(quotas: list[int], data: st.DataObject) -> None:
    """Blocks of at most 1,024 draws and one per dataset, each with its quota to within one."""
    mix = Mix(quotas, seed=3)
    n = data.draw(st.integers(0, 3 * sum(quotas)))
    exact = [Fraction(n * quota, sum(quotas)) for quota in quotas]
    for count, share in zip(mix.counts_at(n).tolist(), exact, strict=True):
        assert abs(count - share) <= 1024 + 2 * len(quotas)


def test_neighbouring_draws_go_to_different_datasets() -> None:
    """One to one: of 100,000 neighbours half differ (a block of 128 holds 64 each: 64/127)."""
    members, _ = Mix(quotas_of([0.5, 0.5], [7, 9]), seed=1).take(0, 100_000)
    assert float(np.mean(members[1:] != members[:-1])) == pytest.approx(64 / 127, abs=0.01)
    other, _ = Mix(quotas_of([0.5, 0.5], [7, 9]), seed=2).take(0, 100_000)
    assert (members != other).mean() > 0.4


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([0.7, 0.3], [7, 3]),
        ([1.0, 2.0, 0.0], [1, 2, 0]),
        ([0.1, 0.2], [1, 2]),  # as written, not as rounded to binary
        ([1e-3, 1.0], [1, 1000]),
    ],
)
def test_weights_are_taken_as_written(weights: list[float], shares: list[int]) -> None:
    quotas = quotas_of(weights, [5] * len(weights))
    factor = Fraction(sum(quotas), sum(shares))
    assert quotas == [factor * share for share in shares]


def test_odd_weights_are_kept_to_a_millionth() -> None:
    quotas = quotas_of([3.14159265358979, 2.71828182845904], [5, 5])
    assert quotas[0] / sum(quotas) == pytest.approx(3.14159265358979 / 5.85987448204883, abs=2e-6)


def test_without_weights_every_group_counts_alike() -> None:
    assert quotas_of([None, None], [5, 100]) == [5, 100]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.0, 0.0], "sum to more than zero"),
        ([1.0, None], "either every dataset of a run has a weight or none has"),
        ([1.0, 1e-9], "a weight is 0, or at least one of 1,000,000 of their sum"),
    ],
)
def test_weights_that_mean_nothing(weights: list[float | None], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quotas_of(weights, [5, 5])


def orders() -> list[GroupOrder]:
    sizes = [np.array([4, 4, 3]), np.array([5, 2]), np.array([6])]
    return [GroupOrder(size, seed=7, window=1) for size in sizes]


@pytest.mark.parametrize("weights", [[None] * 3, [2.0, 1.0, 1.0], [0.0, 1.0, 0.5]])
def test_each_dataset_keeps_the_order_that_it_has_alone(weights: list[float | None]) -> None:
    alone = orders()
    quotas = quotas_of(weights, [order.n_groups for order in alone])
    order = MixedOrder(orders(), Mix(quotas, seed=7))
    members, row_groups, rows = order.take(0, 500)
    for number, own in enumerate(alone):
        mine = members == number
        expected = own.take(0, int(mine.sum()))
        assert row_groups[mine].tolist() == expected[0].tolist()
        assert rows[mine].tolist() == expected[1].tolist()
    for start, stop in ((0, 1), (17, 40), (123, 500), (60, 60)):
        again = pickle.loads(pickle.dumps(order)).take(start, stop)
        for found, whole in zip(again, (members, row_groups, rows), strict=True):
            assert found.tolist() == whole[start:stop].tolist()


def test_an_epoch_without_weights_has_each_group_once() -> None:
    order = MixedOrder(orders(), Mix([11, 7, 6], seed=7))
    assert order.n_groups == 24
    for epoch in range(3):
        places = list(
            zip(*(n.tolist() for n in order.take(24 * epoch, 24 * epoch + 24)), strict=True)
        )
        assert len(set(places)) == 24
        assert order.epochs_at(24 * epoch) == [epoch] * 3
