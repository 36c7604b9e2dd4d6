"""Values as logs hold them: what becomes of them in the dataset, or why they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.importing import config, read_groups, write_jsonl
from support.reading_formats import refused

from gvpo_offline import values
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.group import Group
from gvpo_offline.importing.importer import import_log
from gvpo_offline.importing.padding import Padding
from gvpo_offline.importing.settings import Columns
from gvpo_offline.json_text import parsed_messages
from gvpo_offline.settings import load_yaml

NAN = float("nan")
END, PAD = 2, 0  # of the tiny tokenizer
Rows = list[dict[str, Any]]
Import = Callable[..., tuple[list[Group], dict[str, int]]]


@pytest.fixture
def imported(tmp_path: Path, tiny_tokenizer_dir: Path) -> Import:
    """Imports rows, as JSON lines or a given file, with the tiny tokenizer."""

    def run(rows: Rows | Path, **settings: Any) -> tuple[list[Group], dict[str, int]]:
        path = rows if isinstance(rows, Path) else write_jsonl(tmp_path / "log.jsonl", rows)
        out = tmp_path / "out"
        settings = {"tokenizer_name_or_path": str(tiny_tokenizer_dir), **settings}
        result = import_log(config(path, out, **settings))
        return read_groups(out), result.counts

    return run


def answers(*texts: str, **columns: list[Any]) -> Rows:
    """One row per response to one prompt; the rewards are 0, 1, 2 and so on."""
    return [
        {"prompt": "2 + 3", "response": text, "reward": float(i)}
        | {name: given[i] for name, given in columns.items()}
        for i, text in enumerate(texts)
    ]


def ids_rows(*responses: list[int], **columns: list[Any]) -> Rows:
    """One row of token ids per response to one prompt."""
    return [
        {"p": [1, 7], "r": ids, "reward": float(i)}
        | {name: given[i] for name, given in columns.items()}
        for i, ids in enumerate(responses)
    ]


IDS = {"prompt": None, "response": None, "prompt_token_ids": "p", "response_token_ids": "r"}


# ---- how responses ended ----


def test_endings_of_a_flat_log(imported: Import) -> None:
    """Only a response that the model ended gets its end token."""
    reasons = ["STOP", "MAX_TOKENS", None, "stop_sequence", "model_length"]
    (group,), counts = imported(
        answers("a", "b", "c", "d", "e", why=reasons), columns=Columns(truncated="why")
    )
    assert group.responses == ("a", "b", "c", "d", "e")
    assert group.truncated == (False, True, False, False, True)
    ended = [ids[-1] == END for ids in group.response_token_ids]
    assert ended == [True, False, True, False, False]
    assert counts["truncated_responses"] == 2


def test_stop_reasons_of_a_flat_log(imported: Import) -> None:
    """vLLM's: a stop token's id, a stop string, null. The log's finish reason goes before it."""
    rows = answers(
        "a", "b", "c", "d", at=[2, "\n", None, "\n"], why=["stop", "stop", "stop", "length"]
    )
    (group,), _ = imported(rows, columns=Columns(truncated="why", stop_reason="at"))
    assert [ids[-1] == END for ids in group.response_token_ids] == [True, False, True, False]
    assert group.truncated == (False, False, False, True)


def test_a_stop_string_that_is_the_end_token(imported: Import) -> None:
    """A server that stops at the text of the end token does not return it: the model wrote it."""
    rows = answers("a", "b", at=["<eos>", "\n"])
    (group,), _ = imported(rows, columns=Columns(stop_reason="at"))
    assert [ids[-1] == END for ids in group.response_token_ids] == [True, False]


