"""`import --format`: verl, open-instruct, NeMo-RL, ms-swift and OpenRLHF, on rows in the shapes
that their code writes."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.importing import config, read_groups, write_jsonl
from support.reading_formats import fragments, refused

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.formats import format_names
from gvpo_offline.importing.formats.shared.trainer_logs import trajectory
from gvpo_offline.importing.importer import import_log
from gvpo_offline.importing.settings import Columns

PAGES = Path(__file__).parents[2] / "docs" / "howto"


def test_every_format_has_a_row_in_the_docs() -> None:
    """On one of the two pages; the two formats of tables are described elsewhere."""
    text = "".join((PAGES / name).read_text("utf-8") for name in ("formats.md", "formats-hub.md"))
    rows = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert sorted([*rows, "flat", "groups"]) == format_names()


# --- verl -----------------------------------------------------------------------------------------


def verl_rows(step: int = 3, **further: list[Any]) -> list[dict[str, Any]]:
    """What verl dumps of two prompts, twice each; `further`: what a reward function returned."""
    rows = [
        {"input": f"user\n{p} + 1\nassistant\n", "output": str(p + i), "gts": str(p + 1),
         "score": float(i == 1), "step": step}
        for p in (2, 5)
        for i in (1, 2)
    ]  # fmt: skip
    return [row | {k: v[i] for k, v in further.items()} for i, row in enumerate(rows)]


def test_verl_groups_by_step_and_input(
    tmp_path: Path, tiny_tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two steps of two prompts are four groups; that markers are gone is said once."""
    inputs = [
        write_jsonl(tmp_path / "dumps" / f"{step}.jsonl", verl_rows(step, acc=[1, 0, 1, 0]))
        for step in (3, 4)
    ]
    with caplog.at_level(logging.WARNING):
        import_log(
            config(
                inputs,
                tmp_path / "out",
                format="verl",
                columns=Columns(keep=["gts"]),
                tokenizer_name_or_path=str(tiny_tokenizer_dir),
            )
        )
    assert caplog.text.count("without special tokens") == 1
    groups = read_groups(tmp_path / "out")
    assert sorted(g.samplers for g in groups) == [("dumps@3",) * 2] * 2 + [("dumps@4",) * 2] * 2
    group = next(g for g in groups if g.prompt == "user\n5 + 1\nassistant\n")
    assert group.responses == ("6", "7")
    assert group.rewards is not None
    assert group.rewards.tolist() == [1.0, 0.0]
    assert json.loads(group.metadata or "") == {"gts": "6"}


def test_verl_uid_of_a_response_begins_with_the_groups(tmp_path: Path) -> None:
    """`<uid>_<session>_<output>` is a response's, and its first part the group's; a bare uid is a
    group's. Without the parts taken off, each response would be a group of its own."""
    uids = ["3f2a-11_0_0", "3f2a-11_1_0", "9b-7_0_0", "9b-7_1_0"]
    path = write_jsonl(tmp_path / "d" / "3.jsonl", verl_rows(uid=uids))
    found, _ = fragments(path, "verl")
    assert [f.group_id for f in found] == ["d/3/3f2a-11"] * 2 + ["d/3/9b-7"] * 2
    path = write_jsonl(tmp_path / "d" / "4.jsonl", verl_rows(uid=["a", "a", "b", "b"]))
    assert [f.group_id for f in fragments(path, "verl")[0]] == ["d/3/a"] * 2 + ["d/3/b"] * 2


