"""The prompts that answers are sampled to: distinct, in stored order, with the best response."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.builders import build_dataset, make_groups
from support.sampled_answers import GROUPS, word_dataset, word_group
from transformers import AutoTokenizer

from gvpo_offline import cli
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.group import Group
from gvpo_offline.sampled_eval.prompts import fresh_input, read_prompts
from gvpo_offline.sampled_eval.settings import SampledEvalSettings, check_sampled_settings
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.stream.selecting.select import select
from gvpo_offline.stream.settings import ResponseSettings
from gvpo_offline.stream.view import DatasetView


def dataset_of(root: Path, groups: list[Group]) -> GroupDataset:
    return build_dataset(root, groups=groups, reference=False)


def test_every_distinct_prompt_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A later group of the same prompt gives its better response, and not its metadata."""
    later = word_group(7, "blue", {"three": 0.75, "one": 0.0}, "three")
    worse = word_group(8, "red green", {"three": 0.75, "one": 0.0}, "one")
    dataset = dataset_of(tmp_path, [*GROUPS, later, worse])
    prompts = read_prompts([DatasetView(dataset)])
    assert [own.text for own in prompts] == ["red green", "blue", "two two red"]
    assert [own.logged.responses for own in prompts] == [("two three",), ("three",), ("three",)]
    assert [own.best_reward for own in prompts] == [1.0, 0.75, 0.5]
    assert [own.longest for own in prompts] == [2, 3, 1]
    assert prompts[1].logged.metadata == {"answer": "two", "number": 1}
    assert prompts[1].logged.group_id == "group-00001"
    assert "2 of 5 held-out groups repeat a prompt with other metadata" in caplog.text


def test_the_same_prompts_in_every_run(tmp_path: Path) -> None:
    """Those with the smallest hashes, of several datasets and in any order of the groups."""
    groups = make_groups(20, masked=False)
    one = dataset_of(tmp_path / "one", groups)
    parts = [
        dataset_of(tmp_path / "a", groups[10:]),
        dataset_of(tmp_path / "b", groups[:10][::-1]),
    ]
    whole = read_prompts([DatasetView(one)])
    some = read_prompts([DatasetView(one)], most=5)
    assert {own.key for own in some} == set(sorted(own.key for own in whole)[:5])
    assert {own.key for own in read_prompts(map(DatasetView, parts), most=5)} == {
        own.key for own in some
    }
    assert [own.key for own in some] == [
        own.key for own in whole if own.key in {each.key for each in some}
    ]


def test_only_selected_groups_and_responses(tmp_path: Path) -> None:
    """The best response is the best of those that the run selects."""
    groups = [
        replace(group, samplers=("base", *("hot",) * (group.group_size - 1))) for group in GROUPS
    ]
    groups[1] = replace(groups[1], samplers=("base", "hot", "hot"))
    dataset = dataset_of(tmp_path, groups)
    kept = ResponseSettings(samplers=["hot"])
    view = DatasetView(dataset, select(dataset, responses=kept))
    (prompt,) = read_prompts([view])  # the others have one response of hot
    assert prompt.text == "blue"
    assert (prompt.logged.responses, prompt.best_reward) == (("two",), 0.5)
    half = DatasetView(dataset, select(dataset, where="group_id != 'group-00001'"))
    assert [own.text for own in read_prompts([half])] == ["red green", "two two red"]


def test_texts_that_are_not_stored_are_decoded(tmp_path: Path) -> None:
    """By the tokenizer that the dataset names, or by the policy's if it names none."""
    plain = [replace(group, prompt=None, responses=None) for group in GROUPS]
    model, dataset = word_dataset(tmp_path, groups=plain)
    nameless = dataset_of(tmp_path / "nameless", plain)
    policys = AutoTokenizer.from_pretrained(model)
    for prompts in (
        read_prompts([DatasetView(dataset)]),
        read_prompts([DatasetView(nameless)], tokenizer=policys),
    ):
        assert [own.text for own in prompts] == ["red green", "blue", "two two red"]
        assert prompts[0].logged.responses == ("two three",)
    with pytest.raises(DataError, match="names no tokenizer"):
        read_prompts([DatasetView(nameless)])


def test_what_scorers_see_of_fresh_answers(tmp_path: Path) -> None:
    """Prompt, messages and metadata of the group; texts and ids of the answers."""
    chat = [{"role": "user", "content": "blue"}]
    group = replace(GROUPS[1], prompt=None, messages=json.dumps(chat))
    (prompt,) = read_prompts([DatasetView(dataset_of(tmp_path, [group]))])
    ids = [np.array([3], np.int32), np.array([4, 1], np.int32)]
    given = fresh_input(prompt, ["red", "green"], ids)
    assert (given.prompt, given.messages) == (None, chat)
    assert given.responses == ("red", "green")
    assert given.response_token_ids is not None
    assert [own.tolist() for own in given.response_token_ids] == [[3], [4, 1]]
    assert given.metadata["answer"] == "two"
    assert given.turns(1) == [{"role": "assistant", "content": "green"}]
    assert prompt.text == "blue"


def test_no_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="received no held-out groups"):
        read_prompts([])


# ---- settings ----

REWARD = {"scorers": {"right": {"kind": "exact", "column": "answer"}}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_samples": -1}, "eval_samples is at least 0; received -1"),
        ({"eval_samples": 4}, "received eval_samples: 4 without eval_reward. eval_reward"),
        ({"eval_reward": REWARD}, "received eval_reward without eval_samples. eval_samples: 8"),
        ({"eval_samples": 2, "eval_reward": "no.yaml"}, "no.yaml: eval_reward is the path"),
        (
            {"eval_samples": 2, "eval_reward": REWARD, "eval_temperature": 0.0},
            "at temperature 0 all answers to a prompt are the same",
        ),
        ({"eval_temperature": float("inf")}, "eval_temperature is a number"),
        ({"eval_temperature": -0.5}, "eval_temperature is a number that is not negative"),
        ({"eval_prompts": 0}, "eval_prompts is at least 1; received 0"),
        ({"eval_max_new_tokens": 0}, "eval_max_new_tokens is at least 1"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_sampled_settings(SampledEvalSettings(**settings))
    assert message in str(error.value).replace("Set ", "").replace("set ", "")


def test_settings_that_are_right() -> None:
    check_sampled_settings(SampledEvalSettings())
    check_sampled_settings(SampledEvalSettings(eval_samples=4, eval_reward=REWARD))
    check_sampled_settings(
        SampledEvalSettings(eval_samples=1, eval_reward=REWARD, eval_temperature=0)
    )


def test_the_reward_may_be_in_the_file_of_the_run(tmp_path: Path) -> None:
    """As the path of a file, or as its content; texts within it are not read as YAML again."""
    scorers = {"a": {"kind": "exact", "column": "answer", "pattern": "#### (.*)"}}
    path = tmp_path / "train.yaml"
    run = {"model_name_or_path": "model", "dataset": "data", "eval_samples": 4}
    for given in ({"scorers": scorers, "missing": 0.5}, "reward.yaml"):
        path.write_text(yaml.safe_dump({**run, "eval_reward": given}))
        values = cli._parse("train", cli.COMMANDS["train"], ["--config", str(path)])
        assert values["eval_reward"] == given
        assert values["eval_samples"] == 4
