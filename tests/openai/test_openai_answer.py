"""Reading answers of OpenAI-compatible servers: the value of each part, or the cause of failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo_offline.openai.answer import (
    BESIDE_TEXT,
    REASONING,
    AnswerChoice,
    BadAnswerError,
    choice_of,
    content_text,
    result_body,
)

NAMES = [
    *("choices", "index", "message", "text", "content", "type", "finish_reason", "token_ids"),
    *("logprobs", "tokens", "token_logprobs", "logprob", "token", "refusal", "tool_calls"),
    *("prompt_token_ids", "response", "status_code", "body", "error", "reasoning"),
]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 2**40),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from(["stop", "length", "text", "token_id:7", "\ud800"]),
    st.just(200),
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=12,
)
CHOICES = st.fixed_dictionaries(
    {"message": st.fixed_dictionaries({"content": JSON}, optional={"tool_calls": JSON})},
    optional=dict.fromkeys(("finish_reason", "token_ids", "logprobs", "index"), JSON),
)


def outcome(read: Callable[[], Any]) -> Any:
    """What `read` returns, or its BadAnswerError."""
    try:
        return read()
    except BadAnswerError as error:
        return error


@given(st.one_of(JSON, st.fixed_dictionaries({"choices": st.lists(CHOICES, max_size=2)})))
@settings(max_examples=80, deadline=None)
def test_any_json_is_read_or_is_a_bad_answer(answer: Any) -> None:
    """No other exception, which would end a run instead of failing one response."""
    choice = outcome(lambda: choice_of(answer, 0))
    if isinstance(choice, BadAnswerError):
        assert str(choice)
        return
    text = outcome(lambda: choice.text(beside=BESIDE_TEXT))
    assert text is None or isinstance(text, str | BadAnswerError)
    whole = outcome(choice.text)
    assert isinstance(whole, BadAnswerError) or whole == text
    assert isinstance(outcome(lambda: choice.truncated), bool | BadAnswerError)
    assert isinstance(outcome(lambda: choice.logprobs), list | BadAnswerError)
    ids = outcome(lambda: choice.token_ids)
    assert ids is None or isinstance(ids, BadAnswerError) or all(0 <= i < 2**31 for i in ids)
    assert choice.refusal is None or choice.refusal


@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4))
@settings(max_examples=80, deadline=None)
def test_any_result_line_has_a_body_or_a_cause(result: dict[str, Any]) -> None:
    body = outcome(lambda: result_body(result))
    if isinstance(body, BadAnswerError):
        assert str(body).startswith("status ")
        return
    assert result["response"]["status_code"] == 200
    assert not result.get("error")


def test_the_parts_of_a_chat_completion() -> None:
    logprobs = {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": 0}]}
    message = {"role": "assistant", "content": "ab", "tool_calls": [], "refusal": None}
    raw = {"index": 0, "message": message, "finish_reason": "length", "logprobs": logprobs}
    choice = choice_of({"choices": [raw], "prompt_token_ids": [1, 2]}, 0)
    assert (choice.text(), choice.truncated, choice.refusal) == ("ab", True, None)
    assert (choice.token_ids, choice.prompt_token_ids) == (None, [1, 2])
    assert choice.logprobs == [-0.5, 0]


def test_the_parts_of_a_completion() -> None:
    """vLLM with return_tokens_as_token_ids: the tokens' names are their ids."""
    logprobs = {"tokens": ["token_id:4", "token_id:2"], "token_logprobs": [-1.0, -2.0]}
    raw = {"index": 1, "text": "x", "finish_reason": "eos_token", "logprobs": logprobs}
    choice = choice_of({"choices": [{"index": 0, "text": "y"}, raw]}, 1)
    assert (choice.text(), choice.truncated) == ("x", False)
    assert (choice.token_ids, choice.logprobs) == ([4, 2], [-1.0, -2.0])


def test_reasoning_is_refused_unless_it_is_allowed() -> None:
    choice = AnswerChoice({"message": {"content": "4", "reasoning": "2 and 2"}})
    assert choice.text(beside=REASONING) == "4"
    with pytest.raises(BadAnswerError, match="a message with reasoning apart from its text"):
        choice.text()


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "output_text", "text": "b"}]
    assert content_text(parts) == "ab"
    with pytest.raises(BadAnswerError, match="neither text nor a list of text parts"):
        content_text([*parts, {"type": "image_url"}])
