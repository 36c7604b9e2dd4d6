"""`import --format lm_eval`: samples files of lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.importing import config, read_groups, write_jsonl
from support.reading_formats import fragments

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.importer import import_log


def sample(doc: int, response: Any, score: Any = 1.0, **changed: Any) -> dict[str, Any]:
    """A row with the fields of EleutherAI/lm-evaluation-harness, commit 35c718c,
    african_nlp_benchmarks/samples_masakhaner_luo_prompt_1_2026-01-16T16-02-26.648276.jsonl, row 0;
    its metric there is a pair of texts."""
    kwargs = {"do_sample": False, "until": ["</s>", "<|im_end|>"]}
    return {
        "doc_id": doc,
        "doc": {"id": str(doc), "text": f"{doc} + 1", "target": str(doc + 1)},
        "target": str(doc + 1),
        "arguments": {"gen_args_0": {"arg_0": f"What is {doc} + 1?", "arg_1": kwargs}},
        "resps": [[response] if isinstance(response, str) else response],
        "filtered_resps": ["2"],
        "filter": "flexible-extract",
        "metrics": ["exact_match"],
        "doc_hash": "10658a", "prompt_hash": "4db767", "target_hash": "0c712b",
        "exact_match": score,
    } | changed  # fmt: skip


def test_a_group_is_a_prompt_in_the_files_of_several_models(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    """The model is named by the results file of the same date, else by the folder."""
    date = "2026-01-16T16-02-26.648276"
    a, b = tmp_path / "org__small", tmp_path / "org__large"
    first = write_jsonl(a / f"samples_add_{date}.jsonl", [sample(d, " 1", 0.0) for d in (0, 1)])
    (a / f"results_{date}.json").write_text(json.dumps({"model_name": "org/small-v2"}))
    second = write_jsonl(b / f"samples_add_{date}.jsonl", [sample(d, " 2") for d in (1, 0)])
    settings = {"format": "lm_eval", "tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    result = import_log(config([first, second], tmp_path / "out", **settings))
    inputs = result.manifest.lineage[-1].inputs
    assert [entry["model"] for entry in inputs] == ["org/small-v2", "org/large"]
    groups = sorted(read_groups(tmp_path / "out"), key=lambda group: group.prompt or "")
    assert [group.prompt for group in groups] == ["What is 0 + 1?", "What is 1 + 1?"]
    for group in groups:
        assert group.responses == (" 1", " 2")
        assert group.samplers == ("org/small-v2", "org/large")
        assert group.rewards is not None
        assert group.rewards.tolist() == [0.0, 1.0]


def filters(*scores: tuple[str, float]) -> list[dict[str, Any]]:
    """The rows of one document, as the harness writes them: one for each filter."""
    return [sample(0, "2", score, filter=name) for name, score in scores]


def test_one_filter_counts(tmp_path: Path) -> None:
    rows = filters(("strict-match", 0.0), ("flexible-extract", 1.0))
    path = write_jsonl(tmp_path / "samples_add.jsonl", rows)
    with pytest.raises(DataError, match="of one filter") as caught:
        fragments(path, "lm_eval")
    assert caught.value.row == 1
    assert "exact_match,strict-match; exact_match,flexible-extract" in str(caught.value)
    weights = {"exact_match,flexible-extract": 1.0}
    (found,), counts = fragments(path, "lm_eval", reward_weights=weights)
    assert (found.responses, found.rewards) == (["2"], [1.0])
    assert counts["dropped_filter_responses"] == 1


def test_repeats_have_no_reward_of_their_own(tmp_path: Path) -> None:
    """A metric of three repeats (here a majority vote) is not the reward of one of them."""
    rows = [sample(0, ["1", "2", "2"], 1.0, filter=name) for name in ("maj@3", "first")]
    path = write_jsonl(tmp_path / "samples_add.jsonl", rows)
    (found,), counts = fragments(path, "lm_eval")
    assert (found.responses, found.rewards) == (["1", "2", "2"], None)
    assert counts["dropped_filter_responses"] == 3
    with pytest.raises(DataError, match="3 responses with one value of exact_match"):
        fragments(path, "lm_eval", reward_weights={"exact_match,first": 1.0})


def test_messages_and_older_rows(tmp_path: Path) -> None:
    """Chat models get a tuple of one text, the JSON of messages; older logs hold lists of
    arguments and do not list their metrics."""
    chat = [{"role": "user", "content": "Hi"}]
    arguments = {"gen_args_0": {"arg_0": [json.dumps(chat)], "arg_1": {"until": ["Q:"]}}}
    old = sample(0, "2", arguments=[["What is 0 + 1?", {"until": ["Q:"]}]])
    del old["metrics"], old["filter"]
    path = write_jsonl(tmp_path / "a.jsonl", [sample(0, "2", arguments=arguments)])
    (found,), _ = fragments([path], "lm_eval")
    assert (found.prompt, found.messages) == (None, json.dumps(chat))
    (found,), _ = fragments([write_jsonl(tmp_path / "b.jsonl", [old])], "lm_eval")
    assert (found.prompt, found.rewards, found.samplers) == ("What is 0 + 1?", [1.0], [None])


def test_several_metrics(tmp_path: Path) -> None:
    row = sample(0, "2", 1.0, metrics=["exact_match", "bleu"], bleu=0.25)
    path = write_jsonl(tmp_path / "samples.jsonl", [row])
    match = "has one metric, which is the reward; received 2: exact_match, bleu"
    with pytest.raises(DataError, match=match):
        fragments(path, "lm_eval")
    (found,), _ = fragments(path, "lm_eval", reward_weights={"exact_match": 1.0, "bleu": 2.0})
    assert found.rewards == [1.0 + 2.0 * 0.25]
    assert found.components == {"exact_match": [1.0], "bleu": [0.25]}


PICTURE = {"gen_args_0": {"arg_0": "<image>?", "arg_1": {}, "arg_2": {"visual": ["PIL"]}}}


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (sample(0, "2", ["DATE: x", [""]]), "the metric 'exact_match' is a number"),
        (sample(0, "2", "yes"), "the metric 'exact_match' is a number.*'yes'"),
        (sample(0, "2", resps=[[["-1.5", "False"]], [["-0.5", "True"]]]), "2 requests"),
        (sample(0, "2", resps=[[["-1.5", "False"]]]), "log-likelihoods of given texts"),
        (sample(0, "2", arguments=PICTURE), "a request with visual"),
        (sample(0, "2", arguments={}), "arg_0 is the prompt"),
        (sample(0, "2", arguments={"gen_args_0": {"arg_0": 3}}), "arg_0 is the prompt"),
        ({"doc_id": 0}, "no arguments, resps among"),
    ],
)
def test_refuses(row: dict[str, Any], match: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "samples.jsonl", [row])
    with pytest.raises(DataError, match=match) as caught:
        fragments(path, "lm_eval")
    assert caught.value.row == 0


def test_refuses_names_that_the_log_lacks(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "samples.jsonl", [sample(0, "2")])
    with pytest.raises(ConfigError, match="accuracy; the log has exact_match"):
        fragments(path, "lm_eval", reward_weights={"accuracy": 1.0})
    with pytest.raises(DataError, match="the file has exact_match,flexible-extract"):
        fragments(path, "lm_eval", reward_weights={"exact_match,strict": 1.0})
    with pytest.raises(ConfigError, match="are of one filter"):
        fragments(path, "lm_eval", reward_weights={"a,strict": 1.0, "a,loose": 1.0})