def test_a_stop_string_before_the_first_token(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """There is no token to keep, also where empty responses are kept as their end token."""
    path = write_jsonl(tmp_path / "log.jsonl", answers("a", "", at=[None, "\n"]))
    refused(
        path,
        "flat",
        DataError,
        "received '', ended by a stop string",
        tmp_path / "never",
        tokenizer_name_or_path=str(tiny_tokenizer_dir),
        columns=Columns(stop_reason="at"),
        empty_responses="keep",
    )


def test_a_row_with_a_group_and_anthropics_stop_reasons(imported: Import) -> None:
    row = {
        "prompt": "2 + 3",
        "response": ["a", "b", "c"],
        "reward": [1, 0, 2],
        "stop_reason": ["end_turn", "max_tokens", "stop_sequence"],
    }
    (group,), _ = imported([row], columns=Columns(stop_reason="stop_reason"))
    assert group.truncated == (False, True, False)
    assert [ids[-1] == END for ids in group.response_token_ids] == [True, False, False]


def test_failed_responses_of_a_flat_log(
    imported: Import, tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    rows = answers("a", "b", "c", "d", why=["stop", "content_filter", "length", "abort"])
    path = write_jsonl(tmp_path / "log.jsonl", rows)
    columns = {"columns": Columns(truncated="why")}
    refused(
        path,
        "flat",
        DataError,
        r"row 1: the log has no failed responses; received 2 that failed: row 1: the finish "
        r"reason 'content_filter'; row 3: the finish reason 'abort'",
        tmp_path / "never",
        tokenizer_name_or_path=str(tiny_tokenizer_dir),
        **columns,
    )
    (group,), counts = imported(rows, failed_responses="drop", **columns)
    assert group.responses == ("a", "c")
    assert group.rewards is not None
    assert group.rewards.tolist() == [0, 2]
    assert counts["dropped_failed_responses"] == 2


def test_failed_responses_of_a_row_with_a_group(imported: Import) -> None:
    """Every list of the row loses the same entries; a group that failed whole is left out."""
    rows: Rows = [
        {"prompt": p, "response": ["a", "b", "c"], "reward": [1, 2, 3], "why": why, "who": who}
        for p, why, who in (
            ("x", ["stop", "error", "length"], ["s", "t", "u"]),
            ("y", ["SAFETY"] * 3, ["s", "t", "u"]),
        )
    ]
    (group,), counts = imported(
        rows, failed_responses="drop", columns=Columns(truncated="why", sampler="who")
    )
    assert (group.responses, group.samplers) == (("a", "c"), ("s", "u"))
    assert group.rewards is not None
    assert group.rewards.tolist() == [1, 3]
    assert counts["dropped_failed_responses"] == 4


def test_openr1_math_counts_failed_generations(imported: Import) -> None:
    row = {
        "problem": "2 + 3?",
        "generations": ["5", "6", "7"],
        "correctness_math_verify": [True, False, False],
        "finish_reasons": ["stop", "length", "abort"],
    }
    (group,), counts = imported([row], format="openr1_math", failed_responses="drop")
    assert (group.responses, group.truncated) == (("5", "6"), (False, True))
    assert counts["dropped_failed_responses"] == 1


def test_open_instruct_endings(tmp_path: Path) -> None:
    rows = [
        {
            "step": 1,
            "prompt_tokens": [1, 7],
            "response_tokens": [20 + i, END],
            "reward": i,
            "finish_reason": reason,
        }
        for i, reason in enumerate(["stop", "max_tokens", "error"])
    ]
    path = write_jsonl(tmp_path / "run_rollouts_000000.jsonl", rows)
    out = tmp_path / "out"
    result = import_log(config(path, out, format="open_instruct", failed_responses="drop"))
    (group,) = read_groups(out)
    assert group.truncated == (False, True)
    assert result.counts["dropped_failed_responses"] == 1


def test_nemo_gym_and_prime_rl_endings(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """A filter is no cut; the last call of a trace says how it ended."""
    item = {"type": "message", "content": [{"type": "output_text", "text": "5"}]}
    gym: Rows = [
        {
            "responses_create_params": {"input": "2 + 3?"},
            "response": {"output": [item], **ended},
            "reward": 1,
            "_ng_rollout_index": i,
        }
        for i, ended in enumerate(
            [
                {"status": "completed"},
                {"incomplete_details": {"reason": "max_output_tokens"}},
                {"incomplete_details": {"reason": "content_filter"}},
            ]
        )
    ]
    nodes = [
        {"message": {"role": "user", "content": "2 + 3?"}, "parent": None},
        {"message": {"role": "assistant", "content": "5"}, "parent": 0, "sampled": True},
    ]
    prime: Rows = [
        {
            "id": str(i),
            "ok": True,
            "traces": [
                {
                    "id": f"t{i}",
                    "ok": True,
                    "nodes": nodes,
                    "rewards": {"r": {"score": 1, "weight": 1}},
                    "calls": [{"finish_reason": reason}],
                }
            ],
        }
        for i, reason in enumerate(["stop", "MAX_TOKENS", "abort"])
    ]
    for name, rows in (("nemo_gym", gym), ("prime_rl", prime)):
        path = write_jsonl(tmp_path / name / "log.jsonl", rows)
        settings = {"format": name, "tokenizer_name_or_path": str(tiny_tokenizer_dir)}
        with pytest.raises(DataError, match="received 1 that failed: row 2"):
            import_log(config(path, tmp_path / "never", **settings))
        out = tmp_path / f"{name}-out"
        import_log(config(path, out, failed_responses="drop", **settings))
        (group,) = read_groups(out)
        assert group.truncated == (False, True)


def test_batch_results_that_a_stop_string_ended(imported: Import, tmp_path: Path) -> None:
    """vLLM's batch results: the same text with and without the end token."""
    request = {"messages": [{"role": "user", "content": "2 + 3?"}]}
    path = write_jsonl(
        tmp_path / "requests.jsonl", [{"custom_id": key, "body": request} for key in "abc"]
    )
    ends: list[dict[str, Any]] = [
        {"finish_reason": "stop", "stop_reason": None},
        {"finish_reason": "stop", "stop_reason": "\n"},
        {"finish_reason": "model_length"},
    ]
    results = [
        {
            "custom_id": key,
            "response": {
                "status_code": 200,
                "body": {"choices": [{"message": {"content": "5"}, **end}]},
            },
        }
        for key, end in zip("abc", ends, strict=True)
    ]
    (group,), _ = imported(results, format="openai_batch", requests=str(path))
    assert group.response_ids == ("a", "b", "c")
    assert [ids[-1] == END for ids in group.response_token_ids] == [True, False, False]
    assert group.truncated == (False, False, True)


# ---- padding behind the end token ----


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        ([5, END], 2),
        ([5, END, PAD, PAD], 2),
        ([5, END, PAD], 2),
        ([5, END, END, END], 2),
        ([5, PAD, END], 3),
        ([5, END, 6, END, PAD], 4),  # two turns
        ([5, END, 6], 3),
        ([5, END, 6, 6], 4),  # neither the end token nor the padding token
        ([5, END, PAD, 6], 4),
        ([5, PAD, PAD], 3),  # no end token: left as logged
        ([PAD, PAD], 2),
        ([END], 1),
        ([END, END], 1),
        ([], 0),
    ],
)
def test_padding(ids: list[int], kept: int) -> None:
    assert Padding({END}, PAD).unpadded_length(np.array(ids, np.int32)) == kept


def test_padding_with_several_end_tokens_and_without_a_padding_token() -> None:
    def length(padding: Padding, *ids: int) -> int:
        return padding.unpadded_length(np.array(ids, np.int32))

    # The padding token is an end token too, as for Qwen's base models.
    both = Padding({END, PAD}, PAD)
    assert (length(both, 5, END, PAD, PAD), length(both, 5, PAD, PAD)) == (2, 2)
    assert length(both, 5, PAD) == 2
    bare = Padding({END}, None)
    assert (length(bare, 5, END, PAD, PAD), length(bare, 5, END, END)) == (4, 2)
    # Another end token behind an end token is no padding: <end_of_turn><eos>.
    assert length(Padding({END, 3}, PAD), 5, 3, END) == 3
    same = Padding({END}, END)
    assert (length(same, 5, END, END), length(same, 5, END)) == (2, 2)


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(0, 4))
def test_padding_removes_what_was_added_and_no_more(ids: list[int], n: int) -> None:
    """Of a response that ends with its end token, any number of padding tokens goes away; of any
    response, nothing but padding or end tokens behind an end token does.
    """
    padding = Padding({END}, PAD)
    bare = [*[i for i in ids if i not in (END, PAD)], END]
    assert padding.unpadded_length(np.array([*bare, *[PAD] * n], np.int32)) == len(bare)
    kept = padding.unpadded_length(np.array(ids, np.int32))
    removed = ids[kept:]
    assert not removed or (ids[kept - 1] == END and set(removed) in ({PAD}, {END}))


