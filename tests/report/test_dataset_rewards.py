"""Facts about rewards, each computed a second way: from the groups, with plain loops or polars."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.builders import build_dataset, make_group, make_groups

from gvpo_offline.group import Group
from gvpo_offline.report.dataset.batch import SamplerCodes, read_batch
from gvpo_offline.report.dataset.beta import beta_facts, loss_advice
from gvpo_offline.report.dataset.collect import Collected, collect
from gvpo_offline.report.dataset.frame import ResponseNumbers, ResponseNumbersBuilder
from gvpo_offline.report.dataset.opened import open_for_report
from gvpo_offline.report.dataset.rewards import (
    GAP_QUANTILES,
    RewardFacts,
    by_writer,
    reward_facts,
)
from gvpo_offline.report.settings import ReportSettings
from gvpo_offline.store.dataset import GroupDataset

# Sums of at most a few hundred numbers of size 1: an error of n * eps = 300 * 2e-16 = 7e-14.
EXACT = pytest.approx
TOLERANCE = 1e-12


def collected(root: Path, groups: list[Group], **settings: Any) -> Collected:
    """A dataset of the groups, and what is collected of it."""
    build_dataset(root, groups=groups, reference=groups[0].ref_seq_logprobs is not None)
    chosen = ReportSettings(dataset=str(root), show_progress=False, **settings)
    return collect(open_for_report(chosen), chosen)


def long(groups: list[Group]) -> pl.DataFrame:
    """One row per response."""
    return pl.DataFrame(
        [
            {
                "group": number,
                "sampler": group.samplers[i],
                "reward": float(group.rewards[i]),
                "length": len(group.response_token_ids[i]),
                "cut": group.truncated[i],
            }
            for number, group in enumerate(groups)
            if group.rewards is not None
            for i in range(group.group_size)
        ]
    )


def frame_of(
    groups: list[list[tuple[str, float]]], lengths: list[list[int]] | None = None
) -> ResponseNumbers:
    """A frame of (sampler, reward) pairs, with every response of 3 tokens unless `lengths` says."""
    names = sorted({name for group in groups for name, _ in group})
    sizes = np.array([len(group) for group in groups])
    n = int(sizes.sum())
    tokens = np.array(list(itertools.chain(*lengths))) if lengths else np.full(n, 3)
    return ResponseNumbers(
        share=1.0,
        samplers=names,
        sizes=sizes,
        prompt_lengths=np.full(len(groups), 2),
        prompt_keys=np.arange(len(groups), dtype=np.uint64),
        sampler=np.array([names.index(name) for group in groups for name, _ in group]),
        lengths=tokens,
        counted=tokens,
        truncated=np.zeros(n, bool),
        keys=np.arange(n, dtype=np.uint64),
        rewards=np.array([reward for group in groups for _, reward in group]),
    )


def facts_of(groups: list[list[tuple[str, float]]], **options: Any) -> RewardFacts:
    found = reward_facts(frame_of(groups, **options), "reward@1", ())
    assert found is not None
    return found


def test_rewards_by_sampler_are_those_of_a_table_of_responses(tmp_path: Path) -> None:
    groups = make_groups(40)
    found = collected(tmp_path, groups).facts.rewards
    assert found is not None
    table = long(groups)
    gaps = table.group_by("group", maintain_order=True).agg(
        gap=pl.col("reward").max() - pl.col("reward").min(), best=pl.col("reward").max()
    )
    assert found.label == "reward@1"
    assert found.mean == EXACT(table["reward"].mean(), abs=TOLERANCE)
    assert found.deviation == EXACT(table["reward"].std(), abs=TOLERANCE)
    assert (found.lowest, found.highest) == (table["reward"].min(), table["reward"].max())
    assert found.distinct == table["reward"].n_unique()
    assert found.equal_groups == gaps.filter(pl.col("gap") == 0).height
    lowest = gaps.filter((pl.col("gap") == 0) & (pl.col("best") == table["reward"].min()))
    assert found.all_lowest == lowest.height
    unequal = gaps.filter(pl.col("gap") > 0)["gap"]
    assert found.gaps == EXACT(
        [unequal.quantile(q, interpolation="linear") for q in GAP_QUANTILES], abs=TOLERANCE
    )
    for each in found.samplers:
        own = table.filter(pl.col("sampler") == each.sampler)
        assert each.responses == own.height
        assert each.mean == EXACT(own["reward"].mean(), abs=TOLERANCE)
        assert each.deviation == EXACT(own["reward"].std(), abs=TOLERANCE)
        assert each.mean_tokens == EXACT(own["length"].mean(), abs=TOLERANCE)
        assert each.truncated == own["cut"].sum()
        means = dict(table.group_by("group").agg(pl.col("reward").mean()).iter_rows())
        above = [row["reward"] - means[row["group"]] for row in own.iter_rows(named=True)]
        assert each.advantage == EXACT(statistics.fmean(above), abs=TOLERANCE)
    assert [each.responses for each in found.samplers] == sorted(
        (each.responses for each in found.samplers), reverse=True
    )


def test_shares_of_the_best_responses_are_divided_among_ties() -> None:
    """Group 1: a and b are both best, so each has half. Group 2: c alone. Group 3 does not count,
    its rewards are equal. a: (1/2)/2, b: (1/2)/2, c: 1/2 of the groups of unequal rewards."""
    found = facts_of(
        [
            [("a", 1.0), ("b", 1.0), ("c", 0.0)],
            [("a", 0.0), ("c", 1.0)],
            [("a", 1.0), ("b", 1.0)],
        ]
    )
    shares = {each.sampler: each.share_of_bests for each in found.samplers}
    assert shares == {"a": 0.25, "b": 0.25, "c": 0.5}
    responses = {each.sampler: each.share_of_responses for each in found.samplers}
    assert responses == {"a": 2 / 5, "b": 1 / 5, "c": 2 / 5}
    assert found.equal_groups == found.all_highest == 1
    assert found.all_lowest == 0


def test_a_sampler_of_constant_reward_is_named() -> None:
    """a always has 0.5; b has 0 and 1; c has one response, which cannot vary."""
    found = facts_of([[("a", 0.5), ("b", 0.0)], [("a", 0.5), ("b", 1.0), ("c", 0.25)]])
    assert [each.sampler for each in found.constant_samplers] == ["a"]
    assert facts_of([[("a", 1.0), ("b", 1.0)]] * 2).constant_samplers == []  # no rewards differ


def test_the_writer_explains_everything_where_each_has_its_own_reward() -> None:
    """a has 1 and b has 0 in every group: SS_between = SS_total = 3 * (1/4 + 1/4)."""
    found = facts_of([[("a", 1.0), ("b", 0.0)]] * 3).by_writer
    assert (found.share, found.adjusted) == (EXACT(1, abs=TOLERANCE), EXACT(1, abs=TOLERANCE))
    assert (found.constants, found.degrees) == (1, 3)


def test_the_share_that_the_writer_explains_by_hand() -> None:
    """Deviations: a +1/2, b -1/2 in two groups, a -1/2, b +1/2 in one. SS_total = 6/4.

    Least squares: a - b = mean of the differences 1, 1, -1 = 1/3; each response is off its group's
    mean by 1/6, so SS_between = 6/36 and the share 1/9. N - G = 3 and p = 1:
    adjusted = 1 - 8/9 * 3/2 = -1/3."""
    groups = [[("a", 1.0), ("b", 0.0)], [("a", 1.0), ("b", 0.0)], [("a", 0.0), ("b", 1.0)]]
    found = facts_of(groups).by_writer
    assert found.share == EXACT(1 / 9, abs=TOLERANCE)
    assert found.adjusted == EXACT(-1 / 3, abs=TOLERANCE)


def test_the_share_that_the_writer_explains_is_that_of_a_regression_on_dummies(
    tmp_path: Path,
) -> None:
    groups = make_groups(30, seed=3)
    found = collected(tmp_path, groups).facts.rewards
    assert found is not None
    table = long(groups)
    rewards = table["reward"].to_numpy()
    samplers = sorted(set(table["sampler"]))
    by_group = np.equal.outer(table["group"].to_numpy(), np.arange(30)).astype(float)
    by_sampler = np.stack([(table["sampler"] == name).to_numpy() for name in samplers], 1)
    residuals = [
        float(np.linalg.lstsq(design, rewards, rcond=None)[1].sum())
        if np.linalg.matrix_rank(design) == design.shape[1]
        else float(np.square(rewards - design @ np.linalg.lstsq(design, rewards)[0]).sum())
        for design in (by_group, np.hstack([by_group, by_sampler]))
    ]
    share = 1 - residuals[1] / residuals[0]
    # The condition of the normal equations is below 1e3 here, so the error is below 1e3 * 1e-14.
    assert found.by_writer.share == EXACT(share, abs=1e-10)
    p = int(np.linalg.matrix_rank(np.hstack([by_group, by_sampler]))) - 30
    degrees = len(rewards) - 30
    assert (found.by_writer.constants, found.by_writer.degrees) == (p, degrees)
    adjusted = 1 - (1 - share) * degrees / (degrees - p)
    assert found.by_writer.adjusted == EXACT(adjusted, abs=1e-10)


@pytest.mark.parametrize(
    "groups",
    [
        [[("a", 1.0), ("a", 0.0)]] * 2,  # samplers never meet
        [[("a", 1.0), ("b", 1.0)]] * 2,  # no rewards differ
    ],
)
def test_where_the_writer_cannot_be_told_there_is_no_share(
    groups: list[list[tuple[str, float]]],
) -> None:
    found = facts_of(groups).by_writer
    assert math.isnan(found.share)
    assert math.isnan(found.adjusted)


@given(st.floats(-1e3, 1e3), st.floats(0.01, 100))
def test_the_writers_share_does_not_depend_on_origin_and_unit_of_rewards(
    origin: float, unit: float
) -> None:
    groups = [
        [("a", 0.2), ("b", 0.9), ("c", 0.4)],
        [("b", 0.1), ("c", 0.8)],
        [("a", 0.5), ("c", 0)],
    ]
    one = by_writer(frame_of(groups), frame_of(groups).rewards)  # type: ignore[arg-type]
    moved = [[(name, origin + unit * reward) for name, reward in group] for group in groups]
    other = by_writer(frame_of(moved), frame_of(moved).rewards)  # type: ignore[arg-type]
    # Rewards of size 1e3 at differences of 0.01 lose 1e5 of the precision of 2e-16.
    assert other.share == EXACT(one.share, abs=1e-8)


def test_reward_against_length_by_hand() -> None:
    """Group 1: deviations of rewards (1/2, -1/2), of lengths (2, -2): the longest is best. Group 2:
    (-1/2, 1/2) and (1, -1): it is not. r = (2 - 1) / sqrt(1 * 10) = 1 / sqrt(10). Group 3 has equal
    rewards: nothing. One best of two responses in both groups: half by chance."""
    found = facts_of(
        [
            [("a", 1.0), ("a", 0.0)],
            [("a", 0.0), ("a", 1.0)],
            [("a", 1.0), ("a", 1.0)],
        ],
        lengths=[[6, 2], [4, 2], [5, 5]],
    ).by_length
    assert found.correlation == EXACT(1 / math.sqrt(10), abs=TOLERANCE)
    assert (found.longest_is_best, found.by_chance) == (0.5, 0.5)
    assert sum(each.responses for each in found.bins) == 6
    # 6 of mean 4 and 4 of mean 3 lie in 1.4 ... 2 and 1.15 ... 1.4: advantages +1/2 and -1/2.
    advantages = {(each.low, each.high): each.advantage for each in found.bins}
    assert advantages[(1.4, 2.0)] == 0.5
    assert advantages[(1.15, 1.4)] == -0.5


def test_the_correlation_with_length_is_that_of_centred_columns(tmp_path: Path) -> None:
    groups = make_groups(30, seed=5)
    found = collected(tmp_path, groups).facts.rewards
    assert found is not None
    centred = long(groups).select(
        pl.col("reward") - pl.col("reward").mean().over("group"),
        pl.col("length") - pl.col("length").mean().over("group"),
    )
    expected = centred.select(pl.corr("reward", "length")).item()
    assert found.by_length.correlation == EXACT(expected, abs=1e-10)


def test_equal_rewards_correlate_with_nothing() -> None:
    """0.1 three times: its mean in floating point is not 0.1, and no correlation comes of that."""
    found = facts_of([[("a", 0.1), ("b", 0.1), ("c", 0.1)]] * 2, lengths=[[1, 2, 3]] * 2)
    assert math.isnan(found.by_length.correlation)
    assert math.isnan(found.by_length.longest_is_best)
    assert found.equal_groups == found.all_lowest == found.all_highest == 2


def test_components_by_hand() -> None:
    """`right` is missing of one response of four; within groups it differs in the first alone."""
    base = frame_of([[("a", 1.0), ("b", 0.0)], [("a", 0.5), ("b", 0.5)]])
    frame = ResponseNumbers(
        **{
            **{name: getattr(base, name) for name in ResponseNumbers.__dataclass_fields__},
            "components": np.array([[1.0, 0.0, 1.0, np.nan], [0.1, 0.1, 0.1, 0.1]]),
        }
    )
    found = reward_facts(frame, "reward@1", ("right", "idle"))
    assert found is not None
    right, idle = found.components
    assert (right.name, right.missing, right.mean) == ("right", 0.25, EXACT(2 / 3, abs=TOLERANCE))
    assert right.correlation == EXACT(1.0, abs=TOLERANCE)
    assert (idle.missing, idle.lowest, idle.highest) == (0.0, 0.1, 0.1)
    assert math.isnan(idle.correlation)


def test_components_are_read_where_the_file_has_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    groups = [
        make_group(i, k=2 + i % 3, components=rng.random((2, 2 + i % 3)).round(3)) for i in range(9)
    ]
    from gvpo_offline.store.commit import TaskLog
    from gvpo_offline.store.manifest import Manifest, RewardFamily
    from gvpo_offline.store.writer import publish, write_groups

    record = write_groups(
        tmp_path, "import", "0", groups, reward="r", components=("x", "y"), rows_per_row_group=4
    )
    TaskLog(tmp_path, "import").commit(record)
    family = RewardFamily(name="r", components=["x", "y"], files=record.sidecars)
    publish(tmp_path, lambda _: Manifest(groups=record.groups, rewards=[family]))
    settings = ReportSettings(dataset=str(tmp_path), show_progress=False)
    found = collect(open_for_report(settings), settings).facts.rewards
    assert found is not None
    for number, each in enumerate(found.components):
        values = np.concatenate([g.components[number] for g in groups if g.components is not None])
        assert each.mean == EXACT(values.mean(), abs=TOLERANCE)
        assert each.deviation == EXACT(values.std(ddof=1), abs=TOLERANCE)
        assert (each.lowest, each.highest) == (values.min(), values.max())


# ---- beta ----


def test_implied_gaps_by_hand() -> None:
    """Gaps 1, 0.5, 0.5 and one group of equal rewards, which has none. At beta 0.05: 20, 10, 10
    nats: two of three are within 1 to 10; the median is 10. tune begins
    where it is 4: 0.125, which it rounds to two digits."""
    frame = frame_of(
        [
            [("a", 1.0), ("b", 0.0)],
            [("a", 0.5), ("b", 0.0)],
            [("a", 0.0), ("b", 0.5)],
            [("a", 1.0), ("b", 1.0)],
        ]
    )
    found = beta_facts(frame, 0.05)
    assert found is not None
    assert (found.beta, found.median, found.first) == (0.05, 10.0, 0.12)
    own = next(row for row in found.rows if row.own)
    assert own.within == EXACT(2 / 3)
    assert (own.median, own.beyond) == (10.0, 0.0)
    assert own.high == EXACT(18.0)  # 90% between 10 and 20 nats, linearly: 0.8 of the way
    betas = [row.beta for row in found.rows]
    assert betas == sorted(betas)
    assert len(betas) == 10  # nine candidates of tune, and 0.05
    assert max(row.median for row in found.rows) == EXACT(16.0, rel=0.05)  # tune rounds its betas


def test_without_unequal_rewards_there_is_no_gap() -> None:
    assert beta_facts(frame_of([[("a", 1.0), ("b", 1.0)]]), 0.1) is None


def advice(groups: list[list[tuple[str, float]]]) -> list[str]:
    """What the rules that apply say to take."""
    frame = frame_of(groups)
    facts = reward_facts(frame, "r", ())
    assert facts is not None
    return [each.take for each in loss_advice(facts, frame) if each.applies]


def test_each_rule_of_which_loss_to_take_applies_to_its_log() -> None:
    graded = [[("a", 0.1), ("b", 0.4), ("b", 0.7), ("a", 1.0)]] * 3
    assert advice(graded) == ["gvpo with imitation: auto"]
    # One right answer of 16, and three of four groups are all wrong: alpha = 1 + 10 * 3/4.
    wrong = [[("a", 0.0), ("b", 0.0), ("c", 0.0), ("d", 0.0)]] * 3
    few = [[("a", 1.0), ("b", 0.0), ("c", 0.0), ("d", 0.0)]]
    assert advice(wrong + few) == ["gvpo with imitation: auto (here alpha 8.5), or rft", "awr"]
    # Three of four responses by a person, half of them above the lowest reward.
    habit = [[("p", 0.6), ("p", 0.0), ("p", 0.3), ("b", 1.0)]] * 2
    assert advice(habit)[-1] == "gvpo with imitation: auto, without imitation of that writer"
    always_wrong = [[("p", 0.0), ("p", 0.0), ("p", 0.0), ("b", 1.0), ("b", 1.0)]] * 2
    assert advice(always_wrong) == ["the same, or rft"]


# ---- sampling of a large dataset ----


def read_all(dataset: GroupDataset, most: int) -> ResponseNumbers:
    names, builder = SamplerCodes(), ResponseNumbersBuilder(most)
    for number in range(dataset.n_row_groups):
        batch = read_batch(dataset, number, names, 0)
        assert batch is not None
        builder.add(batch, None, None)
    return builder.build(names.names)


def test_beyond_a_limit_whole_groups_are_kept_by_a_hash_of_their_id(tmp_path: Path) -> None:
    groups = make_groups(64)
    dataset = build_dataset(tmp_path, groups=groups)
    whole = read_all(dataset, 10_000)
    half = read_all(dataset, 100)
    assert whole.share == 1.0
    assert len(half.lengths) <= 100 < len(whole.lengths)
    assert half.share in {1 / 2, 1 / 4, 1 / 8}
    # Every kept group is a group of the dataset, whole and in order.
    rewards = [tuple(g.rewards.tolist()) for g in groups if g.rewards is not None]
    kept = [
        tuple(half.rewards[a : a + k].tolist())  # type: ignore[index]
        for a, k in zip(half.starts.tolist(), half.sizes.tolist(), strict=True)
    ]
    left = iter(rewards)
    assert all(each in left for each in kept)
    again = read_all(dataset, 100)
    assert np.array_equal(again.keys, half.keys)


def test_the_report_says_that_its_figures_are_of_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ResponseNumbersBuilder, "__init__", _builder_of_few)
    found = collected(tmp_path, make_groups(64)).facts
    assert found.totals.share < 1
    assert found.totals.groups == 64
    assert found.cost is not None
    # Tokens of the sample are scaled up to the dataset: of 64 groups, not of the kept ones.
    assert found.cost.training_groups == 64


def _builder_of_few(self: ResponseNumbersBuilder) -> None:
    object.__setattr__(self, "most", 100)
    for name, value in (("_zeros", 0), ("_kept", 0)):
        setattr(self, name, value)
    self._keys, self._groups, self._responses = [], [], []


def test_max_groups_reads_whole_row_groups_at_random(tmp_path: Path) -> None:
    groups = make_groups(40)
    one = collected(tmp_path / "a", groups, max_groups=10).facts.totals
    assert (one.groups, one.of_groups) == (12, 40)  # three row groups of 4 hold 10
    other = collected(tmp_path / "b", groups, max_groups=10, seed=1).facts.totals
    assert other.groups == 12
    assert collected(tmp_path / "c", groups, max_groups=40).facts.totals.groups == 40
