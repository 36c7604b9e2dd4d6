"""A reference that is scored for a selection of groups and responses."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from support.builders import build_dataset, make_groups
from support.training import (
    VOCAB_SIZE,
    copy_of,
    load,
    same_weights,
    score,
    trainer_of,
    unscored_dataset,
    weights_of,
)
from transformers import AutoTokenizer

from gvpo_offline import cli
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.hub.card import card
from gvpo_offline.info.dataset import dataset_info
from gvpo_offline.info.text import reference_text
from gvpo_offline.merging.settings import CompactConfig, MergeConfig
from gvpo_offline.merging.stages import compact, merge
from gvpo_offline.reference.scorer import ReferenceScorer
from gvpo_offline.store.arrow import column_array, split_list, split_nested_list
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.manifest import dump_manifest
from gvpo_offline.store.validate import validate
from gvpo_offline.stream.selecting.select import select
from gvpo_offline.stream.settings import DatasetSettings, ResponseSettings
from gvpo_offline.stream.view import DatasetView
from gvpo_offline.tokenizer import tokenizer_info
from gvpo_offline.train.objective import LossInputs

Floats = np.ndarray[Any, np.dtype[np.float64]]
TWO = ResponseSettings(max_responses=2, prefer="spread")


@pytest.fixture(scope="module")
def unscored(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """24 groups of 2 to 5 responses in 3 shards of 2 row groups, with the reward `reward`."""
    return unscored_dataset(tmp_path_factory.mktemp("unscored") / "data", tiny_model_dir)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, unscored: Path, tiny_model_dir: Path
) -> GroupDataset:
    """The same groups, with log-probs of every response."""
    return score(copy_of(unscored, tmp_path_factory.mktemp("whole") / "data"), tiny_model_dir)


@pytest.fixture(scope="module")
def spread(
    tmp_path_factory: pytest.TempPathFactory, unscored: Path, tiny_model_dir: Path
) -> GroupDataset:
    """The same groups, of which the groups with a reward gap have log-probs of their best and their
    worst response.
    """
    root = copy_of(unscored, tmp_path_factory.mktemp("spread") / "data")
    return score(root, tiny_model_dir, where="reward_gap > 0", responses=TWO)


def logprobs(dataset: GroupDataset) -> dict[str, Floats]:
    """`ref_seq_logprobs` of every group, by its id."""
    found = {}
    for row_group in range(dataset.n_row_groups):
        table = dataset.table(row_group, ["ref_seq_logprobs"])
        rows = split_list(column_array(table, "ref_seq_logprobs"))
        found |= dict(zip(table.column("group_id").to_pylist(), rows, strict=True))
    return found


def best_and_worst(rewards: Floats) -> set[int]:
    """Of equal rewards the response that is stored first."""
    best = int(rewards.argmax())
    rest = np.where(np.arange(len(rewards)) == best, np.inf, rewards)
    return {best, int(rest.argmin())}


def all_groups(dataset: GroupDataset) -> list[Any]:
    return [group for i in range(dataset.n_row_groups) for group in dataset.groups(i)]


def test_only_the_selected_responses_have_log_probs(
    spread: GroupDataset, whole: GroupDataset
) -> None:
    """Those of the whole reference up to rounding (1e-4, as between layouts); NaN elsewhere."""
    expected = logprobs(whole)
    n_groups = n_responses = 0
    for group in all_groups(spread):
        rewards = group.rewards
        chosen = best_and_worst(rewards) if rewards.max() > rewards.min() else set()
        found = group.ref_seq_logprobs
        assert set(np.flatnonzero(~np.isnan(found)).tolist()) == chosen
        items = sorted(chosen)
        np.testing.assert_allclose(found[items], expected[group.group_id][items], atol=1e-4)
        n_groups += bool(chosen)
        n_responses += len(chosen)
    assert 0 < n_groups < 24
    assert n_responses == 2 * n_groups < sum(len(row) for row in expected.values())
    step = spread.manifest.lineage[-1]
    assert step.counts == {"files": 3, "groups": n_groups, "responses": n_responses}


def test_a_response_without_log_probs_has_no_token_log_probs(spread: GroupDataset) -> None:
    for row_group in range(spread.n_row_groups):
        table = spread.table(row_group, ["ref_token_logprobs"])
        tokens = split_nested_list(column_array(table, "ref_token_logprobs"))
        for group, rows in zip(spread.groups(row_group), tokens, strict=True):
            assert rows is not None
            assert group.ref_seq_logprobs is not None
            lengths = np.where(np.isnan(group.ref_seq_logprobs), 0, group.response_lengths)
            assert [len(row) for row in rows] == lengths.tolist()


def test_the_dataset_is_valid_and_says_what_was_scored(spread: GroupDataset) -> None:
    (family,) = spread.manifest.references
    assert family.selection is not None
    assert family.selection.model_dump() == {
        "where": "reward_gap > 0",
        "responses": {"max_responses": 2, "prefer": "spread"},
        "reward": "reward@1",
    }
    text = "where reward_gap > 0; responses.max_responses 2; responses.prefer spread; reward rew"
    assert text in reference_text(family)
    (described,) = dataset_info(spread.root).as_dict()["references"]
    assert described["selection"]["where"] == "reward_gap > 0"
    assert validate(spread.root, lambda numbers, label: numbers).survey.n_groups == 24
    said = card(spread.manifest, "someone/data")
    flags = "--where 'reward_gap > 0' --responses.max_responses 2 --responses.prefer spread"
    assert f"--reward reward@1 {flags}" in said


def test_a_reference_of_every_response_is_written_as_before(whole: GroupDataset) -> None:
    """Versions that do not know the field open it."""
    assert "selection" not in dump_manifest(whole.manifest)
    assert whole.manifest.lineage[-1].counts == {"files": 3}


# ---- training ----


def settings(dataset: GroupDataset, **changes: Any) -> DatasetSettings:
    return DatasetSettings(str(dataset.root), **changes)


@pytest.mark.parametrize(
    ("where", "responses"),
    [
        ("reward_gap > 0", TWO),
        # Expressed differently, and narrower: rewards are 0, 0.25, 0.5 and 1.
        ("NOT reward_max = reward_min", TWO),
        ("reward_max - reward_min >= 0.5", TWO),
        ("reward_gap > 0 AND group_size = 2", ResponseSettings()),
        (pl.col("reward_gap") > 0.25, TWO),
    ],
)
def test_a_covered_selection_is_trained_on(
    spread: GroupDataset, tiny_model_dir: Path, tmp_path: Path, where: Any, responses: Any
) -> None:
    """The data decides, not the text of the condition."""
    data = settings(spread, where=where, responses=responses)
    trainer = trainer_of(load(tiny_model_dir), data, tmp_path, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    "responses", [TWO, ResponseSettings(max_responses=2), ResponseSettings(max_responses=3)]
)
def test_an_uncovered_selection_is_refused_before_the_first_step(
    spread: GroupDataset, tiny_model_dir: Path, tmp_path: Path, responses: ResponseSettings
) -> None:
    """The first group without a log-prob, and how many responses and groups have none."""
    dataset = open_dataset(spread.root)
    view = DatasetView(dataset, select(dataset, responses=responses))
    n_responses, groups = 0, []
    for row_group in range(dataset.n_row_groups):
        for row, group in enumerate(view.groups(row_group)):
            assert group.ref_seq_logprobs is not None
            missing = int(np.isnan(group.ref_seq_logprobs).sum())
            n_responses += missing
            if missing:
                groups.append((dataset.location(row_group).first_row + row, group.group_id))
    trainer = trainer_of(load(tiny_model_dir), settings(spread, responses=responses), tmp_path)
    said = rf"none for {n_responses} of \d+ responses, in {len(groups)} of 24 groups; .*where rewa"
    with pytest.raises(DataError, match=said) as error:
        trainer.train()
    assert (error.value.row, error.value.group) == groups[0]
    assert "reference/" in str(error.value.file)
    assert trainer.state.global_step == 0


def test_held_out_groups_are_checked_too(
    spread: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(
        load(tiny_model_dir),
        settings(spread, where="reward_gap > 0", responses=TWO),
        tmp_path,
        eval_dataset=settings(spread),
    )
    with pytest.raises(DataError, match="a log-prob of every selected response"):
        trainer.train()


def test_a_run_on_a_covered_selection_resumes_exactly(
    spread: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    data = settings(spread, where="reward_gap >= 0.5", responses=TWO)
    changes: dict[str, Any] = {"groups_per_step": 4, "save_strategy": "steps", "save_steps": 2}
    straight = trainer_of(load(tiny_model_dir), data, tmp_path / "a", max_steps=4, **changes)
    straight.train()
    again = trainer_of(load(tiny_model_dir), data, tmp_path / "b", max_steps=4, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert same_weights(weights_of(straight), weights_of(again))


def test_a_loss_of_a_response_without_log_prob_is_refused(spread: GroupDataset) -> None:
    """For loops of one's own, without the checks of the trainer."""
    groups = all_groups(spread)
    gap = next(g for g in groups if np.isnan(g.ref_seq_logprobs).any())
    with pytest.raises(DataError, match="NaN for response") as error:
        LossInputs.of([gap])
    assert error.value.group == gap.group_id