def test_padded_token_ids(imported: Import) -> None:
    """Masks are cut with the ids. A log-prob that counts padding is of other tokens."""
    rows = ids_rows(
        [5, END, PAD, PAD],
        [6, 7, END, END],
        [8, 9, 10, PAD],
        m=[[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
        lp=[-1.0, -2.0, -3.0],
    )
    columns = Columns(**IDS, loss_mask="m", sampler_logprob="lp")
    (group,), counts = imported(rows, columns=columns)
    assert [ids.tolist() for ids in group.response_token_ids] == [
        [5, END],
        [6, 7, END],
        [8, 9, 10, PAD],
    ]
    assert group.loss_mask is not None
    assert [mask.tolist() for mask in group.loss_mask] == [[True] * 2, [True] * 3, [True] * 4]
    assert group.sampler_seq_logprobs is not None
    assert group.sampler_seq_logprobs.tolist() == [-1, -2, -3]
    assert (counts["unpadded_responses"], counts["responses_that_end_in_padding"]) == (2, 1)


def test_a_logprob_that_counts_padding_is_not_taken_over(imported: Import) -> None:
    rows = ids_rows([5, END, PAD], [6, END], lp=[-1.0, -2.0])
    (group,), _ = imported(rows, columns=Columns(**IDS, sampler_logprob="lp"))
    assert group.sampler_seq_logprobs is None


def test_without_a_tokenizer_ids_stay(imported: Import) -> None:
    rows = ids_rows([5, END, PAD], [6, END])
    (group,), _ = imported(rows, columns=Columns(**IDS), tokenizer_name_or_path=None)
    assert [len(ids) for ids in group.response_token_ids] == [3, 2]


# ---- messages as JSON text ----

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "[1]"}]


