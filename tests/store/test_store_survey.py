"""Counts of a dataset against counting by hand."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import build_dataset, group_strategy, make_group, make_groups, training_table

from gvpo_offline.errors import DataError
from gvpo_offline.group import Group
from gvpo_offline.store.adopt import adopt_parquet
from gvpo_offline.store.survey import SummaryRows, Survey, summary_table, survey

REQUIRED = ["group_id", "prompt_token_ids", "response_token_ids", "rewards", "ref_seq_logprobs"]


def counted_by_hand(groups: list[Group]) -> dict[str, Any]:
    """What `survey` must find, from the groups themselves, one at a time."""
    counts: dict[str, Any] = {
        "n_groups": len(groups),
        "n_responses": sum(len(group.response_token_ids) for group in groups),
        "n_tokens": 0,
        "equal_reward_groups": 0,
        "truncated_responses": 0,
        "samplers": Counter(),
        "max_group_size": 0,
        "max_group_tokens": 0,
        "max_row_tokens": 0,
    }
    for group in groups:
        k, own = 0, len(group.prompt_token_ids)
        counts["n_tokens"] += len(group.prompt_token_ids)
        for ids, sampler, cut in zip(
            group.response_token_ids, group.samplers, group.truncated, strict=True
        ):
            k += 1
            own += len(ids)
            row = len(group.prompt_token_ids) + len(ids)
            counts["max_row_tokens"] = max(counts["max_row_tokens"], row)
            counts["n_tokens"] += len(ids)
            counts["samplers"][sampler] += 1
            counts["truncated_responses"] += cut
        counts["max_group_size"] = max(counts["max_group_size"], k)
        counts["max_group_tokens"] = max(counts["max_group_tokens"], own)
        counts["equal_reward_groups"] += len(set(group.rewards.tolist())) == 1
    return counts


def assert_counts(found: Survey, groups: list[Group]) -> None:
    for name, value in counted_by_hand(groups).items():
        assert getattr(found, name) == value, name
    longest = {
        group.group_id: len(group.prompt_token_ids) + max(group.response_lengths)
        for group in groups
    }
    if groups:
        assert longest[found.longest_row[2]] == found.max_row_tokens
    rewards: dict[str, list[float]] = {}
    for group in groups:
        for sampler, reward in zip(group.samplers, group.rewards.tolist(), strict=True):
            rewards.setdefault(sampler, []).append(reward)
    assert set(found.sampler_rewards) == set(rewards)
    for sampler, values in rewards.items():
        total = math.fsum(values)
        room = 1e-12 * sum(abs(value) for value in values)
        assert math.isclose(found.sampler_rewards[sampler], total, rel_tol=1e-9, abs_tol=room)


moderate = st.floats(-1e6, 1e6)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(group_strategy(), min_size=1, max_size=7, unique_by=lambda group: group.group_id),
    st.data(),
)
def test_counts_are_those_of_counting_by_hand(groups: list[Group], data: st.DataObject) -> None:
    groups = [
        replace(g, rewards=np.array(data.draw(st.lists(moderate, min_size=k, max_size=k))))
        for g in groups
        for k in [g.group_size]
    ]
    with tempfile.TemporaryDirectory() as folder:
        dataset = build_dataset(
            Path(folder) / "data", groups=groups, groups_per_shard=3, rows_per_row_group=2
        )
        assert_counts(survey(dataset), groups)
        chosen = data.draw(
            st.lists(st.booleans(), min_size=len(groups), max_size=len(groups)), label="chosen"
        )
        starts = np.cumsum([0, *dataset.row_group_sizes])

        def place_of_longest(found: Survey) -> str:
            row_group, row, _ = found.longest_row
            return dataset.groups(row_group)[row].group_id

        found = survey(dataset)
        assert place_of_longest(found) == found.longest_row[2]

        def summary(number: int) -> SummaryRows:
            rows = np.flatnonzero(chosen[starts[number] : starts[number + 1]])
            return summary_table(dataset, number).take(pa.array(rows)), rows

        subset = [group for group, take in zip(groups, chosen, strict=True) if take]
        found = survey(dataset, summary)
        assert_counts(found, subset)
        assert not subset or place_of_longest(found) == found.longest_row[2]


def test_a_foreign_file_without_lengths_counts_the_same(tmp_path: Path) -> None:
    """Lengths, samplers and truncation are not stored: tokens are counted, samplers unknown."""
    groups = make_groups(11)
    table = training_table(groups).select(REQUIRED)
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=4)
    found = survey(adopt_parquet([tmp_path / "log.parquet"]))
    known = counted_by_hand(groups)
    sizes = ("max_group_size", "max_group_tokens", "max_row_tokens")
    for name in ("n_groups", "n_responses", "n_tokens", "equal_reward_groups", *sizes):
        assert getattr(found, name) == known[name]
    assert found.samplers == Counter(unknown=known["n_responses"])
    assert found.truncated_responses == 0


def test_a_dataset_without_rewards_is_counted_all_the_same(tmp_path: Path) -> None:
    groups = make_groups(5)
    found = survey(build_dataset(tmp_path, groups=groups, reward=None, reference=False))
    assert (found.n_groups, found.equal_reward_groups) == (5, 0)
    assert found.sampler_rewards == Counter()
    assert math.isnan(found.median_reward_gap)


def median_of(gaps: list[float]) -> float:
    groups = [make_group(i, k=2, rewards=np.array([0.0, gap])) for i, gap in enumerate(gaps)]
    found = Survey()
    found.add(training_table(groups))
    return found.median_reward_gap


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(1e-8, 1e8), min_size=1, max_size=9))
def test_the_median_gap_is_within_its_tolerance(gaps: list[float]) -> None:
    """Bins are a hundredth of a decade wide: a middle is off by 10^0.005 = 1.0116 at most."""
    assert median_of(gaps) == pytest.approx(float(np.median(gaps)), rel=0.012)


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ([1.0], 1.0),
        ([1.0, 3.0], 2.0),
        ([1.0, 2.0, 900.0], 2.0),
        ([1.0, 1.0, 5.0, 5.0], 3.0),
        ([0.0, 0.0, 0.0, 4.0], 4.0),  # groups of equal rewards have no gap
    ],
)
def test_worked_medians(gaps: list[float], expected: float) -> None:
    assert median_of(gaps) == pytest.approx(expected, rel=0.012)


def test_gaps_beyond_all_bins_do_no_harm() -> None:
    """Differences under 1e-9, and one that overflows to infinity, count in the outermost bins."""
    assert median_of([1e-30]) == pytest.approx(1e-9, rel=0.012)
    assert 1e14 < median_of([1e300]) < math.inf
    found = Survey()
    found.add(training_table([make_group(0, k=2, rewards=np.array([-1.7e308, 1.7e308]))]))
    assert found.equal_reward_groups == 0
    assert 1e14 < found.median_reward_gap < math.inf


def test_a_group_without_responses_is_refused_by_name() -> None:
    """An empty list would otherwise count as the group after it."""
    table = pa.table(
        {
            "group_id": ["whole", "empty"],
            "prompt_length": pa.array([2, 2], pa.int32()),
            "response_lengths": pa.array([[3, 4], []], pa.list_(pa.int32())),
            "samplers": pa.array([["a", "b"], []], pa.list_(pa.string())),
            "truncated": pa.array([[False, False], []], pa.list_(pa.bool_())),
        }
    )
    with pytest.raises(DataError, match="response_lengths") as caught:
        Survey().add(table)
    assert caught.value.group == "empty"
    Survey().add(table.slice(0, 1))
