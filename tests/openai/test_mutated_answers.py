"""Valid answers in which one place, or several, were replaced by any JSON value.

A response is then either valid, and can be stored, or has failed with a cause that can be stored.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.openai import shapes
from gvpo_offline.openai.answer import BadAnswerError, choice_of, result_body
from gvpo_offline.rewards.judge.log import _SCHEMA, Judgement
from gvpo_offline.rewards.judge.rubric import Rubric
from gvpo_offline.rewards.judge.stage import JudgeRequest
from gvpo_offline.rewards.kinds import JudgePairsSettings, JudgeSettings
from gvpo_offline.sampling.answers import read_answer
from gvpo_offline.sampling.log import Sample, _table
from gvpo_offline.sampling.prompts import Prompt
from gvpo_offline.sampling.settings import OpenAISettings
from gvpo_offline.sampling.stage import SampleRequest

LEAVES = st.one_of(
    st.sampled_from(
        [
            *(
                None,
                True,
                False,
                0,
                1,
                -1,
                2,
                0.5,
                1.0,
                -1e39,
                1e308,
                math.nan,
                math.inf,
                -math.inf,
            ),
            *(2**31, -(2**63), 10**400, "", "\ud800", "a\0b", "stop", "length", "token_id:7"),
            *("token_id:" + "9" * 5000, "\uff11", "Score: 7", "7", [], {}, [1], {"a": 1}, [[]]),
        ]
    ),
    st.text(max_size=3),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["type", "text", "content", "a"]), inner, max_size=2),
    ),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values, the outermost first."""
    inner: list[Any] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, valid: Any) -> Any:
    """A copy of `valid` with 1 to 3 places replaced, removed or doubled."""
    value = json.loads(json.dumps(valid))  # a copy without shared parts
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = (None, *draw(st.sampled_from(places(value))))
        if not parents:
            value = copy.deepcopy(draw(VALUES))
            continue
        holder = value
        for key in parents[1:]:
            holder = holder[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "double"]))
        if how == "remove":
            del holder[last]
        elif how == "double" and isinstance(holder, list):
            holder.insert(last, copy.deepcopy(holder[last]))
        else:
            holder[last] = copy.deepcopy(draw(VALUES))
    return value


MESSAGE = {"role": "assistant", "content": "4 2", "refusal": None, "tool_calls": []}
CHAT = {
    "id": "x",
    "model": "m",
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    "prompt_token_ids": [1, 2, 3],
    "choices": [
        {
            "index": number,
            "message": MESSAGE,
            "finish_reason": "stop",
            "stop_reason": None,
            "token_ids": [4, 2],
            "logprobs": {
                "content": [{"token": "4", "logprob": -0.5}, {"token": "2", "logprob": -1.5}]
            },
        }
        for number in (0, 1)
    ],
}
TEXT = {
    "model": "m",
    "choices": [
        {
            "index": 0,
            "text": "4 2",
            "finish_reason": {"type": "stop", "matched": "</a>"},
            "logprobs": {"tokens": ["token_id:4", "token_id:2"], "token_logprobs": [-0.5, -1.5]},
        }
    ],
}
PROMPT = Prompt(0, "k", "log", 0, "p", '[{"role": "user"}]', None, np.array([1, 2, 3], np.int32))
REQUESTS = [SampleRequest(PROMPT, number, 0) for number in (0, 1)]


def sampler(**changes: Any) -> OpenAISettings:
    return OpenAISettings(base_url="http://a/v1", model="m", responses=2, **changes)


SAMPLERS = [
    sampler(),
    sampler(logprobs=True),
    sampler(return_token_ids=True),
    sampler(return_token_ids=True, logprobs=True),
]


def check_samples(samples: list[Sample]) -> None:
    """Every sample is a response or a failure, and Arrow stores it."""
    for sample in samples:
        assert (sample.error is None) == (sample.text is not None)
        assert sample.error is None or sample.error
        if sample.token_logprobs is not None:
            assert np.isfinite(sample.token_logprobs).all()
            assert sample.token_logprobs.max() < 0.1
        if sample.token_ids is not None:
            assert sample.token_ids.min() >= 0
    assert _table(samples).num_rows == len(samples)


@pytest.mark.parametrize("valid", [CHAT, TEXT], ids=["chat", "completions"])
@given(data=st.data(), settings_=st.sampled_from(SAMPLERS))
@settings(max_examples=250, deadline=None)
def test_a_sampler_reads_or_refuses(valid: Any, data: st.DataObject, settings_: Any) -> None:
    answer = data.draw(mutated(valid))
    requests = REQUESTS[: len(valid["choices"])]
    try:
        check_samples(read_answer(settings_, answer, requests))
    except BadAnswerError as error:
        assert str(error).encode()  # noqa: PT017
    except ConfigError as error:  # the server lacks, or has other, token ids than the dataset
        assert settings_.return_token_ids
        assert "return_token_ids" in error.rule  # noqa: PT017


@given(mutated({"custom_id": "a", "response": {"status_code": 200, "body": CHAT}, "error": None}))
@settings(max_examples=100, deadline=None)
def test_a_batch_result_is_read_or_refused(result: Any) -> None:
    try:
        check_samples(read_answer(SAMPLERS[1], result_body(result), REQUESTS))
    except BadAnswerError as error:
        assert str(error).encode()  # noqa: PT017