@pytest.mark.parametrize(
    "text",
    [
        "hello", "", "[", "[]", "[1, 2]", "[INST] hi [/INST]", '[{"a": 1}]', '["user"]',
        '[{"role": "user"}]', '[{"role": "wizard", "content": "x"}]', '{"role": "user"}',
        '[{"role": ["user"], "content": "x"}, 3]', "[" * 5000,
    ],
)  # fmt: skip
def test_a_text_that_is_no_list_of_messages_stays(text: str) -> None:
    assert parsed_messages(text) is text


def test_messages_as_json_text() -> None:
    assert parsed_messages(json.dumps(CHAT)) == CHAT
    assert parsed_messages("\n " + json.dumps(CHAT, indent=2)) == CHAT
    calls = [{"role": "assistant", "tool_calls": []}]
    assert parsed_messages(json.dumps(calls)) == calls
    for value in (CHAT, None, 3, {"role": "user", "content": "x"}):
        assert parsed_messages(value) is value
    # A response that is a list of messages of the user is what the model wrote.
    text = json.dumps(CHAT)
    assert parsed_messages(text, first=("assistant",)) is text


# ---- numbers ----


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (1, 1.0), (True, 1.0), (0.25, 0.25), (Decimal("0.25"), 0.25), (np.float32(0.5), 0.5),
        (np.int64(3), 3.0), (None, None), (NAN, None), (np.float64(NAN), None),
        (Decimal("NaN"), None),
    ],
)  # fmt: skip
def test_numbers(value: Any, number: float | None) -> None:
    assert values.number(value) == number
    assert values.rating(value) == number


