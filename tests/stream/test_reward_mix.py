"""Several rewards with weights, and one of several references, chosen when a run begins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.builders import build_dataset, make_groups, reference_family, reference_sidecar
from support.rewarding import answered, answered_dataset, functions, reward

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.group import FloatArray
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.manifest import Manifest
from gvpo_offline.store.sidecar_choice import choose_reward_families
from gvpo_offline.store.survey import survey
from gvpo_offline.store.writer import publish
from gvpo_offline.stream.settings import DatasetSettings
from gvpo_offline.train.data import check_compatible, open_datasets


def scored(folder: Path, n_groups: int = 12) -> Path:
    """Responses with two rewards: `correct`, 0 or 1 by their text, and `tokens`, their length."""
    root = answered_dataset(folder / "data", n_groups)
    reward(root, {"right": {"kind": "exact", "column": "answer"}}, name="exact")
    path = functions(folder)
    reward(root, {"right": {"kind": "function", "function": f"{path}:right"}}, name="correct")
    reward(root, {"tokens": {"kind": "function", "function": f"{path}:tokens"}}, name="tokens")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`scored`; never changed."""
    return scored(tmp_path_factory.mktemp("scored"))


def rewards_of(root: Path, choice: Any) -> list[FloatArray]:
    dataset = open_dataset(root, reward=choice, join=("reward",))
    groups = [group for n in range(dataset.n_row_groups) for group in dataset.groups(n)]
    return [group.rewards for group in groups if group.rewards is not None]


def identity(root: Path, choice: Any, **options: Any) -> str:
    return open_dataset(root, reward=choice, join=("reward",), **options).fingerprint


# ---- the sum ----


def test_the_sum_response_by_response(root: Path) -> None:
    """Group i's responses say i, i + 1, i + 2 …, of which the second is right: 1 - 0.2 * tokens
    for it, -0.2 * tokens for the others.
    """
    found = rewards_of(root, {"correct": 1.0, "tokens": -0.2})
    for group, rewards in zip(answered(12), found, strict=True):
        right = [float(i == 1) for i in range(group.group_size)]
        expected = [r - 0.2 * n for r, n in zip(right, group.response_lengths, strict=True)]
        np.testing.assert_allclose(rewards, expected, rtol=0, atol=1e-15)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    weights=st.tuples(*[st.floats(-8, 8, allow_subnormal=False)] * 3).filter(
        lambda values: any(values)
    )
)
def test_a_sum_of_three_is_the_sum_of_each(root: Path, weights: tuple[float, ...]) -> None:
    """At most three products of at most 8 * 8, each rounded once."""
    names = ("correct", "tokens", "exact")
    parts = [rewards_of(root, name) for name in names]
    found = rewards_of(root, dict(zip(names, weights, strict=True)))
    for number, rewards in enumerate(found):
        expected = sum(w * part[number] for w, part in zip(weights, parts, strict=True))
        np.testing.assert_allclose(rewards, expected, rtol=0, atol=1e-13)


def test_as_a_reward_of_its_own(tmp_path: Path) -> None:
    """The stage adds the same two up into a third reward; up to rounding the numbers are one."""
    root = scored(tmp_path, 8)
    scorers = {
        "a": {"kind": "reward", "reward": "correct", "weight": 1.0},
        "b": {"kind": "reward", "reward": "tokens", "weight": -0.2},
    }
    reward(root, scorers, name="both")
    mixed = rewards_of(root, {"correct": 1.0, "tokens": -0.2})
    for one, other in zip(rewards_of(root, "both"), mixed, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-15, atol=1e-15)


def test_one_reward_with_a_weight(root: Path) -> None:
    """Weight 1 is the reward itself, to the bit and to the run's identity; weight 3 is not."""
    plain, once, thrice = (rewards_of(root, c) for c in ("tokens", {"tokens": 1}, {"tokens": 3}))
    assert all(map(np.array_equal, plain, once))
    assert all(np.array_equal(3 * one, other) for one, other in zip(plain, thrice, strict=True))
    assert identity(root, "tokens") == identity(root, {"tokens": 1.0})
    assert identity(root, "tokens") != identity(root, {"tokens": 3.0})


