"""Rewards of fresh answers: as those of stored responses; failures; which kinds are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.judging import JudgeServer, judge, rating, shown_numbers
from support.rewarding import answered_dataset, functions, read, reward, scoring_input
from support.sampled_answers import reward_file

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.rewards.cases import ScoringInputReader
from gvpo_offline.rewards.fresh import REFUSED_KINDS, fresh_config
from gvpo_offline.rewards.kinds import ScorerSettings
from gvpo_offline.rewards.maths import FreshMathScorer
from gvpo_offline.sampled_eval.prompts import read_prompts
from gvpo_offline.sampled_eval.reward import NO_NUMBER, FreshReward
from gvpo_offline.store.dataset import open_dataset
from gvpo_offline.stream.view import DatasetView

NUMERIC = {"kind": "numeric", "column": "answer"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return answered_dataset(tmp_path_factory.mktemp("answered") / "data", 8)


@pytest.fixture
def served() -> Iterator[JudgeServer]:
    started = JudgeServer()
    yield started
    started.close()


def fresh(scorers: dict[str, Any], **more: Any) -> FreshReward:
    return FreshReward(fresh_config({"scorers": scorers, **more}))


# ---- the same numbers ----


@pytest.mark.parametrize(
    "scorers",
    [
        {"right": {**NUMERIC, "weight": 2.0}, "exact": {"kind": "exact", "column": "answer"}},
        {"own": {"kind": "function", "function": ":length"}, "right": {**NUMERIC, "weight": -3}},
        {"ids": {"kind": "function", "function": ":tokens"}},
        {
            "verl": {
                "kind": "verl",
                "function": ":plain_score",
                "ground_truth": "answer",
                "extra_info": "level",
            }
        },
    ],
    ids=["rules", "function", "token ids", "verl"],
)
def test_a_text_has_one_reward_whether_stored_or_fresh(
    scorers: dict[str, Any], root: Path, tmp_path: Path
) -> None:
    file = functions(tmp_path)
    for settings in scorers.values():
        if "function" in settings:
            settings["function"] = file + settings["function"]
    name = f"stored-{len(open_dataset(root, join=()).manifest.rewards)}"
    reward(root, scorers, name=name)
    stored = [group.rewards for group in read(root, name)]
    dataset = open_dataset(root, join=())
    reader = ScoringInputReader(dataset, token_ids=True, tokenizer=None)
    inputs = [own for i in range(dataset.n_row_groups) for own in reader.read(i)]
    found = fresh(scorers).score(inputs)
    assert not found.causes
    for mine, theirs in zip(found.rewards, stored, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_judge_is_asked_at_once_and_nothing_is_stored(root: Path, served: JudgeServer) -> None:
    """A request that fails gives no number; `gaps` has no effect."""
    served.fault = lambda question, times: "prose" if "It is 3" in question else None
    scorer = fresh({"helpful": judge(served)})
    found = scorer.score([scoring_input(["It is 2", "It is 3"]), scoring_input(["It is 7"])])
    assert found.rewards[0].tolist()[0] == rating(2)
    assert found.rewards[1].tolist() == [rating(7)]
    assert np.isnan(found.rewards[0][1])
    ((cause, n),) = found.causes.items()
    assert n == 1
    assert cause.startswith("the judge's request failed: ")
    assert served.asked.total() == 2 + 2  # max_attempts is 2
    assert not (root / "judgements").exists()
    again = scorer.score([scoring_input(["It is 4"])])
    assert again.rewards[0].tolist() == [rating(4)]
    assert not again.causes
    assert shown_numbers(served.bodies[-1]["messages"][-1]["content"]) == [4]


def test_a_judge_that_does_not_answer_is_said_before_training(
    tmp_path: Path, served: JudgeServer
) -> None:
    """One answer to three requests is enough: single failures are counted later."""
    root = answered_dataset(tmp_path / "data", 4, reward="reward")
    prompts = read_prompts([DatasetView(open_dataset(root, join=("reward",)))])
    best = [own.logged.responses[0] for own in prompts]
    served.fault = lambda question, times: None if best[2] in question else "prose"
    fresh({"helpful": judge(served)}).check(prompts)
    served.fault = lambda question, times: "prose"
    with pytest.raises(DataError, match="the judge answers a request about a logged") as error:
        fresh({"helpful": judge(served)}).check(prompts)
    assert error.value.group == "group-00000"


# ---- answers without a reward ----

FAILING = """
def score(completions, **kwargs):
    if any("bad" in text for text in completions):
        raise KeyError("solution")
    return [None if text == "none" else float(len(text)) for text in completions]