def test_decimals_of_parquet(imported: Import, tmp_path: Path) -> None:
    """In rewards, in lists of rewards, in ids and in metadata."""
    exact = pa.decimal128(6, 3)
    table = pa.table(
        {
            "prompt": ["2 + 3"],
            "response": [["a", "b", "c"]],
            "reward": pa.array([[Decimal("0.125"), Decimal("-2"), Decimal(1)]], pa.list_(exact)),
            "level": pa.array([Decimal("0.5")], exact),
            "whole": pa.array([Decimal(3)], exact),
            "group": pa.array([Decimal(17)], pa.decimal128(6, 0)),
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    columns = Columns(keep=["level", "whole"], group_id="group")
    (group,), _ = imported(tmp_path / "log.parquet", columns=columns)
    assert group.rewards is not None
    assert group.rewards.tolist() == [0.125, -2, 1]
    assert group.group_id == "17"
    assert json.loads(group.metadata or "") == {"level": 0.5, "whole": 3}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_reward_that_is_nan_is_missing(
    suffix: str, imported: Import, tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    rows = answers("a", "b", "c")
    rows[1]["reward"] = NAN
    path = tmp_path / f"rewards.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    refused(
        path,
        "flat",
        DataError,
        "row 1: in a log with rewards each response has one; received none for response 0. .*"
        "null and NaN are no reward",
        tmp_path / "never",
        tokenizer_name_or_path=str(tiny_tokenizer_dir),
    )
    (group,), counts = imported(path, missing_rewards="drop")
    assert group.responses == ("a", "c")
    assert counts["dropped_unrewarded_responses"] == 1


def test_nan_in_the_groups_format(imported: Import) -> None:
    row = {
        "group_id": "g",
        "prompt_token_ids": [1, 7],
        "response_token_ids": [[5, END], [6, END], [7, END]],
        "rewards": [1.0, NAN, 0.0],
    }
    (group,), _ = imported([row], format="groups", missing_rewards="drop")
    assert group.rewards is not None
    assert group.rewards.tolist() == [1, 0]


# ---- labels ----

MAP = load_yaml("{correct: 1, yes: 1, no: 0, true: 0.5, false: -1}")


def test_labels_become_numbers(imported: Import) -> None:
    """YAML reads true and false as flags; numbers stay as they are."""
    rows = answers("a", "b", "c", "d", "e", "f")
    for row, value in zip(rows, ["correct", "no", True, False, 0.75, "yes"], strict=True):
        row["reward"] = value
    (group,), _ = imported(rows, reward_map=MAP)
    assert group.rewards is not None
    assert group.rewards.tolist() == [1, 0, 0.5, -1, 0.75, 1]


@pytest.mark.parametrize(
    ("value", "settings", "match"),
    [
        ("Correct", {"reward_map": MAP}, r"'Correct', and reward_map \{correct: 1, yes: 1, no"),
        ("0.5", {"reward_map": MAP}, "a label is one of reward_map"),
        (True, {"reward_map": {"false": 0}}, r"received True, and reward_map \{false: 0\}"),
        ("correct", {}, "a reward is a number; received 'correct'. .*set reward_map"),
        ("0.5", {}, "or cast_rewards: true"),
        ("half", {"cast_rewards": True}, "is a number, or N/A; received 'half'"),
        ("half", {"cast_rewards": True, "reward_map": MAP}, "received 'half', and reward_map"),
    ],
)
def test_labels_that_are_refused(
    value: Any, settings: dict[str, Any], match: str, tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    rows = [*answers("a"), {**answers("b")[0], "reward": value}]
    path = write_jsonl(tmp_path / "log.jsonl", rows)
    settings["tokenizer_name_or_path"] = str(tiny_tokenizer_dir)
    error = refused(path, "flat", DataError, match, tmp_path / "never", **settings)
    assert error.row == 1


@pytest.mark.parametrize("given", [{1: 1.0}, {"a": NAN}, {"a": "b"}, {None: 0.0}])
def test_maps_that_are_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="reward_map has"):
        config("log.jsonl", Path("never-written"), reward_map=given)


def test_numbers_that_are_text_are_cast_when_asked(imported: Import) -> None:
    rows = answers("a", "b", "c", "d", "e")
    for row, value in zip(rows, ["0.5", " 1e-2", "", "yes", "NaN"], strict=True):
        row["reward"] = value
    (group,), _ = imported(rows, cast_rewards=True, reward_map={"yes": 2}, missing_rewards="drop")
    assert group.responses == ("a", "b", "d")
    assert group.rewards is not None
    assert group.rewards.tolist() == [0.5, 0.01, 2]


def test_labels_in_components(imported: Import, tmp_path: Path) -> None:
    """ms-swift: a column of labels beside one of numbers; 1 * 0.5 + 1 = 1.5 and 0.5 * 0.5 + 0."""
    path = write_jsonl(
        tmp_path / "run" / "completions.jsonl",
        [
            {
                "step": [1, 1],
                "prompt": ["q", "q"],
                "completion": ["a", "b"],
                "Length": [1.0, 0.5],
                "Judge": ["pass", "fail"],
                "advantages": [1.0, -1.0],
            }
        ],
    )
    (group,), _ = imported(
        path,
        format="ms_swift",
        reward_map={"pass": 1, "fail": 0},
        reward_weights={"Length": 0.5, "Judge": 1.0},
    )
    assert group.rewards is not None
    assert group.rewards.tolist() == [1.5, 0.25]


def test_labels_in_the_log_of_trl(imported: Import, tmp_path: Path) -> None:
    """A column of text is a reward where reward_weights names it: 2 * 1 + 0.5 and 2 * 0 + 0.25."""
    table = pa.table(
        {
            "step": [1, 1],
            "prompt": ["q", "q"],
            "completion": ["a", "b"],
            "length": [0.5, 0.25],
            "verdict": ["pass", "fail"],
            "advantage": [1.0, -1.0],
        }
    )
    path = tmp_path / "run" / "completions" / "completions_00001.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(table, path)
    (group,), _ = imported(
        path,
        format="trl",
        reward_map={"pass": 1, "fail": 0},
        reward_weights={"length": 1.0, "verdict": 2.0},
    )
    assert group.rewards is not None
    assert group.rewards.tolist() == [2.5, 0.25]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("unpaired", {"prompt": "q", "completion": "a", "label": "good"}),
        ("openrlhf", {"input": "q", "output": "a", "reward": "good"}),
        ("verl", {"input": "q", "output": "a", "score": "good", "step": 1}),
        (
            "synthetic1",
            {
                "problem_id": 1,
                "response_id": 1,
                "prompt": "q",
                "llm_response": "a",
                "score": "good",
            },
        ),
        (
            "preference",
            {
                "prompt": "q",
                "chosen": "a",
                "rejected": "b",
                "score_chosen": "good",
                "score_rejected": "good",
            },
        ),
    ],
)
def test_labels_in_other_formats(name: str, row: dict[str, Any], imported: Import) -> None:
    rows = [row, {**row, "response_id": 2}] if name == "synthetic1" else [row, row]
    (group,), _ = imported(rows, format=name, reward_map={"good": 1})
    assert group.rewards is not None
    assert set(group.rewards.tolist()) == {1.0}