def test_verl_request_ids_are_response_ids(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d" / "3.jsonl", verl_rows(request_id=["r0", "r1", "r2", "r3"]))
    assert [f.response_ids for f in fragments(path, "verl")[0]] == [["r0"], ["r1"], ["r2"], ["r3"]]


@pytest.mark.parametrize(
    ("further", "match", "row"),
    [
        ({"uid": ["a_0_0", "a_0_1", "b_0_0", "b_0_1"]}, "received output 1 of session a_0", 1),
        ({"score": [1.0, None, 0.0, 0.0]}, "in a log with rewards each response has one", 1),
        ({"score": [1.0, 0.0, "x", 0.0]}, "score is a number; received 'x'", 2),
        ({"score": [1.0, 0.0, float("nan"), 0.0]}, "each response has one", 2),
    ],
)
def test_verl_refuses(
    further: dict[str, list[Any]],
    match: str,
    row: int,
    tmp_path: Path,
    tiny_tokenizer_dir: Path,
) -> None:
    path = write_jsonl(tmp_path / "3.jsonl", verl_rows(**further))
    settings = {"tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    assert refused(path, "verl", DataError, match, tmp_path / "o", **settings).row == row


def test_a_rewards_weights_need_parts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "3.jsonl", verl_rows())
    refused(
        path, "verl", ConfigError, "no parts", tmp_path / "o", reward_weights={"score": 1.0}
    )  # fmt: skip


# --- open-instruct --------------------------------------------------------------------------------


def open_instruct_rows(step: int = 1) -> list[dict[str, Any]]:
    """Two prompts, two samples each, as `asdict(RolloutRecord)` has them."""
    return [
        {
            "step": step,
            "sample_idx": 2 * p + i,
            "prompt_idx": p,
            "prompt_tokens": [1, 30 + p],
            "response_tokens": [40 + i, 41, 2][: 3 - i],
            "reward": 10.0 * (1 - i),
            "advantage": 1.0 - 2 * i,
            "finish_reason": ["stop", "length"][i],
            "dataset": "math",
            "ground_truth": [7, 8],
            "request_info": {"num_calls": 0, "timeouts": 0, "tool_errors": "", "tool_outputs": "",
                             "tool_runtimes": 0.0, "tool_calleds": False, "tool_call_stats": [],
                             "rollout_state": {}},
            "logprobs": [-0.5, -0.25, -0.125][: 3 - i],
        }
        for p in range(2)
        for i in range(2)
    ]  # fmt: skip


METADATA = {
    "run_name": "grpo",
    "git_commit": "abc",
    "model_name": "olmo",
    "timestamp": "2026-01-01T00:00:00+00:00",
}


def test_open_instruct(tmp_path: Path) -> None:
    """Token ids as they are, no tokenizer needed; the metadata file is in the lineage."""
    inputs = [
        write_jsonl(tmp_path / "grpo_rollouts_000000.jsonl", open_instruct_rows(1)),
        write_jsonl(tmp_path / "grpo_rollouts_000001.jsonl", open_instruct_rows(2)),
    ]
    write_jsonl(tmp_path / "grpo_metadata.jsonl", [METADATA])
    result = import_log(config(inputs, tmp_path / "out", format="open_instruct"))
    groups = read_groups(tmp_path / "out")
    assert sorted(g.samplers[0] for g in groups) == ["grpo@1", "grpo@1", "grpo@2", "grpo@2"]
    group = next(g for g in groups if g.prompt_token_ids[1] == 31)
    assert group.prompt_token_ids.tolist() == [1, 31]
    assert [ids.tolist() for ids in group.response_token_ids] == [[40, 41, 2], [41, 41]]
    assert group.truncated == (False, True)
    assert group.rewards is not None
    assert group.rewards.tolist() == [10.0, 0.0]
    (step,) = result.manifest.lineage
    assert step.inputs[0] | {"sha256": ""} == {
        "path": "grpo_rollouts_000000.jsonl",
        "sha256": "",
        "rows": 4,
        "run": "grpo",
        "model_name": "olmo",
        "git_commit": "abc",
        "timestamp": METADATA["timestamp"],
    }


def test_open_instruct_prompts_decide_not_their_numbers(tmp_path: Path) -> None:
    """Where cut responses were filtered out, prompt_idx = sample // k no longer counts prompts."""
    rows = open_instruct_rows()
    for row, number in zip(rows, (0, 0, 0, 1), strict=True):
        row["prompt_idx"] = number
    found, _ = fragments(write_jsonl(tmp_path / "r_rollouts_000000.jsonl", rows), "open_instruct")
    ids = [f.group_id for f in found]
    assert ids[0] == ids[1] != ids[2] == ids[3]


def test_open_instruct_tool_output_is_not_the_policys(tmp_path: Path) -> None:
    """The log has no mask, so such responses are refused by count and name, or dropped."""
    rows = open_instruct_rows()
    for i in (1, 2):
        rows[i]["request_info"] = {**rows[i]["request_info"], "num_calls": 1, "tool_calleds": True}
    path = write_jsonl(tmp_path / "r_rollouts_000000.jsonl", rows)
    match = "received 2 that failed: row 1: it called tools.*; row 2"
    assert refused(path, "open_instruct", DataError, match, tmp_path / "o").row == 1
    found, counts = fragments(path, "open_instruct", failed_responses="drop")
    assert [f.row for f in found] == [0, 3]
    assert counts["dropped_failed_responses"] == 2


def test_open_instruct_metadata_that_is_none(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r_rollouts_000000.jsonl", open_instruct_rows())
    write_jsonl(tmp_path / "r_metadata.jsonl", [{"run_name": "r"}])
    error = refused(path, "open_instruct", DataError, "'model_name'", tmp_path / "o")
    assert (error.file or "").endswith("r_metadata.jsonl")


# --- NeMo-RL --------------------------------------------------------------------------------------


def nemo_rows(**changed: list[Any]) -> list[dict[str, Any]]:
    """A batch of two prompts, twice each, written one sample at a time: every value is a list of
    one. The environment's last word (7) and padding (0) follow the response."""
    batch: dict[str, list[Any]] = {
        "content": [["2+3", "5", "Environment: correct"]] * 4,
        "rewards": [1.0, 0.0, 0.5, 0.25],
        "input_lengths": [6, 5, 6, 6],
        "token_ids": [
            [1, 30, 40, 2, 7, 7, 0, 0],
            [1, 30, 2, 7, 7, 0, 0, 0],
            [1, 31, 40, 7, 41, 2, 0, 0],
            [1, 31, 41, 41, 41, 7, 0, 0],
        ],
        "token_loss_mask": [
            [0, 0, 1, 1, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0, 0, 0],
            [0, 0, 1, 0, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 0, 0, 0],
        ],
        "sample_loss_mask": [1.0, 1.0, 1.0, 1.0],
        "advantages": [[0.5] * 8] * 4,
        "generation_logprobs": [
            [0, 0, -0.5, -0.1, 0, 0, 0, 0],
            [0, 0, -0.5, 0, 0, 0, 0, 0],
            [0, 0, -0.5, 0, -0.5, -0.1, 0, 0],
            [0, 0, -0.5, 0, -0.1, 0, 0, 0],
        ],
        "prev_logprobs": [[0.0] * 8] * 4,
    } | changed
    return [{**{k: v[i : i + 1] for k, v in batch.items()}, "idx": i} for i in range(4)]


def test_nemo_rl(tmp_path: Path) -> None:
    """The prompt ends where the policy begins, the response where it ends."""
    path = write_jsonl(tmp_path / "exp_001" / "train_data_step12.jsonl", nemo_rows())
    import_log(config(path, tmp_path / "out", format="nemo_rl"))
    first, second = sorted(read_groups(tmp_path / "out"), key=lambda g: g.prompt_token_ids.tolist())
    assert first.prompt_token_ids.tolist() == [1, 30]
    assert [ids.tolist() for ids in first.response_token_ids] == [[40, 2], [2]]
    assert (first.loss_mask, first.samplers) == (None, ("exp_001@12",) * 2)
    assert first.rewards is not None
    assert first.rewards.tolist() == [1.0, 0.0]
    assert [ids.tolist() for ids in second.response_token_ids] == [[40, 7, 41, 2], [41, 41, 41]]
    assert second.loss_mask is not None
    assert second.loss_mask[0].tolist() == [True, False, True, True]
    assert second.loss_mask[1].tolist() == [True] * 3


def test_nemo_rl_dynamic_sampling(tmp_path: Path) -> None:
    """Row i of `rewards` is then row i of a larger batch; `filtered_rewards` are the rows' own."""
    rows = nemo_rows(rewards=[9.0] * 4, filtered_rewards=[1.0, 0.0, 0.5, 0.25])
    path = write_jsonl(tmp_path / "train_data_step1.jsonl", rows)
    assert [f.rewards for f in fragments(path, "nemo_rl")[0]] == [[1.0], [0.0], [0.5], [0.25]]


def test_nemo_rl_masked_samples_failed(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "train_data_step1.jsonl", nemo_rows(sample_loss_mask=[1.0, 0.0, 1.0, 1.0])
    )
    match = "received 1 that failed: row 1: its sample_loss_mask is 0"
    assert refused(path, "nemo_rl", DataError, match, tmp_path / "o").row == 1
    found, counts = fragments(path, "nemo_rl", failed_responses="drop")
    assert (len(found), counts["dropped_failed_responses"]) == (3, 1)


@pytest.mark.parametrize(
    ("name", "rows", "match"),
    [
        ("val_data_step1.jsonl", [{"content": [[]], "rewards": [1.0], "idx": 0}], "no token_ids"),
        ("data.jsonl", nemo_rows(), "are named train_data_step<n>.jsonl"),
        (
            "train_data_step1.jsonl",
            nemo_rows(
                token_loss_mask=[[1, 0, 1, 1, 0, 0, 0, 0]] * 4,
                generation_logprobs=[[0, 0, -0.5, -0.1, 0, 0, 0, 0]] * 4,
            ),
            "received 1 from token 0 on, but log-probs other than 0 only from token 2 on",
        ),
        (
            "train_data_step1.jsonl",
            nemo_rows(token_loss_mask=[[0] * 8] * 4),
            "a loss mask that is all 0",
        ),
        (
            "train_data_step1.jsonl",
            nemo_rows(token_loss_mask=[[0, 1]] * 4),
            "one number per token|one flag per token",
        ),
        (
            "train_data_step1.jsonl",
            [{k: v[0] if isinstance(v, list) else v for k, v in r.items()} for r in nemo_rows()],
            "a list with one entry",
        ),
    ],
)
def test_nemo_rl_refuses(name: str, rows: list[dict[str, Any]], match: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / name, rows)
    assert refused(path, "nemo_rl", DataError, match, tmp_path / "o").row == 0


@given(st.lists(st.booleans(), min_size=1, max_size=30).filter(any))
def test_a_trajectory_holds_every_token_of_the_policy(mask: list[bool]) -> None:
    """Prompt, response and what was cut off behind are the sequence; no flag is lost."""
    ids = np.arange(len(mask), dtype=np.int32)
    cut = trajectory(ids, np.array(mask))
    end = len(cut.prompt_ids) + len(cut.ids)
    assert [*cut.prompt_ids, *cut.ids] == ids[:end].tolist()
    assert not any(mask[: len(cut.prompt_ids)] + mask[end:])
    own = cut.ids if cut.mask is None else cut.ids[cut.mask]
    assert own.tolist() == [i for i, flag in enumerate(mask) if flag]


# --- ms-swift -------------------------------------------------------------------------------------


def swift_line(step: str = "1", **changed: Any) -> dict[str, Any]:
    """A batch as one line: rewards stand between completion and advantages.

    Sums 2, 0, 1, 1 and advantages (R - mean) / (std + 1e-4) of two groups; the second's rewards
    are equal.
    """
    line = {
        "step": [step] * 4,
        "prompt": ["<bos>2+3", "<bos>2+3", "<bos>1+1", "<bos>1+1"],
        "completion": ["5", "6", "2", "3"],
        "Accuracy": [1.0, 0.0, 1.0, 0.0],
        "Format": [1.0, 0.0, 0.0, 1.0],
        "advantages": [0.7071, -0.7071, 0.0, 0.0],
        "solution": ["5", "5", "2", "2"],
    }
    return line | changed


def test_ms_swift(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """`solution` is no reward. Step 2 logs step 1's batch again. The rendered prompt brings its
    <bos> along and gets no second one."""
    path = write_jsonl(
        tmp_path / "v0-run" / "completions.jsonl",
        [swift_line(), swift_line("2"), swift_line("3", completion=["5", "7", "4", "2"])],
    )
    settings = {"format": "ms_swift", "tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    result = import_log(config(path, tmp_path / "out", **settings))
    assert result.counts["dropped_repeated_responses"] == 4
    groups = read_groups(tmp_path / "out")
    assert sorted(g.samplers[0] for g in groups) == ["v0-run@1"] * 2 + ["v0-run@3"] * 2
    group = next(g for g in groups if g.responses == ("5", "6"))
    assert group.rewards is not None
    assert group.rewards.tolist() == [2.0, 0.0]
    assert group.prompt_token_ids.tolist().count(1) == 1  # <bos>
    (first, *_), _ = fragments(path, "ms_swift", reward_weights={"Format": 0.5})
    assert (first.rewards, first.components) == ([0.5], {"Format": [1.0]})


def test_ms_swift_on_other_trainers(tmp_path: Path) -> None:
    """Megatron counts `gen_step`; on Ray a line is a response."""
    line = swift_line()
    megatron = {"gen_step": [0] * 4, **{k: line[k] for k in list(line)[1:-1]}}
    path = write_jsonl(tmp_path / "m" / "completions.jsonl", [megatron])
    assert [f.samplers for f in fragments(path, "ms_swift")[0]] == [["m@0"]] * 4
    ray = [
        {"gen_step": 5, "prompt": "p", "completion": "same", "reward": 1.0},
        {"gen_step": 5, "prompt": "p", "completion": "same", "reward": 1.0},
    ]
    path = write_jsonl(tmp_path / "r" / "completions.jsonl", ray)
    found, counts = fragments(path, "ms_swift")
    assert [(f.samplers, f.rewards) for f in found] == [(["r@5"], [1.0])] * 2
    assert counts["dropped_repeated_responses"] == 0


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (swift_line(advantages=[-1.0, 1.0, 0.0, 0.0]), "Accuracy, Format were weighted"),
        (swift_line(Format=[1.0, 0.0, 0.0]), "one entry per response; received .*Format 3"),
        (swift_line(num_turns=[1, 1, 2, 1]), "the log has earlier turns in the prompt"),
        (swift_line(Accuracy=["1", 0, 0, 0]), "the reward 'Accuracy' is a number"),
        (
            {"step": ["1"], "prompt": ["p"], "completion": ["c"]},
            "other trainers .GKD. log no rewards",
        ),
        ({"prompt": ["p"], "completion": ["c"], "r": [1.0]}, "a step or gen_step"),
    ],
)
def test_ms_swift_refuses(
    line: dict[str, Any], match: str, tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    path = write_jsonl(tmp_path / "completions.jsonl", [line])
    settings = {"tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    assert refused(path, "ms_swift", DataError, match, tmp_path / "o", **settings).row == 0


# --- OpenRLHF -------------------------------------------------------------------------------------


def test_openrlhf(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """`prompts * N`: the file goes round the prompts twice, so neighbours are no group."""
    rows = [
        {"input": f"Question {p}\nAnswer:", "output": f"{p}{n}", "reward": p + 0.5 * n}
        for n in range(2)
        for p in range(3)
    ]
    path = write_jsonl(tmp_path / "out.jsonl", rows)
    settings = {"format": "openrlhf", "tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    import_log(config(path, tmp_path / "o", **settings))
    groups = {g.prompt: g for g in read_groups(tmp_path / "o")}
    assert len(groups) == 3
    group = groups["Question 1\nAnswer:"]
    assert (group.responses, group.samplers) == (("10", "11"), ("out", "out"))
    assert group.rewards is not None
    assert group.rewards.tolist() == [1.0, 1.5]


def test_openrlhf_without_rewards_and_processed(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """`--eval_task generate` has no rewards yet; a post-processor's pairs are another format."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"input": "p", "output": "o"}])
    assert fragments(path, "openrlhf")[0][0].rewards is None
    pairs = {"prompt": "p", "chosen": "a", "chosen_reward": 1, "rejected": "b"}
    path = write_jsonl(tmp_path / "b.jsonl", [pairs])
    refused(path, "openrlhf", DataError, "no input, output among", tmp_path / "o")