def test_weights_that_sum_to_zero_mean_something(root: Path) -> None:
    """Right minus tokens: within a group rewards still differ."""
    found = rewards_of(root, {"correct": 1.0, "tokens": -1.0})
    assert max(float(np.ptp(rewards)) for rewards in found) > 1


def test_what_is_counted_before_a_run_is_the_sum(root: Path) -> None:
    """The survey's reward gap is the sum's: ten times the weights, ten times the gap."""
    small, large = (
        survey(open_dataset(root, reward={"correct": w, "tokens": -w}, join=("reward",)))
        for w in (1.0, 10.0)
    )
    assert large.median_reward_gap == pytest.approx(10 * small.median_reward_gap, rel=0.03)


def test_the_identity_changes_with_the_weights(root: Path) -> None:
    choices: list[Any] = [
        *("correct", "tokens", {"correct": 1.0, "tokens": 1.0}),
        *({"correct": 1.0, "tokens": -0.2}, {"correct": 1.0, "tokens": 0.0}),
        {"correct": -0.2, "tokens": 1.0},
    ]
    assert len({identity(root, choice) for choice in choices}) == len(choices)
    twice = [identity(root, {"correct": 1.0, "tokens": -0.2}) for _ in range(2)]
    assert twice[0] == twice[1]


