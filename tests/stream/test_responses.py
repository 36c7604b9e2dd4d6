"""Responses chosen within groups: by sampler, how many, which; and what a view shows of them."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import build_dataset, differences, make_group, make_groups

from gvpo_offline.errors import ConfigError
from gvpo_offline.group import Group
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.stream.order import Selection
from gvpo_offline.stream.selecting.responses import choose, with_responses
from gvpo_offline.stream.selecting.select import select
from gvpo_offline.stream.settings import ResponseSettings
from gvpo_offline.stream.view import DatasetView

REWARDS = st.sampled_from([-1.0, 0.0, 0.0, 0.25, 0.5, 1.0, 1e308, -1e308])


def chosen_items(rows: list[dict[str, Any]], responses: ResponseSettings) -> list[list[int]]:
    """What `choose` takes of each row."""
    kinds = {"samplers": pa.list_(pa.string()), "rewards": pa.list_(pa.float64())}
    table = pa.table({n: pa.array([r[n] for r in rows], kind) for n, kind in kinds.items()})
    index = choose(table, responses)
    items: list[list[int]] = [[] for _ in rows]
    for row, item in zip(index.rows.tolist(), index.items.tolist(), strict=True):
        items[row].append(item)
    assert index.first.tolist() == [row for row, kept in enumerate(items) if kept]
    assert index.sizes.tolist() == [len(kept) for kept in items if kept]
    return items


def greedy(rewards: list[float], candidates: list[int], most: int) -> list[int]:
    """Best, worst, then the farthest from those taken; ties: taken least often, then first."""
    taken: list[int] = []
    while candidates and len(taken) < most:
        values = [rewards[i] for i in taken]

        def order(i: int, values: list[float] = values) -> tuple[float, int, int]:
            own = rewards[i]
            if not values:
                score = own
            elif len(values) == 1:
                score = -own
            else:
                score = min(abs(own - value) for value in values)
            return -score, values.count(own), i

        best = min(candidates, key=order)
        candidates = [i for i in candidates if i != best]
        taken.append(best)
    return sorted(taken)


@st.composite
def rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Up to five rows of one to seven responses."""
    result = []
    for _ in range(draw(st.integers(0, 5))):
        k = draw(st.integers(1, 7))
        names = st.sampled_from(["gpt-4", "gpt-5", "person", "[odd]"])
        result.append(
            {
                "samplers": draw(st.lists(names, min_size=k, max_size=k)),
                "rewards": draw(st.lists(REWARDS, min_size=k, max_size=k)),
            }
        )
    return result


@given(rows(), st.integers(2, 8), st.sampled_from([(), ("gpt-*",), ("person", "gpt-4")]))
@settings(deadline=None, max_examples=200)
def test_spread_is_the_greedy_choice_row_by_row(
    drawn: list[dict[str, Any]], most: int, samplers: tuple[str, ...]
) -> None:
    responses = ResponseSettings(list(samplers), most, "spread")
    by_name = {(): None, ("gpt-*",): {"gpt-4", "gpt-5"}, ("person", "gpt-4"): {"person", "gpt-4"}}
    allowed = by_name[samplers]
    expected = []
    for row in drawn:
        kept = [i for i, n in enumerate(row["samplers"]) if allowed is None or n in allowed]
        expected.append(greedy(row["rewards"], kept, most))
    assert chosen_items(drawn, responses) == expected


@given(rows(), st.integers(2, 8))
@settings(deadline=None, max_examples=50)
def test_the_first_ones_of_a_sampler(drawn: list[dict[str, Any]], most: int) -> None:
    expected = [[i for i, n in enumerate(r["samplers"]) if n == "gpt-5"][:most] for r in drawn]
    assert chosen_items(drawn, ResponseSettings(["gpt-5"], most)) == expected


@pytest.mark.parametrize(
    ("rewards", "most", "expected"),
    [
        # Right and wrong in turn, whatever the order and however few there are of one.
        ([1, 1, 1, 0, 0, 0], 4, [0, 1, 3, 4]),
        ([0, 0, 0, 0, 1], 3, [0, 1, 4]),
        ([1, 1, 1, 0, 0, 0], 5, [0, 1, 2, 3, 4]),
        # 0.9, 0; then 0.5 (0.4 from 0.9) before 0.3 (0.3 from 0), then 0.3 (0.2 from 0.5).
        ([0.3, 0.5, 0.9, 0.0, 0.8], 3, [1, 2, 3]),
        ([0.3, 0.5, 0.9, 0.0, 0.8], 4, [0, 1, 2, 3]),
        # All alike: the first ones.
        ([0.5, 0.5, 0.5], 2, [0, 1]),
    ],
)
def test_what_spread_takes(rewards: list[float], most: int, expected: list[int]) -> None:
    row = {"samplers": ["one"] * len(rewards), "rewards": [float(r) for r in rewards]}
    assert chosen_items([row], ResponseSettings([], most, "spread")) == [expected]