@pytest.mark.parametrize("settings", [{"reward_map": {"a": 1}}, {"cast_rewards": True}])
def test_data_sets_that_define_their_scores_take_no_labels(settings: dict[str, Any]) -> None:
    made = config("log.jsonl", Path("never-written"), format="helpsteer2", **settings)
    with pytest.raises(ConfigError, match="with format: helpsteer2"):
        import_log(made)


# ---- pictures, films, sounds ----


@pytest.mark.parametrize("name", ["images", "image", "videos", "audios"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_media_beside_a_text_are_refused(
    name: str, suffix: str, tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    rows = answers("a", "b", **{name: [None, ["x.png"]]})
    path = tmp_path / f"log.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    error = refused(
        path,
        "flat",
        DataError,
        f"received a value in the column '{name}'",
        tmp_path / "never",
        tokenizer_name_or_path=str(tiny_tokenizer_dir),
    )
    assert error.row == 1


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}),
        ("verl", {"input": "q", "output": "a", "score": 1, "step": 1}),
        ("groups", {"prompt_token_ids": [1], "response_token_ids": [[2], [3]]}),
    ],
)
def test_media_are_refused_in_every_kind_of_format(
    format: str, row: dict[str, Any], tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    path = write_jsonl(tmp_path / "log.jsonl", [{**row, "images": ["x.png"]}])
    refused(
        path,
        format,
        DataError,
        "column 'images'",
        tmp_path / "never",
        tokenizer_name_or_path=str(tiny_tokenizer_dir),
    )


def test_empty_media_are_no_media(imported: Import) -> None:
    """As LLaMA-Factory writes text rows of a log that mixes both."""
    rows = answers("a", "b", images=[[], None], videos=["", [None]])
    (group,), _ = imported(rows)
    assert group.responses == ("a", "b")