def test_versions_are_named_and_the_newest_is_taken(tmp_path: Path) -> None:
    root = scored(tmp_path, 4)
    path = functions(tmp_path)
    reward(root, {"length": {"kind": "function", "function": f"{path}:length"}}, name="tokens")
    newest, first = rewards_of(root, "tokens"), rewards_of(root, "tokens@1")
    mixed = rewards_of(root, {"tokens": 1.0, "tokens@1": -1.0})
    for number, rewards in enumerate(mixed):
        assert np.array_equal(rewards, newest[number] - first[number])
    with pytest.raises(ConfigError, match=r"named once.*tokens@2, tokens@2"):
        rewards_of(root, {"tokens": 1.0, "tokens@2": -1.0})


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"correct": 0.0, "tokens": 0}, "not all of them are 0"),
        ({}, "not all of them are 0"),
        ({"correct": float("nan")}, "weights of rewards are finite"),
        ({"correct": float("inf"), "tokens": 1.0}, "weights of rewards are finite"),
        (
            {"correct": 1.0, "brevity": -0.2},
            r"received 'brevity', and the dataset holds \['correct@1', 'exact@1', 'tokens@1'\]",
        ),
        ({"correct@9": 1.0}, "correct@9"),
        (None, "reward=None, and the dataset holds"),
    ],
)
def test_choices_that_mean_nothing(root: Path, choice: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        rewards_of(root, choice)
    assert caught.value.file == str(root)


def test_finite_rewards_with_an_infinite_sum(tmp_path: Path) -> None:
    """1e308 is a number and 10 times it is none: said with file, row and group, not trained on."""
    groups = make_groups(8, scored=False)
    groups[5] = replace(groups[5], rewards=np.full(groups[5].group_size, 1e308))
    build_dataset(tmp_path, groups=groups, reference=False)
    assert rewards_of(tmp_path, {"reward": 1.0})
    with pytest.raises(DataError, match=r"finite number; received inf for response 0") as caught:
        rewards_of(tmp_path, {"reward": 10.0})
    assert (caught.value.row, caught.value.group) == (5, groups[5].group_id)


def test_a_weighted_reward_survives_pickling(root: Path) -> None:
    """Data loader workers get the dataset pickled, open files left behind."""
    import pickle

    dataset = open_dataset(root, reward={"correct": 1.0, "tokens": -0.2}, join=("reward",))
    copy: GroupDataset = pickle.loads(pickle.dumps(dataset))
    assert copy.fingerprint == dataset.fingerprint
    pairs = zip(copy.groups(1), dataset.groups(1), strict=True)
    assert all(np.array_equal(one.rewards, other.rewards) for one, other in pairs)  # type: ignore[arg-type]


def test_the_order_of_a_manifest_means_nothing(root: Path) -> None:
    manifest = open_dataset(root, reward="correct", join=("reward",)).manifest
    turned = manifest.model_copy(update={"rewards": manifest.rewards[::-1]})
    choice = {"correct": 1.0, "tokens": 2.0}
    assert choose_reward_families(turned, choice) == choose_reward_families(manifest, choice)


# ---- one of several references ----


def add_reference(root: Path, name: str, shift: float, **fields: Any) -> str:
    """A further reference of made-up groups, whose log-probs are lower by `shift`."""
    manifest = open_dataset(root, join=()).manifest
    groups, files = make_groups(manifest.n_groups), []
    for base in manifest.groups:
        own, groups = groups[: base.rows], groups[base.rows :]
        lower = [replace(g, ref_seq_logprobs=np.array(g.ref_seq_logprobs) - shift) for g in own]
        files.append(reference_sidecar(root, base, lower, folder=f"reference/{name}"))
    family = reference_family(files, name, **fields)

    def build(newest: Manifest | None) -> Manifest:
        assert newest is not None
        return newest.model_copy(update={"references": [*newest.references, family]})

    publish(root, build)
    return family.fingerprint


def test_one_of_several_references_by_its_first_digits(tmp_path: Path) -> None:
    root = build_dataset(tmp_path, 8).root
    first = open_dataset(root).manifest.references[0].fingerprint
    other = add_reference(root, "other", 2.0, fingerprint="a" * 64)
    third = add_reference(root, "third", 3.0, fingerprint="a" * 63 + "b")
    logprobs = {
        fingerprint: np.concatenate(
            [g.ref_seq_logprobs for g in open_dataset(root, reference=fingerprint).groups(0)]  # type: ignore[misc]
        )
        for fingerprint in (first, other, third)
    }
    np.testing.assert_allclose(logprobs[first] - logprobs[other], 2.0, atol=1e-12)
    np.testing.assert_allclose(logprobs[first] - logprobs[third], 3.0, atol=1e-12)
    assert open_dataset(root, reference=first[:4]).reference is not None
    for prefix in ("a", "a" * 63, None):
        with pytest.raises(ConfigError, match=r"the first digits of one fingerprint") as caught:
            open_dataset(root, reference=prefix)
        assert "aaaaaaaaaaaa (other)" in str(caught.value)
    with pytest.raises(ConfigError, match="reference='zz'"):
        open_dataset(root, reference="zz")
    fingerprints = {open_dataset(root, reference=f).fingerprint for f in (first, other, third)}
    assert len(fingerprints) == 3


def test_references_of_a_mix(tmp_path: Path) -> None:
    """Both datasets hold two references, of which one is of the same weights: named by it, they go
    together. A third dataset lacks it.
    """
    one = build_dataset(tmp_path / "one", 8).root
    two = build_dataset(tmp_path / "two", 8).root
    bare = build_dataset(tmp_path / "bare", 8, reference=False).root
    for root, prefix in ((one, "1"), (two, "2")):
        add_reference(root, "shared", 1.0, fingerprint=prefix * 64)
    add_reference(two, "own", 2.0, fingerprint="3" * 64)

    def opened(*chosen: tuple[Path, str | None]) -> None:
        items = [DatasetSettings(path=str(root), reference=ref) for root, ref in chosen]
        check_compatible([item.dataset for item in open_datasets(items, tmp_path).values()])

    opened((one, "1"), (two, "2"))
    with pytest.raises(ConfigError, match="scored under the same reference") as caught:
        opened((one, "1"), (two, "3"))
    assert caught.value.file == str(two)
    with pytest.raises(ConfigError, match="needs the log-probs of one reference") as caught:
        opened((one, "1"), (two, None))
    assert caught.value.file == str(two)
    with pytest.raises(ConfigError, match=r"holds none.*gvpo-offline reference") as caught:
        opened((one, "1"), (bare, None))
    assert caught.value.file == str(bare)
