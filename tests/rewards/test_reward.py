"""The reward stage: sums, versions, and the same sidecar whoever computes it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.builders import differences
from support.fork_server import ForkServer
from support.rewarding import answered, answered_dataset, functions, read, reward
from transformers import AutoTokenizer

from gvpo_offline import cli
from gvpo_offline.errors import ConfigError, DataError, IntegrityError
from gvpo_offline.rewards.settings import RewardConfig
from gvpo_offline.rewards.stage import run_reward
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.store.manifest import Manifest
from gvpo_offline.store.validate import validate
from gvpo_offline.store.writer import publish
from gvpo_offline.tokenizer import tokenizer_info
from gvpo_offline.workers.settings import WorkerSettings

NUMERIC = {"kind": "numeric", "column": "answer"}
EXACT = {"kind": "exact", "column": "level", "pattern": r"is (.*)"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return answered_dataset(tmp_path / "data")


def sidecars(root: Path) -> dict[str, bytes]:
    """Every reward file of a dataset."""
    found = sorted((root / "rewards").rglob("*.parquet"))
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def test_the_reward_is_the_weighted_sum_of_what_the_scorers_say(root: Path, tmp_path: Path) -> None:
    """Response i of group g says g + i; right is g + 1, so it is response 1 alone that has
    2 * 1, and every response half of its length.
    """
    path = functions(tmp_path)
    scorers = {
        "right": {**NUMERIC, "weight": 2.0},
        "brief": {"kind": "function", "function": f"{path}:length", "weight": -0.5},
    }
    result = reward(root, scorers, name="both")
    assert result.family.components == ["brief", "right"]
    expected = []
    for group in read(root):
        assert group.rewards is not None
        assert group.components is not None
        assert group.responses is not None
        lengths = [float(len(text)) for text in group.responses]
        right = [float(i == 1) for i in range(group.group_size)]
        np.testing.assert_array_equal(group.components, [lengths, right])
        sums = [2 * r - 0.5 * n for r, n in zip(right, lengths, strict=True)]
        np.testing.assert_array_equal(group.rewards, sums)
        expected += sums
    assert result.lines()[0].startswith(
        f"reward both@1: 16 groups, {len(expected)} responses, mean {np.mean(expected):.4f}"
    )
    assert validate(root, lambda numbers, label: numbers).survey.n_groups == 16


def test_tokens_are_neither_read_nor_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The groups stay byte for byte; a scorer of texts asks for no token column."""
    before = {path: path.read_bytes() for path in (root / "groups").iterdir()}
    asked: set[str] = set()
    from gvpo_offline.store import dataset as dataset_module

    original = dataset_module.read_row_group

    def noting(file: Any, path: Path, index: int, columns: list[str]) -> Any:
        asked.update(columns)
        return original(file, path, index, columns)

    monkeypatch.setattr(dataset_module, "read_row_group", noting)
    reward(root, {"right": NUMERIC})
    assert asked
    assert not {"prompt_token_ids", "response_token_ids", "loss_mask"} & asked
    assert before == {path: path.read_bytes() for path in (root / "groups").iterdir()}


def test_functions_see_the_tokens(root: Path, tmp_path: Path) -> None:
    path = functions(tmp_path)
    reward(root, {"tokens": {"kind": "function", "function": f"{path}:tokens"}})
    for group in read(root):
        assert group.rewards is not None
        assert group.rewards.tolist() == group.response_lengths


# ---- missing numbers ----


def sometimes_missing(folder: Path) -> str:
    """A function that knows nothing of the first response of a group."""
    text = "def later(completions, **kwargs):\n    return [None, *[1.0] * (len(completions) - 1)]\n"
    return f"{functions(folder, text)}:later"


def test_a_missing_number_is_no_zero_and_no_nan(root: Path, tmp_path: Path) -> None:
    """The sum is over those that are there; the component says which is not."""
    later = {"kind": "function", "function": sometimes_missing(tmp_path), "weight": 3.0}
    reward(root, {"a": later, "b": NUMERIC})
    for group in read(root):
        assert group.rewards is not None
        assert group.components is not None
        assert np.isnan(group.components[0]).tolist() == [True] + [False] * (group.group_size - 1)
        assert group.rewards.tolist() == [0.0, 4.0] + [3.0] * (group.group_size - 2)


