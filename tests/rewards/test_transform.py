"""Transforms of an existing reward within each group."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.builders import build_dataset
from support.rewarding import answered, read, reward

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.rewards.transform import clipped, logit, standardised
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.store.validate import validate
from gvpo_offline.values import share_beaten

# Preference scores of four groups: their median is about 0.00007.
SCORES = [[0.00001, 0.00007, 0.9], [0.5, 0.5, 0.25, 0.75], [0.2, 0.2], [1.0, 0.0]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A dataset with the reward `score` = SCORES."""
    groups = [
        replace(
            group,
            response_token_ids=group.response_token_ids[:2] * 2,
            responses=("a", "b", "c", "d"),
            samplers=("m",) * 4,
            truncated=(False,) * 4,
            response_ids=None,
            loss_mask=None,
            ref_seq_logprobs=None,
        )
        for group in answered(4)
    ]
    cut = []
    for group, scores in zip(groups, SCORES, strict=True):
        k = len(scores)
        short = {
            name: getattr(group, name)[:k]
            for name in ("response_token_ids", "responses", "samplers", "truncated")
        }
        cut.append(replace(group, **short, rewards=np.array(scores)))
    build_dataset(tmp_path / "data", groups=cut, reward="score", reference=False)
    return tmp_path / "data"


def transformed(root: Path, transform: str, **settings: Any) -> list[list[float]]:
    """The rewards of each group after a transform, in the order of SCORES."""
    scorer = {"kind": "transform", "of": "score", "transform": transform, **settings}
    reward(root, {"t": scorer}, name="new")
    groups = sorted(read(root, "new"), key=lambda group: group.group_id)
    return [group.rewards.tolist() for group in groups if group.rewards is not None]


def test_rank_is_the_share_of_the_other_responses_that_score_less(root: Path) -> None:
    """Of 0.5, 0.5, 0.25, 0.75 the first beats 0.25 and ties with 0.5: (1 + 1/2) / 3 = 0.5."""
    assert transformed(root, "rank") == [
        [0.0, 0.5, 1.0],
        [0.5, 0.5, 0.0, 1.0],
        [0.5, 0.5],
        [1.0, 0.0],
    ]
    assert validate(root, lambda numbers, label: numbers).survey.n_groups == 4


def test_standardised_rewards_have_mean_0_and_std_1(root: Path) -> None:
    """0.5, 0.5, 0.25, 0.75 have mean 0.5 and variance 2/16 / 3 = 1/24; equal ones are all 0."""
    found = transformed(root, "standardise")
    deviation = math.sqrt(1 / 24)
    np.testing.assert_allclose(found[1], [0, 0, -0.25 / deviation, 0.25 / deviation], rtol=1e-15)
    assert found[2] == [0.0, 0.0]
    np.testing.assert_allclose(found[3], [math.sqrt(0.5), -math.sqrt(0.5)], rtol=1e-15)


def test_equal_groups_and_clipped_rewards_are_counted(root: Path) -> None:
    scorer = {"kind": "transform", "of": "score", "transform": "standardise"}
    assert reward(root, {"t": scorer}, name="a").counts["t.equal_groups"] == 1
    scorer = {"kind": "transform", "of": "score@1", "transform": "clip", "low": 0.1, "high": 0.8}
    result = reward(root, {"t": scorer}, name="b")
    assert result.counts["t.clipped"] == 5  # 0.00001, 0.00007, 0.9, 1 and 0
    groups = sorted(read(root, "b"), key=lambda group: group.group_id)
    assert [list(g.rewards) for g in groups if g.rewards is not None] == [
        [0.1, 0.1, 0.8],
        [0.5, 0.5, 0.25, 0.75],
        [0.2, 0.2],
        [0.8, 0.1],
    ]


def test_logit_needs_probabilities(root: Path) -> None:
    """logit(0.9) = log 9; 1 and 0 are refused, or become logit(0.99) = log 99 and -log 99."""
    with pytest.raises(DataError, match=r"both excluded.*1\.0 for response 0.*Set eps") as error:
        transformed(root, "logit")
    assert error.value.group == sorted(g.group_id for g in read(root, "score"))[3]
    assert error.value.row is not None
    found = transformed(root, "logit", eps=0.01)
    np.testing.assert_allclose(found[0], [-math.log(99), -math.log(99), math.log(9)], rtol=1e-14)
    np.testing.assert_allclose(found[1], [0, 0, -math.log(3), math.log(3)], atol=1e-15)
    np.testing.assert_allclose(found[3], [math.log(99), -math.log(99)], rtol=1e-14)


def test_a_reward_above_1_is_no_probability_even_with_eps(root: Path) -> None:
    reward(root, {"t": {"kind": "reward", "reward": "score", "weight": 2.0}}, name="doubled")
    scorer = {"kind": "transform", "of": "doubled", "transform": "logit", "eps": 0.1}
    with pytest.raises(DataError, match=r"both included with eps.*1\.8 for response 2"):
        reward(root, {"t": scorer}, name="new")


