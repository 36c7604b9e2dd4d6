"""New logs join a dataset: what it has stays, and only what is new is scored."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.builders import build_dataset, make_group
from support.rewarding import answered, functions, reward
from support.training import VOCAB_SIZE, copy_of, score, trainer_of
from transformers import AutoTokenizer

from gvpo_offline import cli
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.group import Group
from gvpo_offline.hub.card import card
from gvpo_offline.info.dataset import dataset_info
from gvpo_offline.merging.settings import CompactConfig, MergeConfig
from gvpo_offline.merging.stages import RewriteResult, compact, merge
from gvpo_offline.reference.scorer import ReferenceScorer
from gvpo_offline.store.coverage import coverage_of
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.manifest import load_manifest
from gvpo_offline.store.sidecar_choice import WeightedReward
from gvpo_offline.store.validate import validate
from gvpo_offline.stream.selecting.select import select
from gvpo_offline.stream.settings import DatasetSettings
from gvpo_offline.tokenizer import tokenizer_info

Numbers = dict[tuple[str, tuple[int, ...]], tuple[float, float]]
EXACT = {"right": {"kind": "exact", "column": "answer", "pattern": r"It is (\d+)"}}


def rows(numbers: Sequence[int], seed: int) -> list[Group]:
    """Groups with texts and an answer; those of one number have one prompt in every seed."""
    texts = answered(max(numbers) + 1)
    found = []
    for number in numbers:
        first, own = (
            make_group(number, k=3, seed=s, vocab_size=VOCAB_SIZE, scored=False) for s in (0, seed)
        )
        found.append(
            replace(
                own,
                prompt_token_ids=first.prompt_token_ids,
                prompt=texts[number].prompt,
                responses=tuple(f"It is {number + i}" for i in range(3)),
                response_ids=None,
                metadata=texts[number].metadata,
            )
        )
    return found


def written(root: Path, groups: list[Group], model: Path) -> Path:
    tokenizer = tokenizer_info(AutoTokenizer.from_pretrained(model))
    build_dataset(root, groups=groups, reward=None, reference=False, tokenizer=tokenizer)
    return root


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> tuple[Path, Path]:
    """Groups 0 to 5 with a reward and a reference; groups 4 to 8 without, of other responses."""
    folder = tmp_path_factory.mktemp("days")
    monday = written(folder / "monday", rows(range(6), 0), tiny_model_dir)
    reward(monday, EXACT, name="right")
    score(monday, tiny_model_dir)
    return monday, written(folder / "tuesday", rows(range(4, 9), 1), tiny_model_dir)


@pytest.fixture
def merged(days: tuple[Path, Path], tmp_path: Path) -> Path:
    root = copy_of(days[0], tmp_path / "data")
    add(root, days[1], incomplete="keep")
    return root


def add(root: Path, *others: Path, **options: Any) -> RewriteResult:
    names = [str(other) for other in others]
    return merge(MergeConfig(str(root), add=names, show_progress=False, **options))


def joined(root: Path, version: int | None = None) -> GroupDataset:
    manifest = load_manifest(root, version)
    rewards = [WeightedReward(family) for family in manifest.rewards]
    return GroupDataset(root, manifest, rewards, manifest.references[0])


def numbers(dataset: GroupDataset) -> Numbers:
    """Reward and log-prob of each response, by group and tokens."""
    found: Numbers = {}
    for row_group in range(dataset.n_row_groups):
        for group in dataset.groups(row_group):
            assert group.rewards is not None
            assert group.ref_seq_logprobs is not None
            for ids, *own in zip(
                group.response_token_ids, group.rewards, group.ref_seq_logprobs, strict=True
            ):
                found[group.group_id, tuple(ids.tolist())] = (float(own[0]), float(own[1]))
    return found


def test_a_merge_keeps_what_one_side_lacks(days: tuple[Path, Path], merged: Path) -> None:
    """Of 6 * 3 + 5 * 3 = 33 responses in 9 groups, 18 have numbers, and groups 0 to 3 have all."""
    before, after = numbers(joined(days[0])), numbers(joined(merged))
    assert len(after) == 33
    assert {key: own for key, own in after.items() if not np.isnan(own).any()} == before
    assert sum(np.isnan(own).all() for own in after.values()) == 15
    manifest = load_manifest(merged)
    for family in (*manifest.rewards, *manifest.references):
        own = coverage_of(family, manifest)
        assert own is not None
        assert own.as_dict() == {"responses": 18, "of_responses": 33, "groups": 4, "of_groups": 9}
    validate(merged, lambda each, label: each)


def test_only_a_partial_manifest_needs_a_newer_package(
    days: tuple[Path, Path], merged: Path
) -> None:
    """Version 1 readers are told to upgrade; a dataset without gaps has no new key at all."""
    whole = max(days[0].glob("manifest-*.json")).read_text()
    assert '"schema_version": 1' in whole
    assert not any(key in whole for key in ("partial", "missing_responses", "missing_groups"))
    newest = max(merged.glob("manifest-*.json"))
    assert json.loads(newest.read_text())["manifest"]["schema_version"] == 2


def test_by_default_a_merge_names_the_ways(days: tuple[Path, Path], tmp_path: Path) -> None:
    root = copy_of(days[0], tmp_path / "data")
    with pytest.raises(DataError, match=r"incomplete: keep.*only_missing"):
        add(root, days[1])


def test_only_what_is_new_is_scored(
    days: tuple[Path, Path], merged: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 groups of 3 new responses each: 15 log-probs and 15 rewards. The others keep their bits."""
    asked: list[int] = []
    plain = ReferenceScorer.compute

    def counted(self: Any, groups: Sequence[Group], n_forwards: int = 1) -> Any:
        asked.extend(group.group_size for group in groups)
        return plain(self, groups, n_forwards)

    monkeypatch.setattr(ReferenceScorer, "compute", counted)
    before = numbers(joined(days[0]))
    score(merged, tiny_model_dir, only_missing=True)
    assert asked == [3] * 5
    found = reward(merged, EXACT, name="right", only_missing=True)
    assert found.counts["scored_responses"] == 15
    after = numbers(joined(merged))
    assert {key: after[key] for key in before} == before
    manifest = load_manifest(merged)
    assert manifest.schema_version == 1
    assert len(manifest.rewards) == len(manifest.references) == 1
    validate(merged, lambda each, label: each)
    asked.clear()
    score(merged, tiny_model_dir, only_missing=True)
    assert not asked
    # From the beginning: the same rewards, and log-probs up to the rounding of other layouts.
    again = copy_of(merged, merged.parent / "again")
    for path in (again / "commits").glob("re[wf]*"):
        for record in path.iterdir():
            record.unlink()
    fresh = load_manifest(again)
    (again / f"manifest-{fresh.version:06d}.json").unlink()
    (again / f"manifest-{fresh.version - 1:06d}.json").unlink()
    score(again, tiny_model_dir)
    reward(again, EXACT, name="right")
    expected = numbers(joined(again))
    assert set(expected) == set(after)
    for key, own in expected.items():
        np.testing.assert_allclose(after[key], own, atol=1e-4)


