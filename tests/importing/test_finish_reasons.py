"""Finish reasons: one table says what each word means, for logs and answers of servers alike."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gvpo_offline import finish_reasons as table
from gvpo_offline import values
from gvpo_offline.errors import DataError
from gvpo_offline.openai.answer import AnswerChoice, BadAnswerError
from gvpo_offline.openai.shapes import response_ending, was_cut

PAGE = Path(__file__).parents[2] / "docs/howto/log-values.md"
WORDS = {"complete": table.COMPLETE, "cut": table.CUT, "failed": table.FAILED}
ALL = [(word, ending) for ending, words in WORDS.items() for word in words]


def test_each_word_has_one_meaning() -> None:
    lists = [*WORDS.values(), table.UNKNOWN]
    assert sum(map(len, lists)) == len(set().union(*lists))
    assert all(table.normal_form(word) == word for words in lists for word in words)
    assert set(table.STOP_STRING) <= set(table.COMPLETE)


@pytest.mark.parametrize(
    ("word", "ending"),
    [
        ("stop", "complete"), ("end_turn", "complete"), ("stop_sequence", "complete"),
        ("eos", "complete"), ("tool_calls", "complete"), ("STOP", "complete"),
        ("FinishReason.STOP", "complete"), ("toolUse", "complete"), ("COMPLETE", "complete"),
        ("length", "cut"), ("max_tokens", "cut"), ("MAX_TOKENS", "cut"), ("LENGTH", "cut"),
        ("model_length", "cut"), ("max_output_tokens", "cut"), ("incomplete", "cut"),
        ("maxTokens", "cut"), ("FinishReason.MAX_TOKENS", "cut"), ("token_limit", "cut"),
        ("model_context_window_exceeded", "cut"), ("stop_reason.max-tokens", "cut"),
        ("content_filter", "failed"), ("content-filter", "failed"), ("SAFETY", "failed"),
        ("error", "failed"), ("abort", "failed"), ("refusal", "failed"), ("cancelled", "failed"),
        (None, "unknown"), ("", "unknown"), ("FINISH_REASON_UNSPECIFIED", "unknown"),
        (True, "cut"), (False, "complete"), (1, "cut"), (0.0, "complete"), (Decimal(1), "cut"),
        ({"type": "length", "length": 16}, "cut"), ({"type": "stop", "matched": 2}, "complete"),
        ({"type": "abort", "message": "x"}, "failed"),
    ],
)  # fmt: skip
def test_endings(word: Any, ending: str) -> None:
    assert table.ending(word) == ending


@pytest.mark.parametrize(("word", "ending"), ALL)
def test_the_docs_list_each_word_under_its_meaning(word: str, ending: str) -> None:
    (row,) = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {ending} |")]
    assert f"`{word}`" in row


@pytest.mark.parametrize("value", ["banana", "stopped?", 2, 0.5, [], {"type": "x"}, {"kind": "y"}])
def test_a_word_in_no_list_is_refused_with_the_lists(value: Any) -> None:
    if value == {"kind": "y"}:  # a record without a type does not say how the response ended
        assert table.ending(value) == "unknown"
        return
    with pytest.raises(DataError, match=r"complete \(stop, .*cut \(length, .*failed \(content_fil"):
        values.truncated(value)


def test_a_failed_response_is_neither_complete_nor_cut() -> None:
    with pytest.raises(DataError, match="'SAFETY', which says that it failed"):
        values.truncated("SAFETY")
    assert [values.truncated(word) for word in ("stop", None, "MAX_TOKENS")] == [False, False, True]


@given(st.text(max_size=12))
def test_any_text_has_a_meaning_or_is_refused(word: str) -> None:
    """A text that is not listed is never taken as complete."""
    try:
        found = table.ending(word)
    except DataError:
        assert not table.is_known(word)
    else:
        assert table.is_known(word)
        assert found in ("complete", "cut", "failed", "unknown")


# ---- stop strings ----


@pytest.mark.parametrize(
    ("reason", "stopped_at", "by_string"),
    [
        ("stop", None, False),  # vLLM: the end token
        ("stop", 32000, False),  # vLLM: a stop token
        ("stop", "\n\n", True),  # vLLM: a stop string
        ("stop", "", False),
        ("stop", "STOP", True),  # a stop string, not a finish reason
        (None, "###", True),
        ("length", "###", False),
        ("stop_sequence", None, True),  # text-generation-inference
        ("STOP_SEQUENCE", None, True),  # Cohere
        ("eos_token", None, False),
        ("stop", "end_turn", False),  # a proxy of Anthropic's API
        ("stop", "stop_sequence", True),
        ({"type": "stop", "matched": "END"}, None, True),  # SGLang
        ({"type": "stop", "matched": 2}, None, False),
        ({"type": "length", "length": 8}, None, False),
        (False, "END", True),
        ("no such word", "END", True),
    ],
)
def test_stop_strings(reason: Any, stopped_at: Any, by_string: bool) -> None:
    assert table.by_stop_string(reason, stopped_at) is by_string


# ---- answers of servers ----


def answer(reason: Any, **further: Any) -> AnswerChoice:
    return AnswerChoice({"message": {"content": "x"}, "finish_reason": reason, **further})


def test_answers_of_servers() -> None:
    assert [answer(r).truncated for r in ("stop", "eos_token", "tool_calls")] == [False] * 3
    assert [answer(r).truncated for r in ("length", "max_tokens", "model_length")] == [True] * 3
    for reason in ("abort", "content_filter", "banana", None):
        with pytest.raises(BadAnswerError, match="neither an end nor a cut"):
            assert answer(reason).truncated
    assert answer("content_filter").refusal == "the finish reason 'content_filter'"
    assert answer("abort").refusal == "the finish reason 'abort'"
    assert answer("stop").refusal is answer("banana").refusal is None
    with pytest.raises(BadAnswerError, match="a message with tool_calls apart from its text"):
        AnswerChoice(
            {"message": {"content": "", "tool_calls": [{}]}, "finish_reason": "tool_calls"}
        ).text()
    assert answer("stop", stop_reason="\n").stopped_by_string
    assert answer("stop", matched_stop="\n").stopped_by_string
    assert answer("stop_sequence").stopped_by_string
    assert not answer("stop", stop_reason=2, stop_sequence=None).stopped_by_string
    assert not answer("stop", matched_stop=151645).stopped_by_string


@pytest.mark.parametrize(
    ("response", "ending"),
    [
        ({"status": "completed", "incomplete_details": None}, "complete"),
        ({"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}, "cut"),
        ({"status": "incomplete", "incomplete_details": {"reason": "content_filter"}}, "failed"),
        ({"status": "incomplete", "incomplete_details": {}}, "cut"),
        ({"status": "incomplete"}, "cut"),
        ({"status": "failed"}, "failed"),
        ({"status": "cancelled"}, "failed"),
        ({"status": "in_progress"}, "failed"),
        ({}, "unknown"),
    ],
)
def test_responses_api(response: dict[str, Any], ending: str) -> None:
    assert response_ending(response)[0] == ending
    assert was_cut(response) == (ending == "cut")