def test_a_response_that_no_scorer_knows(root: Path, tmp_path: Path) -> None:
    """Stops the run, with its place; unless the settings say what its reward is."""
    later = {"kind": "function", "function": sometimes_missing(tmp_path)}
    with pytest.raises(DataError, match=r"at least one scorer has a number.*response 0") as error:
        reward(root, {"a": later})
    group = open_dataset(root, join=()).groups(0)[0]
    assert (error.value.row, error.value.group) == (0, group.group_id)
    assert "groups/00000-" in str(error.value.file)
    assert open_dataset(root, join=()).manifest.rewards == []
    result = reward(root, {"a": later}, missing=-1.0)
    assert result.counts == {"missing": 16}
    assert result.lines()[1] == "  missing: 16"
    for group in read(root):
        assert group.rewards is not None
        assert group.rewards.tolist() == [-1.0] + [1.0] * (group.group_size - 1)


_VALUES = st.none() | st.floats(-1e6, 1e6)


@given(
    st.lists(st.floats(-10, 10), min_size=1, max_size=4),
    st.lists(st.lists(_VALUES, min_size=4, max_size=4), min_size=3, max_size=3),
    st.none() | st.floats(-1, 1),
)
def test_the_sum_is_over_what_is_there(
    weights: list[float], rows: list[list[float | None]], missing: float | None
) -> None:
    """For any weights and any missing numbers, against a sum in plain Python."""
    from collections import Counter

    from support.rewarding import scoring_input

    from gvpo_offline.rewards.stage import RewardStage
    from gvpo_offline.rewards.weighted import weighted_total

    stage = RewardStage.__new__(RewardStage)
    stage._config = RewardConfig("data", scorers={"a": {}}, missing=missing)
    values = [[row[i] for row in rows] for i in range(len(weights))]
    numbers = np.array(values, np.float64)
    expected: list[float | None] = []
    for response in range(3):
        there = [
            w * v[response] for w, v in zip(weights, values, strict=True) if v[response] is not None
        ]  # type: ignore[operator]
        expected.append(sum(there) if there else missing)
    counts: Counter[str] = Counter()
    total = weighted_total(np.array(weights), numbers)
    if None in expected:
        with pytest.raises(DataError):
            stage._filled(scoring_input(["x"] * 3), total, counts)
        return
    np.testing.assert_allclose(
        stage._filled(scoring_input(["x"] * 3), total, counts), expected, atol=1e-6
    )


# ---- names and versions ----