# ---- in a dataset ----


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> GroupDataset:
    """30 groups of 2 to 5 responses, some masked, in 4 files of row groups of 4."""
    return build_dataset(tmp_path_factory.mktemp("responses"), 30)


def taking_part(view: DatasetView) -> list[Group]:
    assert view.selection is not None
    return [
        view.groups(row_group)[row]
        for row_group in range(view.dataset.n_row_groups)
        for row in view.selection.rows(row_group)
    ]


def resolved(dataset: GroupDataset, responses: ResponseSettings, **options: Any) -> Selection:
    selection = select(dataset, responses=responses, **options)
    assert selection is not None
    return selection


CHOICES = (
    ResponseSettings(["base", "p*"]),
    ResponseSettings(max_responses=3, prefer="spread"),
    ResponseSettings(["hot", "base"], 2),
)


@pytest.mark.parametrize("responses", CHOICES, ids=str)
def test_a_view_shows_the_chosen_responses_alone(
    dataset: GroupDataset, responses: ResponseSettings
) -> None:
    """Every field that training reads, the summary columns and the counts agree with picking by
    hand.
    """
    view = DatasetView(dataset, resolved(dataset, responses))
    stored = {g.group_id: g for i in range(dataset.n_row_groups) for g in dataset.groups(i)}
    expected = {}
    for group in stored.values():
        row = {"samplers": list(group.samplers), "rewards": group.rewards.tolist()}
        (items,) = chosen_items([row], responses)
        if len(items) >= 2:
            expected[group.group_id] = (group, items)
    found = taking_part(view)
    assert {group.group_id for group in found} == set(expected)
    for group in found:
        whole, items = expected[group.group_id]
        assert group.samplers == tuple(whole.samplers[i] for i in items)
        assert group.truncated == tuple(whole.truncated[i] for i in items)
        assert group.rewards.tolist() == whole.rewards[items].tolist()
        assert group.ref_seq_logprobs.tolist() == whole.ref_seq_logprobs[items].tolist()
        tokens = [whole.response_token_ids[i].tolist() for i in items]
        assert [ids.tolist() for ids in group.response_token_ids] == tokens
        assert (group.loss_mask is None) == (whole.loss_mask is None)
        if whole.loss_mask is not None:
            masks = [whole.loss_mask[i].tolist() for i in items]
            assert [mask.tolist() for mask in group.loss_mask] == masks
    summary = [view.summary_table(i)[0] for i in range(dataset.n_row_groups)]
    table = pa.concat_tables(summary)
    assert table.column("response_lengths").to_pylist() == [g.response_lengths for g in found]
    assert table.column("samplers").to_pylist() == [list(g.samplers) for g in found]
    assert table.column("rewards").to_pylist() == [g.rewards.tolist() for g in found]
    counts = view.survey()
    assert counts.n_groups == len(found) == view.n_groups
    assert counts.n_responses == sum(g.group_size for g in found)
    assert counts.n_tokens == sum(g.n_tokens for g in found)
    assert sum(counts.samplers.values()) == counts.n_responses


def test_every_field_of_a_group_goes_along() -> None:
    """Those that training does not read as well: components are (C, k), the others (k, ...)."""
    group = make_group(0, k=4, samplers=("a", "b", "a", "b"), masked=True)
    group = replace(group, components=np.arange(8.0).reshape(2, 4))
    group = replace(group, sampler_seq_logprobs=-np.arange(4.0))
    group = replace(group, response_messages=("", "[1]", "[2]", "[3]"))
    (taken,) = with_responses([group], ResponseSettings(["b"]))
    assert taken.components.tolist() == [[1.0, 3.0], [5.0, 7.0]]
    assert taken.sampler_seq_logprobs.tolist() == [-1.0, -3.0]
    assert taken.responses == ("response 0.1", "response 0.3")
    assert taken.response_ids == ("0.1", "0.3")
    assert taken.response_messages == ("[1]", "[3]")
    assert taken.group_size == 2
    assert group.loss_mask is not None
    assert [mask.tolist() for mask in taken.loss_mask] == [
        group.loss_mask[1].tolist(),
        group.loss_mask[3].tolist(),
    ]
    # Masks of other responses differ, so that a mask of the wrong response is noticed.
    assert len({tuple(mask.tolist()) for mask in group.loss_mask}) == 4
    unchanged = {"group_id", "prompt_token_ids", "source", "prompt", "messages", "metadata"}
    unchanged.add("template_arguments")
    assert set(differences(group, taken)) == set(Group.__slots__) - unchanged - {
        "truncated" if taken.truncated == group.truncated else ""
    }


