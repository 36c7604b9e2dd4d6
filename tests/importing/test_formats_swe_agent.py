"""`import --format swe_agent`: trajectories of SWE-agent and mini-SWE-agent.

The shapes are those of files in the repositories SWE-agent/SWE-agent at
3ea751c087f32b16e039a2233dd6eefecef325d5 and SWE-agent/mini-swe-agent at
9c0e0e7784f6a45a9ab1c952639055e592577f58 (named in each test); texts are made up.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from support.chat_templates import chat_tokenizer
from support.importing import config, read_groups, write_jsonl
from support.reading_formats import fragments, refused

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.importer import import_log

Messages = list[dict[str, Any]]

SYSTEM = {"message_type": "system_prompt", "role": "system", "content": "Fix.", "agent": "main"}
ISSUE = {"message_type": "observation", "role": "user", "content": "Issue 1", "agent": "main"}


def acted(text: str, command: str) -> dict[str, Any]:
    call = {"id": "c", "type": "function"}
    return {
        "message_type": "action", "role": "assistant", "content": text, "thought": text,
        "action": command, "agent": "main",
        "tool_calls": [
            {**call, "function": {"name": "bash", "arguments": json.dumps({"command": command})}}
        ],
    }  # fmt: skip


def observed(text: str) -> dict[str, Any]:
    return {
        "message_type": "observation", "role": "tool", "content": text, "agent": "main",
        "tool_call_ids": ["c"],
    }  # fmt: skip


def history(*answers: str) -> Messages:
    """A history of function calls; the diff that submitting returns comes last."""
    found: Messages = [SYSTEM, ISSUE]
    for answer in answers:
        found += [acted(answer, "ls"), observed(f"out of {answer}")]
    return found


def trajectory(said: Messages, status: str | None = "submitted", **more: Any) -> dict[str, Any]:
    steps = [
        {
            "action": m["action"], "observation": "", "response": m["content"], "state": {},
            "thought": m["content"], "execution_time": 0.1,
        }
        for m in said
        if m["role"] == "assistant"
    ]  # fmt: skip
    info = {"submission": "diff", "exit_status": status, "model_stats": {"instance_cost": 1.0}}
    return {"environment": "main", "trajectory": steps, "history": said, "info": info, **more}


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))
    return path


def report(folder: Path, resolved: list[str], unresolved: list[str]) -> Path:
    """The report of SWE-bench's evaluation."""
    ids = {"completed_ids": resolved + unresolved, "submitted_ids": resolved + unresolved}
    lists = {**ids, "resolved_ids": resolved, "unresolved_ids": unresolved, "error_ids": ["x"]}
    return write(folder / "results.json", {"total_instances": 2, **lists, "schema_version": 2})


def test_two_runs_with_their_reports(tmp_path: Path) -> None:
    """trajectories/demonstrations/replay__marshmallow-code__marshmallow-1867__function_calling__\
install-1/marshmallow-code__marshmallow-1867.traj, in the folders that a run makes. The observation
    is read, not scored, and the last one, which nothing follows, is left out."""
    runs = tmp_path / "trajectories" / "me"
    for run, answers in (("one", ["I look.", "Done."]), ("two", ["Done."])):
        write(runs / run / "a__a-1" / "a__a-1.traj", trajectory(history(*answers)))
    report(runs / "one", ["a__a-1"], [])
    report(runs / "two", [], ["a__a-1"])
    chat_tokenizer("qwen3").save_pretrained(tmp_path / "tokenizer")
    settings = {
        "format": "swe_agent",
        "rewards": f"{runs}/*/results.json",
        "tokenizer_name_or_path": str(tmp_path / "tokenizer"),
    }
    import_log(config(f"{runs}/**/*.traj", tmp_path / "out", **settings))
    (group,) = read_groups(tmp_path / "out")
    assert json.loads(group.messages or "") == [
        {"role": "system", "content": "Fix."},
        {"role": "user", "content": "Issue 1"},
    ]
    assert group.samplers == ("one", "two")
    assert group.rewards is not None
    assert group.rewards.tolist() == [1.0, 0.0]
    assert group.loss_mask is not None
    decode = chat_tokenizer("qwen3").decode
    ids, mask = group.response_token_ids[0], group.loss_mask[0]
    call = '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call><|im_end|>'
    written = decode(ids[mask])
    assert written.count(call) == 2
    assert "I look." in written
    assert "Done." in written
    assert "out of" not in written
    assert "out of I look." in decode(ids[~mask])
    assert "out of Done." not in decode(ids)