def test_the_same_settings_are_there_already(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = reward(root, {"right": NUMERIC, "level": EXACT})
    before = open_dataset(root, join=()).manifest
    monkeypatch.delattr("gvpo_offline.rewards.match.NumericScorer.score_group")  # no work is left
    # In another order, too.
    assert reward(root, {"level": EXACT, "right": NUMERIC}).family == first.family
    assert open_dataset(root, join=()).manifest == before


def test_other_settings_are_a_new_version(root: Path, tmp_path: Path) -> None:
    """Other weights, other code under one name; and the old ones still open."""
    path = functions(tmp_path)
    length = {"kind": "function", "function": f"{path}:length"}
    versions = [
        reward(root, {"n": NUMERIC}).family.version,
        reward(root, {"n": {**NUMERIC, "weight": 2.0}}).family.version,
        reward(root, {"n": length}).family.version,
    ]
    functions(tmp_path, "def length(completions, **kwargs):\n    return [7.0] * len(completions)\n")
    versions.append(reward(root, {"n": length}).family.version)
    assert versions == [1, 2, 3, 4]
    assert reward(root, {"n": NUMERIC}).family.version == 1
    means = [
        float(np.mean(np.concatenate([g.rewards for g in read(root, name)])))  # type: ignore[misc]
        for name in ("reward@1", "reward@2", "reward@4", "reward")
    ]
    assert means[1] == 2 * means[0]
    assert means[2:] == [7.0, 7.0]
    steps = [
        step for step in open_dataset(root, join=()).manifest.lineage if step.stage == "reward"
    ]
    assert [step.config["version"] for step in steps] == [1, 2, 3, 4]
    assert steps[1].config["scorers"] == {"n": {**NUMERIC, "weight": 2.0}}


def test_rewards_that_are_there_make_others(root: Path) -> None:
    """0.5 * numeric@1 + 2 * level@1: nothing is scored again."""
    reward(root, {"n": NUMERIC}, name="numeric")
    reward(root, {"l": EXACT}, name="level")
    scorers = {
        "a": {"kind": "reward", "reward": "numeric", "weight": 0.5},
        "b": {"kind": "reward", "reward": "level@1", "weight": 2.0},
    }
    family = reward(root, scorers, name="mix").family
    assert family.config["scorers"]["a"] == {
        "kind": "reward",
        "reward": "numeric@1",
        "weight": 0.5,
    }
    parts = zip(read(root, "numeric"), read(root, "level"), read(root, "mix"), strict=True)
    for one, other, both in parts:
        assert one.rewards is not None
        assert other.rewards is not None
        np.testing.assert_array_equal(both.rewards, 0.5 * one.rewards + 2 * other.rewards)
    with pytest.raises(ConfigError, match=r"received 'nothing'.*'level@1', 'mix@1', 'numeric@1'"):
        reward(root, {"a": {"kind": "reward", "reward": "nothing"}})
    with pytest.raises(ConfigError, match=r"names the version.*scorers\.a\.reward: mix.*mix@1"):
        reward(root, {"a": {"kind": "reward", "reward": "mix"}}, name="mix")


def test_further_numbers_are_components(root: Path, tmp_path: Path) -> None:
    """Of verl's dict, `score` counts and what `keep` names stays beside it."""
    text = (
        "def f(data_source, solution_str, ground_truth, extra_info):\n"
        "    return {'score': solution_str.endswith(ground_truth), 'words': 3, 'other': 'text'}\n"
    )
    scorer = {"kind": "verl", "function": f"{functions(tmp_path, text)}:f"}
    scorer |= {"ground_truth": "answer"}
    assert reward(root, {"v": {**scorer, "keep": ["words"]}}).family.components == ["v", "v.words"]
    for group in read(root):
        assert group.rewards is not None
        assert group.components is not None
        np.testing.assert_array_equal(group.components[0], group.rewards)
        assert group.components[1].tolist() == [3.0] * group.group_size


def test_a_reward_of_the_log_keeps_its_version(tmp_path: Path) -> None:
    root = answered_dataset(tmp_path / "data", reward="reward")
    assert reward(root, {"n": NUMERIC}).family.version == 2
    logged = {group.group_id: group for group in answered()}
    for group in read(root, "reward@1"):
        assert differences(group, logged[group.group_id], ignore=_NOT_READ) == []


_NOT_READ = (
    *("prompt_token_ids", "prompt", "truncated", "samplers", "source"),
    *("response_ids", "ref_seq_logprobs", "components"),
)


def test_groups_that_came_meanwhile(root: Path) -> None:
    """Their rewards would be missing: nothing is published, and the next run does the rest."""
    config = RewardConfig(str(root), scorers={"n": NUMERIC})

    def fewer(newest: Manifest | None) -> Manifest:
        assert newest is not None
        return newest.model_copy(update={"groups": newest.groups[:1]})

    from gvpo_offline.rewards import stage as stage_module

    original = stage_module.run_stage

    def meanwhile(*args: Any) -> Any:
        publish(root, fewer)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_module, "run_stage", meanwhile)
        with pytest.raises(
            DataError, match="groups of a dataset do not change while they are scored"
        ):
            run_reward(config, WorkerSettings(show_progress=False))
    result = run_reward(config, WorkerSettings(show_progress=False))
    assert result is not None
    assert result.survey.n_groups == 8


