"""Pairs of responses with tool calls: what is prompt and what is response."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.importing import write_jsonl
from support.reading_formats import fragments

USER = {"role": "user", "content": "2 + 3?"}
CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"type": "function", "function": {"name": "add", "arguments": {"x": 2}}}]}  # fmt: skip


def turns(result: str, answer: str) -> list[dict[str, Any]]:
    tool = {"role": "tool", "content": result}
    return [CALL, tool, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("given", [True, False])
def test_equal_calls_with_other_results_are_responses(tmp_path: Path, given: bool) -> None:
    """The first difference is what the tool returned, so the call before it is not the prompt."""
    pair = turns("5", "It is 5."), turns("error", "No idea.")
    row: dict[str, Any] = dict(zip(("chosen", "rejected"), pair, strict=True))
    if given:
        row["prompt"] = [USER]
    else:
        row = {name: [USER, *value] for name, value in row.items()}
    ((fragment,), _) = fragments(write_jsonl(tmp_path / "log.jsonl", [row]), "preference")
    assert json.loads(fragment.messages or "") == [USER]
    found = [json.loads(m or "") for m in fragment.response_messages or ()]
    assert [[m["role"] for m in own] for own in found] == [["assistant", "tool", "assistant"]] * 2
    assert fragment.responses == ["It is 5.", "No idea."]


def test_equal_calls_with_equal_results_are_the_prompt(tmp_path: Path) -> None:
    row = {"chosen": [USER, *turns("5", "It is 5.")], "rejected": [USER, *turns("5", "6")]}
    ((fragment,), _) = fragments(write_jsonl(tmp_path / "log.jsonl", [row]), "preference")
    assert [m["role"] for m in json.loads(fragment.messages or "")] == ["user", "assistant", "tool"]
    assert fragment.responses == ["It is 5.", "6"]