def test_evaluate_checks_the_selection(
    spread: GroupDataset, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--model_name_or_path", str(tiny_model_dir), "--use_cpu", "true"]
    command += ["--dataset", str(spread.root), "--beta", "1", "--show_progress", "false"]
    assert cli.main(command) == 1
    assert "has a log-prob of every selected response" in capsys.readouterr().err
    chosen = ["--responses.max_responses", "2", "--responses.prefer", "spread"]
    assert cli.main([*command, "--where", "reward_gap > 0", *chosen]) == 0


def test_a_condition_on_log_probs_needs_all_of_them(spread: GroupDataset) -> None:
    with pytest.raises(ConfigError, match="needs the log-probs of every response"):
        select(open_dataset(spread.root), where="ARRAY_LENGTH(ref_seq_logprobs) = 2")


# ---- scoring again ----


def test_what_is_covered_is_not_scored_again(
    spread: GroupDataset,
    whole: GroupDataset,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a reference of the same selection, of a larger one, and of every response."""
    monkeypatch.delattr(ReferenceScorer, "table")
    for dataset, where in (
        (spread, "reward_gap > 0"),
        (spread, "reward_gap >= 0.5"),
        (whole, "reward_gap > 0"),
    ):
        again = score(Path(dataset.root), tiny_model_dir, where=where, responses=TWO)
        assert again.manifest == dataset.manifest


def test_what_is_not_covered_becomes_a_second_reference(
    spread: GroupDataset, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Both stay; a run names one of them, and an error says what each was scored for."""
    root = copy_of(Path(spread.root), tmp_path / "data")
    with pytest.raises(ConfigError, match=r"of where reward_gap > 0; .*spread; reward reward@1"):
        score(root, tiny_model_dir)
    one, other = open_dataset(root, join=()).manifest.references
    assert (one.selection is None, other.selection is None) == (False, True)
    assert one.weights_sha256 == other.weights_sha256
    assert not any(
        np.isnan(row).any()
        for row in logprobs(open_dataset(root, reference=other.fingerprint)).values()
    )


def test_a_selection_of_groups_alone(
    unscored: Path, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a reward; a row group without a selected group has NaN alone."""
    root = copy_of(unscored, tmp_path / "data")
    with caplog.at_level(logging.INFO):
        dataset = score(root, tiny_model_dir, where="group_id < 'group-00005'")
    (family,) = dataset.manifest.references
    assert family.selection is not None
    assert family.selection.reward is None
    found = logprobs(dataset)
    chosen = {f"group-{number:05d}" for number in range(5)}
    assert {name for name, row in found.items() if not np.isnan(row).any()} == chosen
    assert all(np.isnan(row).all() for name, row in found.items() if name not in chosen)
    assert "where group_id < 'group-00005': 5 of 24 groups" in caplog.text


def test_the_command_line_selects_as_train_does(
    unscored: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copy_of(unscored, tmp_path / "data")
    command = ["reference", "--dataset", str(root), "--model_name_or_path", str(tiny_model_dir)]
    command += ["--use_cpu", "true", "--show_progress", "false"]
    assert cli.main([*command, "--responses.samplers", "[nobody]"]) == 1
    assert "responses.samplers holds samplers of the dataset" in capsys.readouterr().err
    assert cli.main([*command, "--responses.max_responses", "2"]) == 0
    assert "of responses.max_responses 2)" in capsys.readouterr().out
    found = logprobs(open_dataset(root))
    for row in found.values():
        assert np.isnan(row).tolist() == [False, False] + [True] * (len(row) - 2)


def test_a_selection_by_a_reward_names_the_reward(
    unscored: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    root = copy_of(unscored, tmp_path / "data")
    with pytest.raises(ConfigError, match=r"received 'points'.*reward@1"):
        score(root, tiny_model_dir, where="reward_gap > 0", reward="points")
    with pytest.raises(ConfigError, match="an SQL condition, which the manifest records"):
        score(root, tiny_model_dir, where=pl.col("reward_gap") > 0)
    with pytest.raises(ConfigError, match="none of 24 groups"):
        score(root, tiny_model_dir, where="reward_gap > 7")
    dataset = score(
        root, tiny_model_dir, where="reward_gap > 1", reward={"reward@1": 2.0}
    )  # a doubled gap above 1, so a gap of 0.75 or 1
    (family,) = dataset.manifest.references
    assert family.selection is not None
    assert family.selection.reward == {"reward@1": 2.0}
    for group in all_groups(dataset):
        gap = group.rewards.max() - group.rewards.min()
        assert np.isnan(group.ref_seq_logprobs).all() == (gap <= 0.5)


# ---- merging ----


def test_merging_and_compacting_keep_what_was_scored(
    unscored: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Group 0 has two rows, one in each dataset: the merged group has the log-probs of both."""
    tokenizer = tokenizer_info(AutoTokenizer.from_pretrained(tiny_model_dir))
    groups = make_groups(8, scored=False, vocab_size=VOCAB_SIZE)
    others = make_groups(4, scored=False, vocab_size=VOCAB_SIZE)
    others[1:] = [replace(group, group_id=f"other-{i}") for i, group in enumerate(others[1:])]
    others[0] = replace(others[0], response_ids=None)
    groups[0] = replace(groups[0], response_ids=None)
    before: dict[str, list[Floats]] = {}
    for name, rows in (("data", groups), ("more", others)):
        build_dataset(tmp_path / name, groups=rows, reference=False, tokenizer=tokenizer)
        chosen = {"where": "reward_max > 0", "responses": TWO}
        for group_id, row in logprobs(score(tmp_path / name, tiny_model_dir, **chosen)).items():
            before.setdefault(group_id, []).append(row)
    merge(MergeConfig(dataset=str(tmp_path / "data"), add=[str(tmp_path / "more")]))
    compact(CompactConfig(dataset=str(tmp_path / "data"), rows_per_row_group=3))
    merged = open_dataset(tmp_path / "data")
    (family,) = merged.manifest.references
    assert family.selection is not None
    assert family.selection.where == "reward_max > 0"
    found = logprobs(merged)
    assert len(found) == 11
    assert len(before["group-00000"]) == 2
    for group_id, rows in before.items():
        np.testing.assert_array_equal(found[group_id], np.concatenate(rows))
    assert sum(int(np.isnan(row).sum()) for row in found.values()) > 0
    assert validate(tmp_path / "data", lambda numbers, label: numbers).survey.n_groups == 11


# ---- damage ----


def test_gaps_without_a_selection_are_refused(spread: GroupDataset) -> None:
    """NaN is allowed only where the manifest names a selection."""
    (family,) = spread.manifest.references
    dataset = GroupDataset(
        Path(spread.root),
        spread.manifest,
        spread.rewards,
        family.model_copy(update={"selection": None}),
    )
    with pytest.raises(DataError, match=r"a reference log-prob is a finite number.*nan"):
        all_groups(dataset)


def test_the_first_of_several_ranks_counts(spread: GroupDataset) -> None:
    """Surveys of parts of the row groups, added in any order, are the survey of all."""
    view = DatasetView(open_dataset(spread.root))
    total = view.survey()
    parts = [view.survey(slice(i, None, 2)) for i in range(2)]
    for one, other in (parts, parts[::-1]):
        added = one + other
        assert added.first_unscored == total.first_unscored is not None
        assert added.unscored_responses == total.unscored_responses
        assert added.unscored_groups == total.unscored_groups
    assert json.loads(dump_manifest(spread.manifest))["manifest"]["references"][0]["selection"]