def test_groups_left_with_one_response_fall_out_and_are_counted(tmp_path: Path) -> None:
    """Of four groups two keep two responses of a, one keeps one, one keeps none; 4 of 10."""
    names = [("a", "a", "b"), ("a", "b"), ("b", "b"), ("b", "a", "a")]
    groups = [make_group(i, k=len(n), samplers=n) for i, n in enumerate(names)]
    dataset = build_dataset(tmp_path, groups=groups)
    selection = resolved(dataset, ResponseSettings(["a"]))
    assert [selection.rows(i).tolist() for i in range(dataset.n_row_groups)] == [[0, 3]]
    assert selection.notes == (
        "responses of a: 4 of 10; 2 groups are left out, with fewer than two",
    )


def test_equal_rewards_are_those_of_the_chosen_responses(tmp_path: Path) -> None:
    """Group 0 is unequal among a alone, group 1 with b only."""
    rewards = [[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
    groups = [
        make_group(i, k=3, samplers=("a", "a", "b"), rewards=np.array(r))
        for i, r in enumerate(rewards)
    ]
    dataset = build_dataset(tmp_path, groups=groups)
    whole = select(dataset, drop_equal_rewards=True)
    assert whole is not None
    assert whole.n_groups == 2
    of_a = resolved(dataset, ResponseSettings(["a"]), drop_equal_rewards=True)
    assert of_a.rows(0).tolist() == [0]
    assert of_a.notes[-1] == "drop_equal_rewards: 1 groups left out"


def test_held_out_groups_choose_likewise(dataset: GroupDataset) -> None:
    """Training and held-out groups share out what the choice leaves."""
    responses = ResponseSettings(["base", "hot"])
    parts = [
        resolved(dataset, responses, eval_fraction=0.4, held_out=held_out)
        for held_out in (False, True)
    ]
    whole = resolved(dataset, responses)
    for i in range(dataset.n_row_groups):
        both = [*parts[0].rows(i), *parts[1].rows(i)]
        assert sorted(both) == whole.rows(i).tolist()
    assert all(part.n_groups for part in parts)


def test_the_fingerprint_covers_responses(tmp_path: Path) -> None:
    """All groups take part either way, with other responses; resolving again is the same."""
    groups = [make_group(i, k=4, rewards=np.array([0.0, 0.0, 0.0, 1.0])) for i in range(6)]
    dataset = build_dataset(tmp_path, groups=groups)
    first = resolved(dataset, ResponseSettings(max_responses=2))
    spread = resolved(dataset, ResponseSettings(max_responses=2, prefer="spread"))
    assert first.n_groups == spread.n_groups == 6
    assert first.fingerprint != spread.fingerprint
    again = resolved(dataset, ResponseSettings(max_responses=2, prefer="spread"))
    assert again.fingerprint == spread.fingerprint
    sent = pickle.loads(pickle.dumps(spread))
    assert (sent.fingerprint, sent.notes) == (spread.fingerprint, spread.notes)
    assert DatasetView(dataset, sent).groups(0)[0].rewards.tolist() == [0.0, 1.0]


def test_where_files_are_cut_has_no_say(tmp_path: Path) -> None:
    groups = make_groups(20, k=5)
    responses = ResponseSettings(["base", "hot"], 3, "spread")
    seen = []
    for number, (shard, rows_) in enumerate([(20, 20), (7, 3), (20, 1)]):
        dataset = build_dataset(
            tmp_path / str(number),
            groups=groups,
            groups_per_shard=shard,
            rows_per_row_group=rows_,
        )
        seen.append(taking_part(DatasetView(dataset, resolved(dataset, responses))))
    for other in seen[1:]:
        for one, two in zip(seen[0], other, strict=True):
            assert differences(one, two) == []


def test_what_cannot_be_chosen_is_refused(dataset: GroupDataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"received bsae.*Did you mean base\?"):
        select(dataset, responses=ResponseSettings(["hot", "bsae"]))
    singles = build_dataset(
        tmp_path / "one", groups=[make_group(i, k=2, samplers=("a", "b")) for i in range(3)]
    )
    with pytest.raises(ConfigError, match=r"at least 2 responses.*none of 3 groups"):
        select(singles, responses=ResponseSettings(["a"]))
    bare = build_dataset(tmp_path / "bare", 4, reward=None)
    with pytest.raises(ConfigError, match="a selection by rewards needs a dataset with rewards"):
        select(bare, responses=ResponseSettings(max_responses=2, prefer="spread"))
    with pytest.raises(ConfigError, match="max_responses is at least 2"):
        ResponseSettings(max_responses=1)
    with pytest.raises(ConfigError, match="prefer: spread without max_responses"):
        ResponseSettings(prefer="spread")
