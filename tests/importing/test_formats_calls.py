"""`import --format langfuse`, `langsmith`, `mlflow`, `weave`: calls of models in traces."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from support.importing import config, read_groups, write_jsonl
from support.reading_formats import fragments

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.importer import import_log

CHAT = [{"role": "system", "content": "Count."}, {"role": "user", "content": "1 + 1?"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def completion(*texts: str, reason: str = "stop", **message: Any) -> dict[str, Any]:
    """An answer of OpenAI's API, as its client returns it."""
    said = {"role": "assistant", "refusal": None, "annotations": [], "audio": None, **message}
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "small-2026",
        "choices": [
            {"index": n, "finish_reason": reason, "logprobs": None,
             "message": {**said, "content": text}}
            for n, text in enumerate(texts)
        ],
        "usage": {"total_tokens": 3},
    }  # fmt: skip


def read(path: Path, name: str, *rows: Any, **settings: Any) -> Any:
    return fragments(write_jsonl(path / "log.jsonl", rows), name, **settings)


# --- Langfuse -------------------------------------------------------------------------------------


def observation(number: int, output: Any, **changed: Any) -> dict[str, Any]:
    """An observation with the fields of `langfuse.api` 5.0.4, ObservationV2."""
    return {
        "id": f"obs-{number}", "traceId": "t1", "type": "GENERATION", "name": "chat",
        "level": "DEFAULT", "statusMessage": None, "parentObservationId": None,
        "input": CHAT, "output": output, "model": "small", "modelParameters": {"temperature": 1},
        "metadata": {},
    } | changed  # fmt: skip