def test_other_settings_complete_nothing(
    merged: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    changed = {"right": {**EXACT["right"], "ignore_case": True}}
    with pytest.raises(ConfigError, match=r"only_missing adds to a reward.*right@1"):
        reward(merged, changed, name="right", only_missing=True)
    with pytest.raises(ConfigError, match=r"only_missing adds to a reference.*differs in .*dtype"):
        score(merged, tiny_model_dir, only_missing=True, dtype="bfloat16")


def test_a_function_that_compares_gets_whole_groups(
    days: tuple[Path, Path], tmp_path: Path
) -> None:
    """Groups 4 and 5 have 3 old and 3 new responses, groups 6 to 8 3 new ones: 2 * 6 + 3 * 3."""
    text = (
        "def rank(completions, **_):\n"
        "    return [float(sorted(completions).index(c)) for c in completions]\n"
    )
    scorers = {"rank": {"kind": "function", "function": f"{functions(tmp_path, text)}:rank"}}
    root = copy_of(days[0], tmp_path / "data")
    reward(root, scorers, name="rank")
    add(root, days[1], incomplete="keep")
    assert reward(root, scorers, name="rank", only_missing=True).counts["scored_responses"] == 21
    manifest = load_manifest(root)
    assert [family.partial for family in manifest.rewards] == [True, False]


def test_training_refuses_and_leaves_out_what_has_no_number(
    merged: Path, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reward(merged, EXACT, name="right", only_missing=True)
    with pytest.raises(DataError, match=r"none for 15 of 33 responses, in 5 of 9.*only_missing"):
        trainer_of(tiny_model_dir, open_dataset(merged), tmp_path / "run", max_steps=1).train()
    selection = select(open_dataset(merged), where="has_reference")
    assert selection is not None
    assert selection.n_groups == 4
    assert selection.notes == ("where has_reference: 4 of 9 groups",)
    with caplog.at_level(logging.INFO):
        chosen = DatasetSettings(path=str(merged), where="has_reference")
        trainer_of(tiny_model_dir, chosen, tmp_path / "run", max_steps=1).train()
    assert "covers 18 of 33 responses" in caplog.text


def test_a_response_without_a_reward_is_refused(
    merged: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    score(merged, tiny_model_dir, only_missing=True)
    with pytest.raises(DataError, match=r"every selected response has a reward.*has_rewards"):
        trainer_of(tiny_model_dir, open_dataset(merged), tmp_path / "run", max_steps=1).train()


def test_every_description_says_what_is_covered(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "18 of 33 responses"
    info = dataset_info(merged, content=True).as_dict()
    for family in (*info["rewards"], *info["references"]):
        assert family["coverage"]["responses"] == 18
    assert info["content"]["rewards"]["right@1"]["unrewarded"] == 15
    assert told in card(load_manifest(merged), "data")
    for command in (["ls", str(merged)], ["validate", "--dataset", str(merged)]):
        cli.main(command)
        assert told in capsys.readouterr().out, command


def test_compacting_keeps_the_gaps(merged: Path) -> None:
    before = numbers(joined(merged))
    compact(CompactConfig(str(merged), shard_bytes=2000, show_progress=False))
    after = numbers(joined(merged))
    assert set(after) == set(before)
    np.testing.assert_array_equal([after[key] for key in before], list(before.values()))
    own = coverage_of(load_manifest(merged).references[0], load_manifest(merged))
    assert own is not None
    assert own.responses == 18


def test_the_dataset_itself_may_lack_the_reference(days: tuple[Path, Path], tmp_path: Path) -> None:
    root = copy_of(days[1], tmp_path / "data")
    add(root, days[0], incomplete="keep")
    manifest = load_manifest(root)
    own = coverage_of(manifest.references[0], manifest)
    assert own is not None
    assert (own.responses, own.groups) == (18, 4)


def test_a_condition_on_rewards_leaves_out_what_has_none(merged: Path) -> None:
    """Groups 0 to 3 have 3 rewards each; groups 4 to 8 have responses without one.

    Exact match gives 0 or 1, so that each condition is true for every group with 3 rewards.
    """
    dataset = open_dataset(merged)
    for condition in (
        *("reward_mean >= 0", "reward_min >= 0", "reward_max >= 0", "reward_std >= 0"),
        *("reward_gap >= 0", "reward_mean > -1 OR reward_max > -1", "has_rewards"),
    ):
        selection = select(dataset, where=condition)
        assert selection is not None
        assert selection.n_groups == 4, condition


def test_groups_without_numbers_are_shown(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """18 of the 33 responses have a reward; the others have null, and none in the text."""
    shown = ["show", str(merged), "--rows", "9"]
    assert cli.main([*shown, "--json", "true"]) == 0
    groups = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    given = [own["rewards"]["right@1"] for group in groups for own in group["responses"]]
    assert len(given) == 33
    assert given.count(None) == 15
    assert cli.main(shown) == 0
    assert "reward right@1: none" in capsys.readouterr().out