# ---- texts ----


def test_a_log_of_ids_alone_is_decoded(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """By the tokenizer that the manifest names, without special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)

    def ids(text: str) -> Any:
        return np.array([*tokenizer(text, add_special_tokens=False)["input_ids"], 2], np.int32)

    groups = [
        replace(
            group,
            prompt_token_ids=ids(group.prompt or ""),
            response_token_ids=tuple(ids(text) for text in group.responses or ()),
            prompt=None,
            responses=None,
            ref_seq_logprobs=None,
        )
        for group in answered(8)
    ]
    info = tokenizer_info(tokenizer)
    kept = {"reward": None, "reference": False, "tokenizer": info}
    from support.builders import build_dataset

    build_dataset(tmp_path / "ids", groups=groups, **kept)
    reward(tmp_path / "ids", {"right": NUMERIC})
    for group in read(tmp_path / "ids"):
        assert group.rewards is not None
        assert group.rewards.tolist() == [float(i == 1) for i in range(group.group_size)]
    build_dataset(tmp_path / "unnamed", groups=groups, **{**kept, "tokenizer": None})
    with pytest.raises(DataError, match="a group without texts in a dataset that names no token"):
        reward(tmp_path / "unnamed", {"right": NUMERIC})
    named = {"tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    reward(tmp_path / "unnamed", {"right": NUMERIC}, **named)
    from support.tiny_policy import train_tokenizer

    other = train_tokenizer(tmp_path / "other", eos=False)
    with pytest.raises(IntegrityError, match="uses the tokenizer"):
        reward(tmp_path / "ids", {"level": EXACT}, tokenizer_name_or_path=str(other))


# ---- engines and the command ----


def test_shards_of_an_array(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = answered_dataset(tmp_path / "data", groups_per_shard=4)
    command = ["reward", "--dataset", str(root), "--show_progress", "false"]
    command += ["--scorers", "{right: {kind: numeric, column: answer}}", "--name", "right"]
    assert cli.main([*command, "--shard", "0/2"]) == 0
    assert "reward right" not in capsys.readouterr().out
    assert open_dataset(root, join=()).manifest.rewards == []
    assert cli.main([*command, "--shard", "1/2"]) == 0
    assert "reward right@1: 16 groups" in capsys.readouterr().out
    assert len(open_dataset(root, join=("reward",)).manifest.rewards[0].files) == 4


def test_the_command_reads_a_file_and_says_what_is_wrong(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "reward.yaml"
    settings.write_text(
        f"dataset: {root}\nname: right\nshow_progress: false\nscorers:\n"
        "  right: {kind: numeric, column: answer}\n  level: {kind: exact, column: nothing}\n"
    )
    assert cli.main(["reward", "--config", str(settings)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gvpo-offline reward: error: ")
    assert "metadata has the column nothing; received answer, level." in line


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, server: ForkServer) -> None:
    """Killed before the second and then before the third commit of four."""
    undisturbed = answered_dataset(tmp_path / "undisturbed", groups_per_shard=4)
    root = tmp_path / "data"
    shutil.copytree(undisturbed, root)
    flags = ["--scorers", "{right: {kind: numeric, column: answer}}"]
    assert server.run(["reward", "--dataset", str(undisturbed), *flags])[0] == 0
    commit = "gvpo_offline.store.commit:TaskLog.commit"
    for n_committed in (1, 2):
        command = ["reward", "--dataset", str(root), *flags]
        assert server.start(command, kill_at=[commit, 2, 0]).wait() == -9
        assert len(list((root / "commits").glob("reward-*/*.json"))) == n_committed
    status, output = server.run(["reward", "--dataset", str(root), *flags])
    assert status == 0, output
    one, other = (open_dataset(path, join=("reward",)).rewards for path in (root, undisturbed))
    assert one == other
    named = {sidecar.file.path for sidecar in one[0].family.files}
    found = sidecars(root)
    assert {path: found[path] for path in named} == sidecars(undisturbed)