def test_langfuse(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """Observations as the API, and as exports to storage, hold them; scores in another file."""
    said = {"role": "assistant", "content": "2"}
    stored = observation(2, json.dumps(said), input=json.dumps({"messages": CHAT}))
    stored["provided_model_name"] = stored.pop("model")
    rows = [observation(1, "3"), stored, observation(3, None, type="SPAN")]
    path = write_jsonl(tmp_path / "observations.jsonl", rows)
    scores = [
        {"id": "s1", "observationId": "obs-1", "name": "right", "value": 0, "dataType": "NUMERIC"},
        {"id": "s2", "observation_id": "obs-2", "name": "right", "value": 1, "string_value": "yes"},
    ]
    made = write_jsonl(tmp_path / "scores.jsonl", scores)
    settings = {
        "format": "langfuse", "rewards": str(made),
        "tokenizer_name_or_path": str(tiny_tokenizer_dir),
    }  # fmt: skip
    result = import_log(config(path, tmp_path / "out", **settings))
    (group,) = read_groups(tmp_path / "out")
    assert json.loads(group.messages or "") == CHAT
    assert (group.responses, group.samplers) == (("3", "2"), ("small", "small"))
    assert group.response_ids == ("obs-1", "obs-2")
    assert group.rewards is not None
    assert group.rewards.tolist() == [0.0, 1.0]
    assert result.counts["dropped_other_spans"] == 1


def test_langfuse_traces(tmp_path: Path) -> None:
    """A score of a trace is that of its only generation; with several it belongs to none."""
    trace = {
        "id": "t1", "observations": [observation(1, "2"), observation(2, None, type="TOOL")],
        "scores": [{"traceId": "t1", "observationId": None, "name": "right", "value": 0.5}],
    }  # fmt: skip
    (found,), counts = read(tmp_path, "langfuse", trace)
    assert (found.rewards, counts["unused_annotations"]) == ([0.5], 0)
    trace["observations"] = [observation(1, "2"), observation(2, "3")]
    found, counts = read(tmp_path, "langfuse", trace)
    assert ([f.rewards for f in found], counts["unused_annotations"]) == ([None, None], 1)


# --- LangSmith ------------------------------------------------------------------------------------


def constructed(kind: str, **kwargs: Any) -> dict[str, Any]:
    path = ["langchain", "schema", "messages", kind]
    return {"lc": 1, "type": "constructor", "id": path, "kwargs": kwargs}


def run(number: int, outputs: Any, **changed: Any) -> dict[str, Any]:
    """A run with the fields of `langsmith.schemas.Run` 0.15.1, as LangChain's tracer fills them."""
    roles = ("SystemMessage", "HumanMessage")
    sent = [constructed(kind, content=m["content"]) for kind, m in zip(roles, CHAT, strict=True)]
    return {
        "id": f"run-{number}", "trace_id": "t", "name": "ChatOpenAI", "run_type": "llm",
        "inputs": {"messages": [sent]}, "outputs": outputs, "error": None,
        "extra": {"metadata": {"ls_model_name": "small"}, "invocation_params": {"tools": [TOOL]}},
        "feedback_stats": {"right": {"n": 1, "avg": 1.0, "values": {}}},
    } | changed  # fmt: skip


def generated(text: str, reason: str = "stop", **kwargs: Any) -> dict[str, Any]:
    message = constructed("AIMessage", content=text, response_metadata={}, **kwargs)
    entry = {"text": text, "generation_info": {"finish_reason": reason}, "message": message}
    return {"generations": [[entry]], "llm_output": None}


LATER = {"type": "ai", "content": "2"}


def test_langsmith(tmp_path: Path) -> None:
    call = {"name": "f", "args": {"x": 1}, "id": "c", "type": "tool_call"}
    rows = [
        run(1, generated("2", "length")),
        run(2, generated("", tool_calls=[call])),
        run(3, {"messages": [LATER]}, inputs=json.dumps({"messages": CHAT})),
        run(4, {}, run_type="tool"),
    ]  # fmt: skip
    found, counts = read(tmp_path, "langsmith", *rows)
    assert [json.loads(f.messages or "") for f in found] == [CHAT] * 3
    assert [f.responses for f in found] == [["2"], [""], ["2"]]
    assert [f.truncated for f in found] == [[True], [False], [False]]
    assert [f.rewards for f in found] == [[1.0]] * 3
    assert {f.template_arguments for f in found} == {json.dumps({"tools": [TOOL]})}
    assert found[0].samplers == ["small"]
    (message,) = json.loads((found[1].response_messages or [""])[0] or "")
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert counts["dropped_other_spans"] == 1
    several = run(1, generated("2"), feedback_stats={"right": {"n": 2, "avg": 0.5}})
    with pytest.raises(DataError, match="right: 2, of which feedback_stats has the mean"):
        read(tmp_path, "langsmith", several)


# --- MLflow ---------------------------------------------------------------------------------------


def mlflow_trace(*outputs: Any, assessments: Any = (), **attributes: Any) -> dict[str, Any]:
    """A trace as `Trace.to_dict` of mlflow 3.17 writes it, with spans of the OpenAI integration."""

    def span(number: int, kind: str, returned: Any) -> dict[str, Any]:
        request = {"model": "small", "messages": CHAT, "tools": [TOOL]}
        return {
            "trace_id": "x", "span_id": base64.b64encode(bytes([0] * 7 + [number])).decode(),
            "parent_span_id": None, "name": "Completions",
            "status": {"code": "STATUS_CODE_OK", "message": ""}, "events": [], "links": [],
            "attributes": {
                "mlflow.spanType": json.dumps(kind), "mlflow.spanInputs": json.dumps(request),
                "mlflow.spanOutputs": json.dumps(returned), **attributes,
            },
        }  # fmt: skip

    spans = [span(n, "CHAT_MODEL", returned) for n, returned in enumerate(outputs, 1)]
    return {
        "info": {"trace_id": "tr-1", "state": "OK", "assessments": list(assessments)},
        "data": {"spans": [span(9, "AGENT", "x"), *spans]},
    }


def assessment(value: Any, span: str | None = None, **changed: Any) -> dict[str, Any]:
    found = {"assessment_name": "correct", "feedback": {"value": value}, "span_id": span}
    return {**found, **changed}


def test_mlflow(tmp_path: Path) -> None:
    """Assessments of a span, or of the trace of the only one; yes and no are 1 and 0."""
    replaced = assessment("no", valid=False)
    expected = {"assessment_name": "target", "expectation": {"value": "2"}}
    first = mlflow_trace(completion("2"), assessments=[replaced, assessment("yes"), expected])
    ids = [f"{n:016x}" for n in (1, 2)]
    given = [assessment("no", ids[1]), assessment("yes", ids[0]), assessment("yes")]
    second = mlflow_trace(completion("2"), completion("3", reason="length"), assessments=given)
    table = {"trace_id": "tr-1", "trace": json.dumps(first)}
    found, counts = read(tmp_path, "mlflow", first, second, table)
    assert [f.rewards for f in found] == [[1.0], [1.0], [0.0], [1.0]]
    assert [f.responses for f in found] == [["2"], ["2"], ["3"], ["2"]]
    assert found[2].truncated == [True]
    assert found[0].samplers == ["small-2026"]
    assert found[0].response_ids == [ids[0]]
    assert json.loads(found[0].messages or "") == CHAT
    assert json.loads(found[0].template_arguments or "") == {"tools": [TOOL]}
    assert (counts["dropped_other_spans"], counts["unused_annotations"]) == (3, 1)


# --- Weave ----------------------------------------------------------------------------------------


def weave_call(output: Any, op: str = "openai.chat.completions.create", **changed: Any) -> Any:
    """A call of Weave's OpenAI integration; no public export was found to check its fields on."""
    return {
        "id": "0198", "project_id": "e/p", "op_name": f"weave:///e/p/op/{op}:f00d", "trace_id": "t",
        "parent_id": None, "attributes": {}, "exception": None,
        "inputs": {"model": "small", "messages": CHAT, "self": "<openai.Completions>"},
        "output": output, "summary": {"usage": {}, "weave": {"status": "success"}},
    } | changed  # fmt: skip


def test_weave(tmp_path: Path) -> None:
    feedback = [
        {"feedback_type": "wandb.runnable.judge", "payload": {"output": {"style": 2, "ok": True}}},
        {"feedback_type": "wandb.annotation.human", "payload": {"value": 0.5}},
        {"feedback_type": "wandb.reaction.1", "payload": {"emoji": "👍"}},
    ]
    scored = weave_call(completion("2"), summary={"weave": {"feedback": feedback}})
    rows = [scored, weave_call("x", op="Agent.step")]
    weights = {"judge.style": 1.0, "judge.ok": 0.5, "human": 2.0}
    (found,), counts = read(tmp_path, "weave", *rows, reward_weights=weights)
    assert found.rewards == [2 + 0.5 * 1 + 2.0 * 0.5]
    assert (found.responses, found.samplers) == (["2"], ["small-2026"])
    assert counts["dropped_other_spans"] == 1
    with pytest.raises(DataError, match="has one score, which is the reward; received 3"):
        read(tmp_path, "weave", scored)
    with pytest.raises(ConfigError, match="tone; the log has"):
        read(tmp_path, "weave", scored, reward_weights={"tone": 1.0})


# --- What all four share --------------------------------------------------------------------------


def test_choices_and_the_responses_api(tmp_path: Path) -> None:
    found, _ = read(tmp_path, "weave", weave_call(completion("2", "3")))
    assert [f.responses for f in found] == [["2"], ["3"]]
    assert [f.response_ids for f in found] == [["0198"], ["0198#1"]]
    item = {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "2"}],
    }
    answer = {"object": "response", "status": "completed", "model": "m", "output": [item]}
    sent = {"model": "m", "input": "1 + 1?", "instructions": "Count."}
    (found,), _ = read(
        tmp_path, "weave", weave_call(answer, op="openai.responses.create", inputs=sent)
    )
    assert (json.loads(found.messages or ""), found.responses) == (CHAT, ["2"])


