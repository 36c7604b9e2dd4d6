"""`import --format anthropic_batch` and `gemini_batch`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.importing import config, read_groups, write_jsonl
from support.reading_formats import fragments, refused

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.importer import import_log


def read(
    tmp_path: Path, name: str, requests: list[Any], results: list[Any], **settings: Any
) -> list[Fragment]:
    sent = write_jsonl(tmp_path / "requests.jsonl", requests)
    path = write_jsonl(tmp_path / "results.jsonl", results)
    return fragments(path, name, requests=str(sent), **settings)[0]


def prompt(fragment: Fragment) -> Any:
    return json.loads(fragment.messages or "null")


def answer(fragment: Fragment) -> Any:
    """The messages of the response, or its text if it is one text."""
    messages = fragment.response_messages and fragment.response_messages[0]
    return json.loads(messages) if messages else fragment.responses[0]


# --- Anthropic ------------------------------------------------------------------------------------


def asked(key: str, text: Any = "2 + 3?", **params: Any) -> dict[str, Any]:
    messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
    return {
        "custom_id": key,
        "params": {"model": "claude-x", "max_tokens": 64, "messages": messages, **params},
    }


def succeeded(key: str, *content: Any, **message: Any) -> dict[str, Any]:
    """A row of batch_results.jsonl in mihaela-borta/linkedin-mcp-server at
    326c0a4d6d013af90ab90a9572a9fcc2a769aee3, with other values."""
    blocks = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    return {
        "custom_id": key,
        "result": {
            "type": "succeeded",
            "message": {
                "id": "msg_1", "type": "message", "role": "assistant", "model": "claude-x-2026",
                "content": blocks, "stop_reason": "end_turn", "stop_sequence": None,
                "usage": {"input_tokens": 9, "output_tokens": 5, "service_tier": "batch"},
                **message,
            },
        },
    }  # fmt: skip


def test_anthropic_results_join_requests_and_rewards(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    """Two requests with one prompt are a group; results come in another order."""
    sent = write_jsonl(tmp_path / "requests.jsonl", [asked("a"), asked("b")])
    results = [succeeded("b", "6"), succeeded("a", "5", stop_reason="max_tokens")]
    path = write_jsonl(tmp_path / "results.jsonl", results)
    rewards = [{"custom_id": "a", "right": 1.0}, {"custom_id": "b", "right": 0.0}]
    settings = {
        "format": "anthropic_batch",
        "requests": str(sent),
        "rewards": str(write_jsonl(tmp_path / "rewards.jsonl", rewards)),
        "tokenizer_name_or_path": str(tiny_tokenizer_dir),
    }
    import_log(config(path, tmp_path / "out", **settings))
    (group,) = read_groups(tmp_path / "out")
    assert group.messages == '[{"role": "user", "content": "2 + 3?"}]'
    assert (group.responses, group.response_ids) == (("6", "5"), ("b", "a"))
    assert (group.samplers, group.truncated) == (("claude-x-2026",) * 2, (False, True))
    assert group.rewards is not None
    assert group.rewards.tolist() == [0.0, 1.0]


def test_requests_may_be_the_body_of_the_call(tmp_path: Path) -> None:
    body = {"requests": [asked("a", "1?"), asked("b", "2?")]}
    found = read(tmp_path, "anthropic_batch", [body], [succeeded("b", "2"), succeeded("a", "1")])
    assert [(prompt(f)[0]["content"], f.responses) for f in found] == [("2?", ["2"]), ("1?", ["1"])]


def test_anthropic_stop_sequence(tmp_path: Path) -> None:
    """The model wrote no end token where a stop sequence ended the response."""
    ended = {"stop_reason": "stop_sequence", "stop_sequence": "END"}
    (made,) = read(tmp_path, "anthropic_batch", [asked("a")], [succeeded("a", "5", **ended)])
    assert (made.truncated, made.stopped_by_string) == ([False], [True])
    assert made.stop_strings == ["END"]


USE = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 2}}
THINKING = {"type": "thinking", "thinking": "I add.", "signature": "c2ln"}
USED = {"id": "toolu_1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def test_anthropic_thinking_and_tools(tmp_path: Path) -> None:
    """Blocks as the reference of the Messages API names them."""
    returned = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "5"}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "2 + 3?"}]},
        {"role": "assistant", "content": [THINKING, {"type": "text", "text": "So"}, USE]},
        {"role": "user", "content": [returned, {"type": "text", "text": "and 1 more?"}]},
    ]
    tools = [{"name": "add", "description": "Adds", "input_schema": {"type": "object"}}]
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    (made,) = read(
        tmp_path,
        "anthropic_batch",
        [asked("a", turns, system=system, tools=tools)],
        [succeeded("a", THINKING, "It ", "is", USE, stop_reason="tool_use")],
    )
    assert prompt(made) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 3?"},
        {
            "role": "assistant",
            "content": "So",
            "reasoning_content": "I add.",
            "tool_calls": [USED],
        },
        {"role": "tool", "content": "5", "tool_call_id": "toolu_1"},
        {"role": "user", "content": "and 1 more?"},
    ]
    assert json.loads(made.template_arguments or "null") == {
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "add",
                    "description": "Adds",
                    "parameters": {"type": "object"},
                },
            }
        ]
    }
    assert answer(made) == [
        {
            "role": "assistant",
            "content": "It is",
            "reasoning_content": "I add.",
            "tool_calls": [USED],
        }
    ]
    assert made.rewards is None


def test_anthropic_prefill_is_continued(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "It is"}]
    (made,) = read(tmp_path, "anthropic_batch", [asked("a", turns)], [succeeded("a", " 5")])
    assert prompt(made)[-1] == {"role": "assistant", "content": "It is"}
    assert (made.template_arguments, made.responses) == (None, [" 5"])


def test_anthropic_failures(tmp_path: Path) -> None:
    """The error has the shape that the API returned in 2026: an error within an error."""
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": "no message"}}
    results = [
        {"custom_id": "a", "result": {"type": "errored", "error": error}},
        {"custom_id": "b", "result": {"type": "expired"}},
        succeeded("c", "I cannot", stop_reason="refusal"),
    ]
    sent = write_jsonl(tmp_path / "requests.jsonl", [asked(key) for key in "abcd"])
    path = write_jsonl(tmp_path / "results.jsonl", results)
    settings = {"requests": str(sent)}
    match = (
        r"4 that failed: row 0: request a: errored \(no message\); row 1: request b: expired; "
        "row 2: request c: the stop reason 'refusal'"
    )
    refused(path, "anthropic_batch", DataError, match, tmp_path / "o", **settings)
    found, counts = fragments(path, "anthropic_batch", **settings, failed_responses="drop")
    assert (found, counts["dropped_failed_responses"]) == ([], 4)


IMAGE = {"type": "image", "source": {"type": "base64", "data": "iVBO"}}


@pytest.mark.parametrize(
    ("request_row", "result_row", "match"),
    [
        (asked("a"), succeeded("a", {"type": "redacted_thinking", "data": "x"}), "redacted_think"),
        (
            asked("a"),
            succeeded("a", {"type": "thinking", "thinking": "", "signature": "x"}, "5"),
            "thinking whose text the API left out",
        ),
        (asked("a"), succeeded("a", "5", stop_reason="bored"), "received 'bored'"),
        (asked("a"), {"custom_id": "a", "result": {"type": "?"}}, "a result has the type"),
        (asked("a"), succeeded("z", "5"), "no request for the result of 'z'"),
        (
            asked("a", [{"role": "user", "content": [IMAGE]}]),
            succeeded("a", "5"),
            "a part of type 'image' in a message of role user",
        ),
        (
            asked("a", tools=[{"type": "web_search_20250305", "name": "web_search"}]),
            succeeded("a", "5"),
            "a tool of the server: 'web_search_20250305'",
        ),
        ({"custom_id": "a", "body": {}}, succeeded("a", "5"), "a request has params with messages"),
    ],
)
def test_anthropic_refuses(
    request_row: dict[str, Any], result_row: dict[str, Any], match: str, tmp_path: Path
) -> None:
    sent = write_jsonl(tmp_path / "requests.jsonl", [request_row])
    path = write_jsonl(tmp_path / "results.jsonl", [result_row])
    settings = {"requests": str(sent)}
    error = refused(path, "anthropic_batch", DataError, match, tmp_path / "o", **settings)
    assert error.row == 0


def test_anthropic_needs_requests(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "results.jsonl", [succeeded("a", "5")])
    refused(path, "anthropic_batch", ConfigError, "no requests", tmp_path / "o")


# --- Gemini ---------------------------------------------------------------------------------------


def gemini(key: str | None, *contents: Any, **request: Any) -> dict[str, Any]:
    """A request as ai.google.dev/gemini-api/docs/batch-api has it (November 2026)."""
    made = [{"role": "user", "parts": [{"text": c}]} if isinstance(c, str) else c for c in contents]
    row = {"request": {"contents": made, **request}}
    return row if key is None else {"key": key, **row}


def candidate(*parts: Any, **more: Any) -> dict[str, Any]:
    made = [{"text": part} if isinstance(part, str) else part for part in parts]
    return {"content": {"parts": made, "role": "model"}, "finishReason": "STOP", **more}


def generated(key: str, *candidates: Any, **more: Any) -> dict[str, Any]:
    response = {
        "candidates": list(candidates), "modelVersion": "gemini-x", "responseId": "r",
        "usageMetadata": {"promptTokenCount": 5, "totalTokenCount": 9},
    }  # fmt: skip
    return {"key": key, "response": {**response, **more}}


def test_gemini_candidates_join_requests_and_rewards(tmp_path: Path) -> None:
    cut = candidate("6", finishReason="MAX_TOKENS", index=1)
    rewards = [{"key": "a", "right": [1.0, 0.0]}, {"key": "b", "right": 1.0}]
    a, b, c = read(
        tmp_path,
        "gemini_batch",
        [gemini("a", "2 + 3?"), gemini("b", "2 + 3?")],
        [generated("b", candidate("5")), generated("a", candidate("five"), cut)],
        rewards=str(write_jsonl(tmp_path / "rewards.jsonl", rewards)),
    )
    assert [f.responses for f in (a, b, c)] == [["5"], ["five"], ["6"]]
    assert [f.response_ids for f in (a, b, c)] == [["b"], ["a#0"], ["a#1"]]
    assert [f.rewards for f in (a, b, c)] == [[1.0], [1.0], [0.0]]
    assert [f.truncated for f in (a, b, c)] == [[False], [False], [True]]
    assert {f.messages for f in (a, b, c)} == {'[{"role": "user", "content": "2 + 3?"}]'}
    assert a.samplers == ["gemini-x"]


def test_gemini_thoughts_and_functions(tmp_path: Path) -> None:
    call = {"functionCall": {"name": "add", "args": {"a": 2}}, "thoughtSignature": "c2ln"}
    returned = {"functionResponse": {"name": "add", "response": {"sum": 5}}}
    declared = {"name": "add", "description": "Adds", "parameters": {"type": "OBJECT"}}
    (made,) = read(
        tmp_path,
        "gemini_batch",
        [
            gemini(
                "a",
                "2 + 3?",
                {"role": "model", "parts": [call]},
                {"role": "user", "parts": [returned]},
                systemInstruction={"parts": [{"text": "Be brief."}]},
                tools=[{"functionDeclarations": [declared]}],
            )
        ],
        [generated("a", candidate({"text": "I add.", "thought": True}, "It ", "is 5.", call))],
    )
    used = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    assert prompt(made) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": "", "tool_calls": [used]},
        {"role": "tool", "content": '{"sum": 5}', "name": "add"},
    ]
    assert json.loads(made.template_arguments or "null") == {
        "tools": [{"type": "function", "function": declared}]
    }
    assert answer(made) == [
        {
            "role": "assistant",
            "content": "It is 5.",
            "reasoning_content": "I add.",
            "tool_calls": [used],
        }
    ]


def test_vertex_rows_hold_their_requests(tmp_path: Path) -> None:
    """Vertex AI writes request and response in one row; names as the Python SDK writes them."""
    request = gemini(None, "2 + 3?", system_instruction={"parts": [{"text": "Be brief."}]})
    said = candidate("5", finish_reason="FinishReason.STOP") | {"finishReason": None}
    response = {"candidates": [said], "model_version": "gemini-x"}
    row = {"status": "", "processed_time": "2026-11-01", **request, "response": response}
    bad = {"status": "Bad Request: {}", **gemini(None, "?"), "response": {}}
    path = write_jsonl(tmp_path / "predictions.jsonl", [row, bad])
    (made,), counts = fragments(path, "gemini_batch", failed_responses="drop")
    assert prompt(made)[0] == {"role": "system", "content": "Be brief."}
    assert (made.responses, made.samplers, made.response_ids) == (["5"], ["gemini-x"], None)
    assert counts["dropped_failed_responses"] == 1


def test_gemini_failures(tmp_path: Path) -> None:
    blocked = generated("b", promptFeedback={"blockReason": "SAFETY"})
    results = [
        {"key": "a", "error": {"code": 13, "message": "internal"}},
        blocked,
        generated("c", candidate(finishReason="SAFETY")),
    ]
    sent = write_jsonl(tmp_path / "requests.jsonl", [gemini(key, "?") for key in "abc"])
    path = write_jsonl(tmp_path / "results.jsonl", results)
    match = (
        r"3 that failed: row 0: request a: failed \(internal\); row 1: request b: no candidates "
        r"\(SAFETY\); row 2: request c: the finish reason 'SAFETY'"
    )
    refused(path, "gemini_batch", DataError, match, tmp_path / "o", requests=str(sent))


@pytest.mark.parametrize(
    ("request_row", "result_row", "match"),
    [
        (
            gemini("a", {"parts": [{"inlineData": {"mimeType": "image/png", "data": "iVBO"}}]}),
            generated("a", candidate("5")),
            "a part with inlineData in a content by user",
        ),
        (
            gemini("a", "?", tools=[{"googleSearch": {}}]),
            generated("a", candidate("5")),
            "a tool of the server: googleSearch",
        ),
        (
            gemini("a", "?"),
            generated("a", candidate({"executableCode": {"code": "1"}})),
            "a part with executableCode in a content by model",
        ),
        (gemini("a", "?"), {"key": "a"}, "a result has a response, or an error"),
        (gemini("a", {"role": "judge", "parts": []}), generated("a"), "received role 'judge'"),
    ],
)
def test_gemini_refuses(
    request_row: dict[str, Any], result_row: dict[str, Any], match: str, tmp_path: Path
) -> None:
    sent = write_jsonl(tmp_path / "requests.jsonl", [request_row])
    path = write_jsonl(tmp_path / "results.jsonl", [result_row])
    settings = {"requests": str(sent)}
    assert refused(path, "gemini_batch", DataError, match, tmp_path / "o", **settings).row == 0


def test_gemini_results_without_requests(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "results.jsonl", [generated("a", candidate("5"))])
    refused(path, "gemini_batch", DataError, "are without their requests", tmp_path / "o")