def test_observations_of_the_user(tmp_path: Path) -> None:
    """tests/test_data/trajectories/gpt4__swe-bench-dev-easy_first_only__default__t-0.00__p-0.95__\
c-3.00__install-1/pydicom__pydicom-1458.traj: a demonstration in the prompt, and no function
    calls."""
    said = [
        {"role": "system", "content": "Fix.", "agent": "primary"},
        {"agent": "primary", "content": "A demonstration", "is_demo": True, "role": "user"},
        {"role": "user", "content": "Issue 1", "agent": "primary"},
        {"role": "assistant", "content": "I look.\n```\nls\n```", "thought": "I look.",
         "action": "ls\n", "agent": "primary"},
        {"role": "user", "content": "a.py", "agent": "primary"},
        {"role": "assistant", "content": "```\nsubmit\n```", "thought": "", "action": "submit\n",
         "agent": "primary"},
    ]  # fmt: skip
    path = write(tmp_path / "run" / "p__p-1.traj", trajectory(said, "submitted (exit_cost)"))
    ((made,), _) = fragments(path, "swe_agent")
    assert [m["content"] for m in json.loads(made.messages or "")] == [
        "Fix.",
        "A demonstration",
        "Issue 1",
    ]
    assert made.response_messages is not None
    assert json.loads(made.response_messages[0] or "") == [
        {"role": "assistant", "content": "I look.\n```\nls\n```"},
        {"role": "user", "content": "a.py"},
        {"role": "assistant", "content": "```\nsubmit\n```"},
    ]
    assert (made.samplers, made.truncated, made.rewards) == (["run"], [True], None)
    assert made.group_id is not None
    assert made.group_id.startswith("p__p-1/")


def test_mini_swe_agent(tmp_path: Path) -> None:
    """eval/example_trajectories/astropy__astropy-12907.traj.json; the message of role exit, which
    follows the last one, is left out."""
    call = {"id": "c", "type": "function", "function": {"name": "bash", "arguments": "{}"}}
    said = [
        {"role": "system", "content": "Fix."},
        {"role": "user", "content": "Issue 1"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call], "function_call": None,
         "provider_specific_fields": {"refusal": None}, "extra": {"actions": [], "cost": 0.1}},
        {"role": "tool", "tool_call_id": "c", "content": "a.py", "extra": {"returncode": 0}},
        {"role": "assistant", "content": "Done.", "extra": {}},
        {"role": "exit", "content": "", "extra": {"exit_status": "Submitted"}},
    ]  # fmt: skip
    info = {"exit_status": "Submitted", "submission": "diff", "mini_version": "2.3.0"}
    row = {"info": info, "messages": said, "trajectory_format": "mini-swe-agent-1.1"}
    path = write(tmp_path / "run" / "a__a-1" / "a__a-1.traj.json", row)
    ((made,), _) = fragments(path, "swe_agent")
    assert made.response_messages is not None
    assert [m["role"] for m in json.loads(made.response_messages[0] or "")] == [
        "assistant",
        "tool",
        "assistant",
    ]
    assert (made.samplers, made.truncated) == (["run"], [False])


def test_rows_with_their_own_flag(tmp_path: Path) -> None:
    """Rows of instance_id, messages (also as JSON text) and resolved, as data sets of trajectories
    have them."""
    said = [{k: m[k] for k in ("role", "content")} for m in history("Done.")]
    rows = [
        {"instance_id": "a", "messages": said, "resolved": True, "model": "m1"},
        {"instance_id": "a", "messages": json.dumps(said), "resolved": False, "model": "m2"},
    ]
    found, _ = fragments(write_jsonl(tmp_path / "rows.jsonl", rows), "swe_agent")
    assert [f.rewards for f in found] == [[1.0], [0.0]]
    assert [f.samplers for f in found] == [["m1"], ["m2"]]
    assert len({f.group_id for f in found}) == 1