def test_a_transform_records_the_version_that_it_is_of(root: Path) -> None:
    """A new version of the reward makes a new version of its transform."""
    rank = {"t": {"kind": "transform", "of": "score", "transform": "rank"}}
    first = reward(root, rank, name="ranked").family
    scorer = first.config["scorers"]["t"]
    assert scorer == {"kind": "transform", "of": "score@1", "transform": "rank", "weight": 1.0}
    assert reward(root, rank, name="ranked").family == first
    reward(root, {"t": {"kind": "reward", "reward": "score@1", "weight": -1.0}}, name="score")
    second = reward(root, rank, name="ranked").family
    assert (second.version, second.config["scorers"]["t"]["of"]) == (2, "score@2")
    low, high = (
        sorted(read(root, f"ranked@{version}"), key=lambda group: group.group_id)[0].rewards
        for version in (1, 2)
    )
    assert low is not None
    assert high is not None
    np.testing.assert_array_equal(low, 1 - high)


def test_a_transform_of_itself_is_refused(root: Path) -> None:
    scorer = {"kind": "transform", "of": "score", "transform": "rank"}
    with pytest.raises(ConfigError, match=r"names the version.*scorers\.t\.of: score"):
        reward(root, {"t": scorer}, name="score")


def test_the_moved_optimum_is_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        transformed(root, "rank")
    (line,) = [r.getMessage() for r in caplog.records if "optimum" in r.getMessage()]
    assert line.startswith("rank of reward score@1: the optimum of GVPO, pi_ref * exp(R / beta)")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transform": "clip"}, "clip needs low, high or both"),
        ({"transform": "rank", "low": 0.0}, "the other transforms have neither"),
        ({"transform": "clip", "low": 1.0, "high": 1.0}, "low is below high"),
        ({"transform": "rank", "eps": 0.1}, "eps is a parameter of logit alone"),
        ({"transform": "logit", "eps": 0.5}, "less than 0.5"),
        ({"transform": "logit", "eps": 1e-17}, "eps is at least"),
        ({"transform": "square"}, "Input should be 'rank', 'logit', 'standardise' or 'clip'"),
        ({"transform": "clip", "low": math.nan}, "finite number"),
    ],
)
def test_settings_that_do_not_fit(root: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reward(root, {"t": {"kind": "transform", "of": "score", **settings}}, name="new")


def test_an_unknown_reward_is_named(root: Path) -> None:
    scorer = {"kind": "transform", "of": "skore", "transform": "rank"}
    with pytest.raises(ConfigError, match=r"skore.*score@1"):
        reward(root, {"t": scorer}, name="new")
    assert len(open_dataset(root, join=()).manifest.rewards) == 1


PROBABILITY = st.floats(0.001, 0.999)
TRANSFORMS: dict[str, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    "rank": lambda rewards: share_beaten(-rewards),
    "logit": lambda rewards: logit(rewards, 0.01, Counter()),
    "standardise": lambda rewards: standardised(rewards, Counter()),
    "clip": lambda rewards: clipped(rewards, 0.2, None, Counter()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@given(st.lists(st.none() | PROBABILITY, min_size=2, max_size=6))
def test_missing_stays_missing_and_no_order_is_reversed(
    name: str, values: list[float | None]
) -> None:
    """A missing reward is missing afterwards and no other is, but for the rank of a single one;
    the numbers of the others are those without the missing one.
    """
    rewards = np.array(values, np.float64)
    present = ~np.isnan(rewards)
    found = TRANSFORMS[name](rewards)
    single = name == "rank" and present.sum() < 2
    np.testing.assert_array_equal(np.isnan(found), ~present | single)
    np.testing.assert_array_equal(found[present], TRANSFORMS[name](rewards[present]))
    order = np.argsort(rewards[present], kind="stable")
    assert single or (np.diff(found[present][order]) >= 0).all()


@given(st.lists(st.floats(-1e300, 1e300), min_size=2, max_size=6))
def test_standardised_rewards_are_finite_at_any_scale(values: list[float]) -> None:
    """|z| <= (k - 1) / sqrt(k), the largest deviation of k numbers in units of their std."""
    k = len(values)
    found = standardised(np.array(values), Counter())
    assert (np.abs(found) <= (k - 1) / math.sqrt(k) * (1 + 1e-9)).all()


def test_equal_rewards_are_0_although_their_mean_is_rounded() -> None:
    """The mean of three times 0.1 is 0.10000000000000002 in float64, so its std is above 0."""
    rewards = np.full(3, 0.1)
    assert rewards.std(ddof=1) > 0
    counts: Counter[str] = Counter()
    assert standardised(rewards, counts).tolist() == [0.0, 0.0, 0.0]
    assert counts == {"equal_groups": 1}
