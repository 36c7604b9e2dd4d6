"""`import --format promptfoo`: results of evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.importing import config, read_groups, write_jsonl
from support.reading_formats import fragments

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.importer import import_log


def result(output: Any, score: float, **changed: Any) -> dict[str, Any]:
    """A result with the fields of krystianbergmann/prompt-eval-workbench, commit 19256d8,
    promptfoo-results.json."""
    question = "8 times 8? Digits only."
    grade = {"pass": score == 1, "score": score, "reason": "…", "namedScores": {}}
    return {
        "cost": 0.000007,
        "error": None if score == 1 else 'Expected output to match regex "56"',
        "gradingResult": {**grade, "componentResults": [grade], "assertion": None},
        "id": "165bdeba",
        "latencyMs": 473,
        "namedScores": {},
        "prompt": {"raw": f"Be concise.\n\n{question}\n", "label": "Be concise.\n\n{{question}}\n"},
        "promptId": "409355",
        "promptIdx": 0,
        "provider": {"id": "openai:chat:small", "label": ""},
        "response": {"output": output, "tokenUsage": {"total": 44}, "cached": False},
        "score": score,
        "success": score == 1,
        "testCase": {
            "description": "8 x 8", "vars": {"question": question}, "options": {}, "metadata": {},
        },
        "testIdx": 1,
        "vars": {"question": question},
        "metadata": {},
        "failureReason": 0 if score == 1 else 1,
    } | changed  # fmt: skip


def as_json(path: Path, results: list[Any]) -> Path:
    summary = {"version": 3, "prompts": [], "results": results, "stats": {"successes": 1}}
    whole = {"evalId": "eval-6Vn", "results": summary, "config": {}, "shareableUrl": None}
    path.write_text(json.dumps(whole, indent=2))
    return path


def test_a_group_is_a_prompt_over_providers_and_files(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    """The provider's label, or else its id, is the sampler. A failed assertion is a reward, not a
    failure."""
    labelled = {"id": "openai:chat:small", "label": "warm"}
    paths = [
        as_json(tmp_path / "a.json", [result("56", 0.0), result("64", 1.0, provider=labelled)]),
        write_jsonl(tmp_path / "b.jsonl", [result("65", 0.5, provider="exec:run.py")]),
    ]
    settings = {"format": "promptfoo", "tokenizer_name_or_path": str(tiny_tokenizer_dir)}
    import_log(config(paths, tmp_path / "out", **settings))
    (group,) = read_groups(tmp_path / "out")
    assert group.prompt == "Be concise.\n\n8 times 8? Digits only.\n"
    assert group.responses == ("56", "64", "65")
    assert group.samplers == ("openai:chat:small", "warm", "exec:run.py")
    assert group.rewards is not None
    assert group.rewards.tolist() == [0.0, 1.0, 0.5]


def test_named_scores(tmp_path: Path) -> None:
    row = result("64", 0.5, namedScores={"style": 0.25})
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    (found,), _ = fragments(path, "promptfoo", reward_weights={"success": 1.0, "style": 2.0})
    assert found.rewards == [1.0 * 0 + 2.0 * 0.25]
    with pytest.raises(ConfigError, match="tone; the log has score, success, style"):
        fragments(path, "promptfoo", reward_weights={"tone": 1.0})


def test_chats_and_tool_calls(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Count."}, {"role": "user", "content": "8 x 8?"}]
    call = {"id": "c", "type": "function", "function": {"name": "mul", "arguments": '{"x": 8}'}}
    response = {"output": [call], "finishReason": "tool_calls"}
    row = result("", 1.0, prompt={"raw": json.dumps(chat, indent=2)}, response=response)
    (found,), _ = fragments(write_jsonl(tmp_path / "a.jsonl", [row]), "promptfoo")
    assert json.loads(found.messages or "") == chat
    (message,) = json.loads((found.response_messages or [""])[0] or "")
    assert message["tool_calls"][0]["function"] == {"name": "mul", "arguments": {"x": 8}}


def test_errors_and_endings(tmp_path: Path) -> None:
    rows = [
        result("6", 0.0, response={"output": "6", "finishReason": "length"}),
        result("", 0.0, error="429 Too many", failureReason=2),
        result("", 0.0, response={"error": "timed out"}),
    ]
    path = as_json(tmp_path / "a.json", rows)
    with pytest.raises(DataError, match="2 that failed: row 1: the error '429 Too many'; row 2"):
        fragments(path, "promptfoo")
    (found,), counts = fragments(path, "promptfoo", failed_responses="drop")
    assert (found.truncated, counts["dropped_failed_responses"]) == ([True], 2)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (result({"a": 1}, 1.0), "the parsed JSON, not its text"),
        (result(None, 1.0), "received null"),
        (result("Thinking: 8 * 8\n\n64", 1.0), "reasoning that promptfoo put into it"),
        (result("64", 1.0, prompt={"raw": "- role: user\n  content: hi"}), "received YAML"),
        (result("64", 1.0, prompt={"label": "x"}), r"prompt\.raw is the prompt"),
        (result("64", 1.0, testCase={"options": {"transform": "trim"}}), r"options\.transform"),
        (result("64", 1.0, response={"output": "", "images": [{}]}), r"response\.images"),
        (
            result("64", 1.0, response={"output": "", "metadata": {"redteamHistory": ["…"]}}),
            "a red-team strategy sent other messages",
        ),
        ({**result("64", 1.0), "score": "high"}, "the score 'score' is a number; received 'high'"),
        (result("64", 1.0, namedScores={"score": 1}), "received score"),
        ({"prompt": {"raw": "a"}}, "no provider, score among"),
    ],
)  # fmt: skip
def test_refuses(row: dict[str, Any], match: str, tmp_path: Path) -> None:
    path = as_json(tmp_path / "a.json", [result("64", 1.0), row])
    with pytest.raises(DataError, match=match) as caught:
        fragments(path, "promptfoo")
    assert caught.value.row == 1