def test_flags_from_another_file_by_join(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    said = [{k: m[k] for k in ("role", "content")} for m in (SYSTEM, ISSUE)]
    rows = [
        {
            "instance_id": "i",
            "attempt": i,
            "messages": [*said, {"role": "assistant", "content": str(i + 1)}],
        }
        for i in (0, 1)
    ]
    flags = [{"attempt": 1, "resolved": True}, {"attempt": 0, "resolved": False}]
    settings = {
        "format": "swe_agent",
        "join": str(write_jsonl(tmp_path / "flags.jsonl", flags)),
        "on": "attempt",
        "tokenizer_name_or_path": str(tiny_tokenizer_dir),
    }
    import_log(config(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out", **settings))
    (group,) = read_groups(tmp_path / "out")
    assert group.rewards is not None
    assert (group.responses, group.rewards.tolist()) == (("1", "2"), [0.0, 1.0])


def with_query(said: Messages, query: Messages) -> dict[str, Any]:
    made = trajectory(said)
    made["trajectory"][-1]["query"] = query
    return made


def test_queries_show_what_the_model_read(tmp_path: Path) -> None:
    """Steps of SWE-agent 1 hold the query; without a history, it is the history."""
    said = history("I look.", "Done.")
    whole = with_query(said, said[:4])
    ((made,), _) = fragments(write(tmp_path / "a.traj", whole), "swe_agent")
    del whole["history"]
    ((other,), _) = fragments(write(tmp_path / "b.traj", whole), "swe_agent")
    assert other.messages == made.messages
    assert other.responses == ["Done."]
    # trajectories/demonstrations/replay__marshmallow-code__marshmallow-1867__function_calling_
    # replace_from_source: old observations were replaced before the model read them again.
    elided = [*said[:3], {**said[3], "content": "Old environment output: (1 lines omitted)"}]
    path = write(tmp_path / "c.traj", with_query(said, elided))
    refused(path, "swe_agent", DataError, "rewrote the context", tmp_path / "o")


def test_tools_that_are_not_in_the_log_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [write(tmp_path / f"{i}.traj", trajectory(history("Done."))) for i in range(2)]
    with caplog.at_level(logging.WARNING):
        fragments(paths, "swe_agent")
        fragments(paths, "swe_agent", chat_template_kwargs={"tools": [{"name": "bash"}]})
    assert len(caplog.records) == 1
    assert "Set chat_template_kwargs.tools" in caplog.text


def test_rewards_by_rows_and_reports_by_instance(tmp_path: Path) -> None:
    path = write(tmp_path / "run" / "a.traj", trajectory(history("Done.")))
    rows = write_jsonl(tmp_path / "r.jsonl", [{"instance_id": "a", "resolved": True, "cost": 2}])
    weights = {"resolved": 1.0, "cost": -0.25}
    ((made,), _) = fragments(path, "swe_agent", rewards=str(rows), reward_weights=weights)
    assert (made.rewards, made.components) == ([0.5], {"resolved": [1.0], "cost": [2.0]})
    by_instance = write(tmp_path / "report.json", {"a": {"resolved": False, "tests_status": {}}})
    ((made,), _) = fragments(path, "swe_agent", rewards=str(by_instance))
    assert made.rewards == [0.0]
    # An instance whose evaluation failed has no reward, which is not 0.
    ((made,), _) = fragments(path, "swe_agent", rewards=str(report(tmp_path, ["b"], [])))
    assert made.rewards == [None]


def test_one_report_for_two_runs(tmp_path: Path) -> None:
    """The report does not say which of the two trajectories of an instance it evaluated."""
    for run in ("one", "two"):
        write(tmp_path / "runs" / run / "a.traj", trajectory(history("Done.")))
    paths = sorted((tmp_path / "runs").rglob("*.traj"))
    elsewhere = str(report(tmp_path / "reports", ["a"], []))
    with pytest.raises(DataError, match="trajectories of the runs one and two"):
        fragments(paths, "swe_agent", rewards=elsewhere)
    above = str(report(tmp_path / "runs", ["a"], []))
    with pytest.raises(DataError, match="which has one trajectory for an instance"):
        fragments(paths, "swe_agent", rewards=above)


def test_failed_trajectories(tmp_path: Path) -> None:
    path = write(tmp_path / "a.traj", trajectory(history("Done."), "exit_error"))
    refused(path, "swe_agent", DataError, "the exit status 'exit_error'", tmp_path / "o")
    found, counts = fragments(path, "swe_agent", failed_responses="drop")
    assert (found, counts["dropped_failed_responses"]) == ([], 1)


TWO_AGENTS = [*history("Done."), {**acted("Me too.", "ls"), "agent": "helper"}]
PICTURE = {**ISSUE, "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"info": {}, "trajectory": []}, "a trajectory holds its messages"),
        (trajectory(history("Done."), "bored"), "an exit status means complete"),
        (trajectory(TWO_AGENTS), "received the agents helper, main"),
        (trajectory([SYSTEM, PICTURE, acted("Done.", "ls")]), "a part of type 'image_url'"),
        (trajectory([SYSTEM, ISSUE]), "received no message of the assistant"),
        ({"messages": "[{"}, "messages is a list of messages, or its JSON"),
    ],
)
def test_refused_trajectories(row: dict[str, Any], match: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.traj", row)
    assert refused(path, "swe_agent", DataError, match, tmp_path / "o").row == 0


def test_rewards_belong_to_some_formats(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rewards is only used with format: anthropic_batch"):
        config(tmp_path / "a.jsonl", tmp_path / "o", rewards="r.json")
    with pytest.raises(ConfigError, match="requests is only used with format: anthropic_batch"):
        config(tmp_path / "a.traj", tmp_path / "o", format="swe_agent", requests="r.json")