"""


def test_an_answer_that_cannot_be_scored_is_counted(tmp_path: Path) -> None:
    """Alone: the others of its prompt, and the other prompts, have their rewards."""
    given = reward_file(tmp_path, FAILING)
    inputs = [scoring_input(["a", "bad", "none"]), scoring_input(["abc"])]
    found = FreshReward(fresh_config(given)).score(inputs)
    assert [own.tolist() for own in found.rewards][1] == [3.0]
    assert found.rewards[0].tolist()[0] == 1.0
    assert np.isnan(found.rewards[0]).tolist() == [False, True, True]
    (raised, _), (number, _) = found.causes.most_common()
    assert "must not raise; received " in raised
    assert raised.endswith("fresh_rewards.py, line 4, in score: KeyError: 'solution'.")
    assert number == NO_NUMBER
    assert set(found.causes.values()) == {1}


def test_a_scorer_that_fails_is_no_zero_in_a_sum(tmp_path: Path, served: JudgeServer) -> None:
    """Length + 100 rating: without the rating of "It is 3", its length alone would be its reward.
    The judge is asked once for each answer, though the function fails at one of them.
    """
    served.fault = lambda question, times: "prose" if "It is 3" in question else None
    own = reward_file(tmp_path, FAILING)["scorers"]["own"]
    scorer = fresh({"helpful": judge(served, weight=100.0, max_attempts=1), "own": own})
    found = scorer.score([scoring_input(["It is 2", "It is 3"]), scoring_input(["bad: It is 4"])])
    assert found.rewards[0].tolist()[0] == 100 * rating(2) + len("It is 2")
    assert np.isnan(found.rewards[0][1])
    assert np.isnan(found.rewards[1][0])
    assert sorted(found.causes.values()) == [1, 1]
    assert served.asked.total() == 3


def test_a_comparison_that_fails_is_no_zero() -> None:
    """Of `kind: math`, whose default number is 0, unless the configuration says what it is."""
    settings = {"kind": "math", "column": "answer", "timeout_s": 1.0}
    scorer = fresh({"right": settings})
    found = scorer.score([scoring_input(["$9^{9^{9^{9}}}$"], answer="2")])
    scorer.stop()
    assert np.isnan(found.rewards[0]).tolist() == [True]
    ((cause, n),) = found.causes.items()
    assert (n, "ends within 1 s, and does not raise; received timed out" in cause) == (1, True)
    given = fresh({"right": {**settings, "on_failure": 0.0}})._scorers.scorers["right"]
    assert not isinstance(given, FreshMathScorer)


def test_missing_replaces_no_number_and_no_failure(tmp_path: Path) -> None:
    given = {**reward_file(tmp_path, FAILING), "missing": -1.0}
    found = FreshReward(fresh_config(given)).score([scoring_input(["a", "none", "bad"])])
    assert found.rewards[0].tolist()[:2] == [1.0, -1.0]
    assert np.isnan(found.rewards[0][2])
    assert found.causes.total() == 1


def test_a_reward_is_tried_on_logged_responses(tmp_path: Path) -> None:
    """Before training: a column that no group has, a function that does not exist."""
    root = answered_dataset(tmp_path / "data", 4, reward="reward")
    dataset = open_dataset(root, join=("reward",))
    prompts = read_prompts([DatasetView(dataset)])
    fresh({"right": NUMERIC}).check(prompts)
    with pytest.raises(DataError, match="has the column solution") as error:
        fresh({"right": {"kind": "exact", "column": "solution"}}).check(prompts)
    assert error.value.group == "group-00000"
    with pytest.raises(ConfigError, match="a function is given as"):
        fresh({"own": {"kind": "function", "function": "nowhere.py:f"}}).check(prompts)


# ---- configurations ----


def test_a_reward_file_or_its_content(tmp_path: Path) -> None:
    """The file of `gvpo-offline reward` as it is: its other settings change no number."""
    content = {
        "dataset": "data",
        "name": "correct",
        "workers": 4,
        "missing": 0.0,
        "scorers": {"right": NUMERIC},
    }
    path = tmp_path / "reward.yaml"
    path.write_text(yaml.safe_dump(content))
    for given in (content, str(path)):
        config = fresh_config(given)
        assert (config.scorers, config.missing) == ({"right": NUMERIC}, 0.0)


SETTINGS: dict[str, dict[str, Any]] = {
    "ratings": {"inputs": "a.csv"},
    "ranks": {"inputs": "a.csv"},
    "votes": {"inputs": "a.csv", "estimate": "win_rate"},
    "reward": {"reward": "other"},
    "transform": {"of": "other", "transform": "rank"},
    "judge_pairs": {"model": "m", "base_url": "http://localhost/v1"},
}


@pytest.mark.parametrize("kind", list(REFUSED_KINDS))
def test_kinds_that_need_what_is_stored_are_refused(kind: str) -> None:
    scorers = {"right": NUMERIC, "other": {"kind": kind, **SETTINGS[kind]}}
    with pytest.raises(ConfigError) as error:
        fresh_config({"scorers": scorers})
    text = str(error.value)
    assert f"received scorers.other, kind {kind}: {REFUSED_KINDS[kind]}" in text
    assert text.endswith("Replace the scorer, or judge by the logged responses.")


def test_every_kind_either_scores_fresh_answers_or_is_refused() -> None:
    import typing

    from gvpo_offline.rewards.build import build_fresh_scorer

    kinds = {
        typing.get_args(kind.model_fields["kind"].annotation)[0]
        for kind in typing.get_args(typing.get_args(ScorerSettings)[0])
    }
    own: dict[str, dict[str, Any]] = {
        "function": {"function": "a.py:f"},
        "verl": {"function": "a.py:f"},
        "math": {"column": "answer"},
        "exact": {"column": "answer"},
        "numeric": {"column": "answer"},
        "model": {"model_name_or_path": "m"},
        "judge": SETTINGS["judge_pairs"],
    }
    assert set(REFUSED_KINDS) | set(own) == kinds
    for kind, settings in own.items():
        config = fresh_config({"scorers": {"a": {"kind": kind, **settings}}})
        assert build_fresh_scorer(config.settings()["a"]) is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "received no scorers. See docs/howto/rewards.md"),
        ({"scorers": {}}, "received no scorers"),
        ({"scorers": {"a": NUMERIC}, "scorer": 1}, "received unknown settings: scorer"),
        ({"scorers": {"a": {"kind": "nothing"}}}, "a scorer has a kind"),
        ({"scorers": {"a": NUMERIC}, "missing": float("nan")}, "missing is a finite number"),
    ],
)
def test_what_is_no_reward_configuration(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        fresh_config(given)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "FileNotFoundError"),
        ("scorers: [", "ParserError"),
        ("- a\n", "received a list"),
        ("scorers: {a: {kind: exact}}\n", "scorers.a.exact.column"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "reward.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as error:
        fresh_config(str(path))
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