PLACES: dict[str, tuple[tuple[Any, ...], Any]] = {
    "an index that is a list": (("index",), [1]),
    "an index that is a flag": (("index",), True),
    "a log-prob that no float holds": (("logprobs", "content", 0, "logprob"), -(10**400)),
    "a log-prob that no float32 holds": (("logprobs", "content", 0, "logprob"), -1e300),
    "a log-prob that is infinite": (("logprobs", "content", 0, "logprob"), -math.inf),
    "a log-prob that is none": (("logprobs", "content", 0, "logprob"), math.nan),
    "a log-prob above 0": (("logprobs", "content", 0, "logprob"), 0.5),
    "a log-prob that is a flag": (("logprobs", "content", 0, "logprob"), True),
    "a prompt's ids that are text": (("prompt_token_ids",), "1 2 3"),
    "a token id above 2^31": (("token_ids",), [2**31, 1]),
    "a finish reason that is a list": (("finish_reason",), ["stop"]),
    "a finish reason of half a character": (("finish_reason",), "\ud800"),
    "a content of half a character": (("message", "content"), "\ud800"),
    "a refusal of half a character": (("message",), {"content": None, "refusal": "\ud800"}),
}


@pytest.mark.parametrize("case", PLACES)
def test_one_wrong_value_fails_its_response_alone(case: str) -> None:
    """The first choice has failed, with a cause that can be stored; the second is a response."""
    answer = json.loads(json.dumps(CHAT))
    (*parents, last), value = PLACES[case]
    holder = answer["choices"][0]
    for key in parents:
        holder = holder[key]
    holder[last] = value
    first, second = read_answer(SAMPLERS[3], answer, REQUESTS)
    check_samples([first, second])
    assert first.error
    assert second.text == "4 2"


def test_a_text_that_is_longer_than_its_tokens_can_be_has_failed() -> None:
    """No token has more than 1,024 characters: 100 MB for a few tokens would only fill memory."""
    longest = 1024 * SAMPLERS[0].max_new_tokens
    answer = json.loads(json.dumps(CHAT))
    for n, failed in ((longest, False), (longest + 1, True)):
        answer["choices"][0] |= {"logprobs": None, "token_ids": None}
        answer["choices"][0]["message"]["content"] = "a" * n
        (sample, _) = read_answer(SAMPLERS[0], answer, REQUESTS)
        assert ((sample.error or "").startswith(f"a text of {n:,} characters")) == failed


def test_a_stop_string_of_half_a_character_is_stored_as_an_escape() -> None:
    answer = json.loads(json.dumps(CHAT))
    answer["choices"][0]["stop_reason"] = "\ud800"
    samples = read_answer(SAMPLERS[0], answer, REQUESTS)
    check_samples(samples)
    assert samples[0].stop_string == "\\ud800"


class Kept:
    """The judgements of one request."""

    def __init__(self) -> None:
        self.all: list[Judgement] = []

    def add(self, judgement: Judgement) -> None:
        self.all.append(judgement)


JUDGES: list[tuple[JudgeSettings | JudgePairsSettings, str]] = [
    (JudgeSettings(kind="judge", base_url="http://a/v1", model="m"), "good. Score: 7"),
    (
        JudgeSettings(kind="judge", base_url="http://a/v1", model="m", json_field="score"),
        '{"score": 7}',
    ),
    (JudgePairsSettings(kind="judge_pairs", base_url="http://a/v1", model="m"), "Verdict: A"),
]


def check_judge(judge: Any, answer: Any) -> None:
    kept = Kept()
    request = JudgeRequest(("g", 0, None), judge, Rubric(judge), [], 0, kept)
    request.body()
    try:
        request.read(answer)
    except BadAnswerError as error:
        assert not kept.all
        kept.add(request.failed(str(error)))
    (judgement,) = kept.all
    assert (judgement.value is None) == (judgement.error is not None)
    rows = [{name: getattr(judgement, name) for name in _SCHEMA.names}]
    assert pa.Table.from_pylist(rows, schema=_SCHEMA).num_rows == 1


@given(st.data(), st.sampled_from(JUDGES))
@settings(max_examples=200, deadline=None)
def test_a_judge_reads_or_refuses(data: st.DataObject, judge: tuple[Any, str]) -> None:
    settings_, text = judge
    choice = {**CHAT["choices"][0], "message": {"content": text}}  # type: ignore[index]
    check_judge(settings_, data.draw(mutated({"model": "m", "choices": [choice]})))


@given(VALUES)
@settings(max_examples=100, deadline=None)
def test_any_value_in_a_judges_json_is_a_rating_or_refused(value: Any) -> None:
    text = json.dumps({"score": value})
    check_judge(JUDGES[1][0], {"choices": [{"text": text, "finish_reason": "stop"}]})


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
REQUEST = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "4"},
    ],
    "tools": [TOOL],
    "reasoning": {"effort": "low"},
    "chat_template_kwargs": {"enable_thinking": False},
}
ITEMS = [
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}]},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "4"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "4"}]},
]
READERS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "request_prompt": (REQUEST, shapes.request_prompt),
    "token ids": ({"prompt": [1, 2, 3]}, shapes.request_prompt),
    "request_arguments": (REQUEST, shapes.request_arguments),
    "responses_prompt": ({"instructions": "i", "input": ITEMS}, shapes.request_prompt),
    "output_reply": (ITEMS, shapes.output_reply),
    "response_ending": (
        {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}},
        shapes.response_ending,
    ),
    "choice_content": (
        {"choices": [{**CHAT["choices"][0], "message": {**MESSAGE, "tool_calls": [CALL]}}]},  # type: ignore[index]
        lambda answer: shapes.choice_content(choice_of(answer, 0)),
    ),
}


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_a_logged_shape_is_read_or_refused(name: str, data: st.DataObject) -> None:
    valid, read = READERS[name]
    try:
        read(data.draw(mutated(valid)))
    except (DataError, BadAnswerError) as error:
        assert str(error)  # noqa: PT017