def test_other_clients(tmp_path: Path) -> None:
    """Anthropic's answers, and LangChain's messages as Langfuse writes them."""
    answer = {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "large",
        "content": [{"type": "text", "text": "2"}], "stop_reason": "max_tokens",
        "stop_sequence": None, "usage": {"input_tokens": 9},
    }  # fmt: skip
    sent = {"model": "large", "max_tokens": 1, "system": "Count.", "messages": CHAT[1:]}
    call = weave_call(answer, op="anthropic.Messages.create", inputs=sent)
    (found,), _ = read(tmp_path, "weave", call)
    assert (json.loads(found.messages or ""), found.responses) == (CHAT, ["2"])
    assert (found.truncated, found.samplers) == ([True], ["large"])
    called = {
        "role": "assistant", "content": "", "additional_kwargs": {"refusal": None},
        "tool_calls": [{"name": "f", "args": {"x": 1}, "id": "c", "type": "tool_call"}],
    }  # fmt: skip
    (found,), _ = read(tmp_path, "langfuse", observation(1, called))
    assert json.loads((found.response_messages or [""])[0] or "") == [
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "id": "c", "function": {"name": "f", "arguments": {"x": 1}}},
        ]},
    ]  # fmt: skip
    gemini = weave_call({"candidates": []}, op="google.genai.models.Models.generate_content")
    with pytest.raises(DataError, match="what came back from a model is"):
        read(tmp_path, "weave", gemini)


@pytest.mark.parametrize(
    ("name", "row", "cause"),
    [
        ("langfuse", observation(1, None, level="ERROR", statusMessage="429"), "ERROR: 429"),
        ("langsmith", run(1, None, error="RateLimit"), "the error 'RateLimit'"),
        ("weave", weave_call(None, exception="Timeout"), "the exception 'Timeout'"),
        ("weave", weave_call(completion("", reason="content_filter")), "'refusal'"),
        ("langfuse", observation(1, completion("x", refusal="no")), "'refusal'"),
    ],
)
def test_failed_calls(name: str, row: Any, cause: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"1 that failed: row 0: .*{cause}"):
        read(tmp_path, name, row)
    assert read(tmp_path, name, row, failed_responses="drop")[0] == []


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]


@pytest.mark.parametrize(
    ("name", "row", "match"),
    [
        ("langfuse", {"id": "t", "input": "a"}, "a row is an observation"),
        ("langfuse", observation(1, "2", input=None), "what was sent to a model is messages"),
        ("langfuse", observation(1, "2", input={"question": "?"}), "what was sent to a model is"),
        ("langfuse", observation(1, {"answer": 2}), "what came back from a model is"),
        ("langfuse", observation(1, None), "what came back from a model is"),
        ("langfuse", observation(1, "2", input=IMAGE), "a part of type 'image_url'"),
        ("langsmith", {"id": "r"}, "a row is a run"),
        ("langsmith", run(1, generated("2"), inputs={"messages": [[], []]}), "a call has one"),
        ("langsmith", run(1, {"messages": [{"type": "chat", "content": ""}]}), "or a type of"),
        ("mlflow", {"info": {}}, "a row is a trace with its spans"),
        ("weave", {"id": "c"}, "a row is a call"),
        (
            "weave",
            weave_call(completion("1", "2"), feedback=[
                {"feedback_type": "wandb.annotation.a", "payload": {"value": 1}},
            ]),
            "2 responses with one value of a",
        ),
    ],
)  # fmt: skip
def test_refuses(name: str, row: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=match) as caught:
        read(tmp_path, name, row)
    assert caught.value.row == 0
