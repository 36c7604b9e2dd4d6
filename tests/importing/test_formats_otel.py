"""`import --format otel`: spans with the attributes of OpenTelemetry's GenAI conventions, of
OpenInference, and the numbered ones before them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.importing import config, read_groups, write_jsonl
from support.reading_formats import fragments

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.formats.shared.spans import as_list, span_attributes
from gvpo_offline.importing.importer import import_log

QUESTION = {"role": "user", "content": "How long is it valid?"}


def inferred(answer: str, **further: Any) -> dict[str, Any]:
    """Attributes as the OpenInference instrumentation of OpenAI's client writes them: those of
    Arize-ai/openinference, js/packages/openinference-instrumentation-langchain, test/langchainV2,
    the snapshot of ChatOpenAI, with the output of OpenAI's API."""
    body = {"choices": [{"finish_reason": "stop", "index": 0}], "object": "chat.completion"}
    return {
        "input.mime_type": "application/json",
        "llm.input_messages.0.message.content": QUESTION["content"],
        "llm.input_messages.0.message.role": "user",
        "llm.invocation_parameters": '{"model":"m","temperature":0}',
        "llm.model_name": "m",
        "llm.output_messages.0.message.content": answer,
        "llm.output_messages.0.message.role": "assistant",
        "llm.token_count.completion": 5,
        "openinference.span.kind": "LLM",
        "output.mime_type": "application/json",
        "output.value": json.dumps(body),
        **further,
    }


def exported(number: int, attributes: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """A span as the console exporter of the Python SDK and Phoenix's API write it."""
    return {
        "name": "ChatCompletion",
        "context": {"trace_id": "0x1", "span_id": f"0x{number:016x}", "trace_state": "[]"},
        "parent_id": None,
        "start_time": "2026-09-01T10:00:00Z",
        "status": {"status_code": "OK"},
        "attributes": attributes,
        "events": [],
    } | changed


def otlp_value(value: Any) -> dict[str, Any]:
    if isinstance(value, list):
        return {"arrayValue": {"values": [otlp_value(part) for part in value]}}
    return {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}


def otlp(spans: list[dict[str, Any]]) -> dict[str, Any]:
    """A line of the collector's file exporter: attributes are lists of keys and values."""
    found = [
        {
            "traceId": "5b8e", "spanId": span["context"]["span_id"].removeprefix("0x").upper(),
            "name": span["name"], "kind": 3, "status": {}, "events": span["events"],
            "attributes": [
                {"key": key, "value": otlp_value(value)}
                for key, value in span["attributes"].items()
            ],
        }
        for span in spans
    ]  # fmt: skip
    return {"resourceSpans": [{"resource": {"attributes": []}, "scopeSpans": [{"spans": found}]}]}


def frame(spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of Phoenix's `get_spans_dataframe`: nested lists, flat columns."""
    return [
        {
            "span_kind": "LLM", "parent_id": None, "status_code": "OK", "status_message": "",
            "context.span_id": span["context"]["span_id"].removeprefix("0x"),
            "attributes.llm.model_name": span["attributes"]["llm.model_name"],
            "attributes.output.value": span["attributes"]["output.value"],
            **{
                f"attributes.llm.{side}_messages": [
                    {
                        f"message.{part}": span["attributes"][
                            f"llm.{side}_messages.0.message.{part}"
                        ]
                        for part in ("role", "content")
                    }
                ]
                for side in ("input", "output")
            },
        }
        for span in spans
    ]  # fmt: skip


SPANS = [exported(n, inferred(answer)) for n, answer in enumerate(("A year.", "Two."), 10)]


def test_every_export_of_the_spans_gives_the_same(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(frame(SPANS)), tmp_path / "frame.parquet")
    nested = [{**s, "attributes": json.dumps(s["attributes"])} for s in SPANS]
    (tmp_path / "api.json").write_text(json.dumps({"data": SPANS, "next_cursor": None}))
    paths = [
        write_jsonl(tmp_path / "spans.jsonl", SPANS),
        write_jsonl(tmp_path / "text.jsonl", nested),
        write_jsonl(tmp_path / "otlp.jsonl", [otlp(SPANS)]),
        tmp_path / "frame.parquet",
        tmp_path / "api.json",
    ]
    for path in paths:
        found, counts = fragments(path, "otel")
        assert [f.responses for f in found] == [["A year."], ["Two."]], path.name
        assert {f.messages for f in found} == {json.dumps([QUESTION])}
        assert [f.response_ids for f in found] == [["000000000000000a"], ["000000000000000b"]]
        assert [f.samplers for f in found] == [["m"], ["m"]]
        assert [(f.rewards, f.truncated) for f in found] == [(None, [False])] * 2
        assert counts["dropped_other_spans"] == 0
    (tmp_path / "whole.json").write_text(json.dumps(otlp(SPANS), indent=1))
    below = "resourceSpans[*].scopeSpans[*].spans"
    found, _ = fragments(tmp_path / "whole.json", "otel", rows_at=below)
    assert [(f.row, f.responses) for f in found] == [(0, ["A year."]), (1, ["Two."])]


def test_annotations_in_another_file(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """As Phoenix's API writes them; each name is a component."""
    path = write_jsonl(tmp_path / "spans.jsonl", SPANS)
    annotations = [
        {"id": f"{n}", "span_id": f"{n:016x}", "name": name, "annotator_kind": "HUMAN",
         "result": {"label": label, "score": score, "explanation": None}}
        for n in (10, 11, 12)
        for name, label, score in (
            ("helpful", None, n - 10.0), ("tone", "good", None), ("note", None, None),
        )
    ]  # fmt: skip
    scores = write_jsonl(tmp_path / "annotations.jsonl", annotations)
    settings = {
        "format": "otel", "rewards": str(scores), "tokenizer_name_or_path": str(tiny_tokenizer_dir),
        "reward_weights": {"helpful": 2.0, "tone": 0.5}, "reward_map": {"good": 1},
    }  # fmt: skip
    result = import_log(config(path, tmp_path / "out", **settings))
    (group,) = read_groups(tmp_path / "out")
    assert group.rewards is not None
    assert group.rewards.tolist() == [2.0 * 0 + 0.5, 2.0 * 1 + 0.5]
    assert result.counts["unused_annotations"] == 1
    with pytest.raises(DataError, match="has one annotation, which is the reward; received 2"):
        fragments(path, "otel", rewards=str(scores))
    with pytest.raises(ConfigError, match="speed; the log has helpful, tone"):
        fragments(path, "otel", rewards=str(scores), reward_weights={"speed": 1.0})
    twice = [annotations[0], {**annotations[3], "span_id": "000000000000000a"}]
    again = write_jsonl(tmp_path / "again.jsonl", twice)
    with pytest.raises(DataError, match=r"helpful: 0.0 and 1.0") as caught:
        fragments(path, "otel", rewards=str(again))
    assert (caught.value.file, caught.value.row) == (str(again), 1)
    nameless = write_jsonl(tmp_path / "nameless.jsonl", [{"trace_id": "1", "name": "a"}])
    with pytest.raises(DataError, match="an annotation names what it scores"):
        fragments(path, "otel", rewards=str(nameless))


CALL = {"type": "tool_call", "id": "c", "name": "f", "arguments": {"x": 1}}


def conventional(outputs: list[Any], **further: Any) -> dict[str, Any]:
    """Attributes of the GenAI conventions 1.37: messages as JSON text."""
    asked = [
        {"role": "user", "parts": [{"type": "text", "content": "1 + 1?"}]},
        {"role": "assistant", "parts": [CALL]},
        {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c", "response": 2}]},
    ]
    tools = [{"type": "function", "name": "f", "description": "Adds.", "parameters": {}}]
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "small",
        "gen_ai.response.model": "small-2026",
        "gen_ai.system_instructions": json.dumps([{"type": "text", "content": "Count."}]),
        "gen_ai.input.messages": json.dumps(asked),
        "gen_ai.output.messages": json.dumps(outputs),
        "gen_ai.tool.definitions": json.dumps(tools),
        "gen_ai.response.finish_reasons": ["stop"],
    } | further


def said(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "parts": [{"type": "text", "content": text}]} | (
        {} if reason is None else {"finish_reason": reason}
    )


def test_genai_conventions(tmp_path: Path) -> None:
    """Each message of the output is a choice. The evaluation is an event of the span."""
    attributes = [
        {"key": "gen_ai.evaluation.name", "value": {"stringValue": "correct"}},
        {"key": "gen_ai.evaluation.score.value", "value": {"doubleValue": 0.9}},
    ]
    event = {"name": "gen_ai.evaluation.result", "attributes": attributes}
    thought = {"type": "reasoning", "content": "Easy."}
    first = said("2", "length")
    first["parts"].insert(0, thought)
    spans = [
        exported(1, conventional([first]), events=[event]),
        exported(2, {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "f"}),
    ]
    (found,), counts = fragments(write_jsonl(tmp_path / "a.jsonl", [otlp(spans)]), "otel")
    assert counts["dropped_other_spans"] == 1
    function = {"name": "f", "arguments": {"x": 1}}
    assert json.loads(found.messages or "") == [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "",
         "tool_calls": [{"type": "function", "id": "c", "function": function}]},
        {"role": "tool", "content": "2", "tool_call_id": "c"},
    ]  # fmt: skip
    assert json.loads((found.response_messages or [""])[0] or "") == [
        {"role": "assistant", "content": "2", "reasoning_content": "Easy."}
    ]
    definition = {"name": "f", "description": "Adds.", "parameters": {}}
    assert json.loads(found.template_arguments or "") == {
        "tools": [{"type": "function", "function": definition}]
    }
    assert (found.samplers, found.truncated, found.rewards) == (["small-2026"], [True], [0.9])
    two = exported(3, conventional([said("2", "stop"), said("3", "content_filter")]))
    path = write_jsonl(tmp_path / "b.jsonl", [two])
    with pytest.raises(DataError, match="the finish reason 'content_filter'"):
        fragments(path, "otel")
    (found,), _ = fragments(path, "otel", failed_responses="drop")
    assert found.responses == ["2"]


def test_numbered_attributes(tmp_path: Path) -> None:
    """What traceloop's instrumentations wrote before the conventions had messages."""
    attributes = {
        "llm.request.type": "chat",
        "gen_ai.request.model": "small",
        "gen_ai.prompt.0.role": "user",
        "gen_ai.prompt.0.content": "1 + 1?",
        "gen_ai.completion.0.role": "assistant",
        "gen_ai.completion.0.finish_reason": "tool_calls",
        "gen_ai.completion.0.tool_calls.0.id": "c",
        "gen_ai.completion.0.tool_calls.0.name": "f",
        "gen_ai.completion.0.tool_calls.0.arguments": '{"x": 1}',
    }
    (found,), _ = fragments(write_jsonl(tmp_path / "a.jsonl", [exported(1, attributes)]), "otel")
    assert json.loads(found.messages or "") == [{"role": "user", "content": "1 + 1?"}]
    (message,) = json.loads((found.response_messages or [""])[0] or "")
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


def test_choices_parts_and_tools_of_openinference(tmp_path: Path) -> None:
    choices = [{"finish_reason": reason} for reason in ("stop", "length")]
    output = "llm.output_messages.1.message"
    tool = {"type": "function", "function": {"name": "f"}}
    attributes = inferred("A year.", **{
        f"{output}.role": "assistant",
        f"{output}.contents.0.message_content.type": "text",
        f"{output}.contents.0.message_content.text": "Two",
        f"{output}.tool_calls.0.tool_call.function.name": "f",
        f"{output}.tool_calls.0.tool_call.function.arguments": "{}",
        "llm.tools.0.tool.json_schema": json.dumps(tool),
        "output.value": json.dumps({"choices": choices}),
    })  # fmt: skip
    found, _ = fragments(write_jsonl(tmp_path / "a.jsonl", [exported(1, attributes)]), "otel")
    assert [f.responses for f in found] == [["A year."], ["Two"]]
    assert [f.truncated for f in found] == [[False], [True]]
    assert [f.response_ids for f in found] == [["0000000000000001"], ["0000000000000001#1"]]
    assert json.loads(found[0].template_arguments or "") == {"tools": [tool]}
    (message,) = json.loads((found[1].response_messages or [""])[0] or "")
    assert message["tool_calls"][0]["function"]["name"] == "f"


def test_the_other_apis_of_openai(tmp_path: Path) -> None:
    """Of the responses API each item is a message; of completions each choice is a text. A content
    of type tool_use repeats a tool call."""
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Easy."}]}
    part = {"type": "output_text", "text": "A year."}
    items = [thought, {"type": "message", "role": "assistant", "content": [part]}]
    body = {"object": "response", "status": "incomplete", "output": items}
    second = {"llm.output_messages.1.message.role": "assistant", "output.value": json.dumps(body)}
    plain = {
        "openinference.span.kind": "LLM", "llm.model_name": "m", "llm.finish_reason": "length",
        "llm.prompts.0.prompt.text": "1 + 1 =", "llm.choices.0.completion.text": " 2",
    }  # fmt: skip
    message = "llm.output_messages.0.message"
    used = inferred("", **{
        f"{message}.contents.0.message_content.type": "tool_use",
        f"{message}.tool_calls.0.tool_call.function.name": "f",
    })  # fmt: skip
    rows = [exported(n, a) for n, a in enumerate((inferred("", **second), plain, used))]
    found, _ = fragments(write_jsonl(tmp_path / "a.jsonl", rows), "otel")
    assert json.loads((found[0].response_messages or [""])[0] or "") == [
        {"role": "assistant", "content": "A year.", "reasoning_content": "Easy."}
    ]
    assert [f.truncated for f in found] == [[True], [True], [False]]
    assert (found[1].prompt, found[1].responses) == ("1 + 1 =", [" 2"])
    assert '"name": "f"' in ((found[2].response_messages or [""])[0] or "")


def test_failed_spans(tmp_path: Path) -> None:
    status = {"status_code": "ERROR", "description": "rate limited"}
    bare = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "m"}
    rows = [exported(1, bare, status=status), exported(2, inferred("x"), status={"code": 2})]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"2 that failed: row 0: .*rate limited; row 1"):
        fragments(path, "otel")
    assert fragments(path, "otel", failed_responses="drop")[0] == []


NAMES = st.text("abcxyz_", min_size=1, max_size=3)
TREES = st.recursive(
    st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3)
        | st.dictionaries(NAMES, inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
)


def flattened(value: Any, name: str) -> dict[str, Any]:
    """The attributes of a nested value, one for each leaf."""
    if not isinstance(value, list | dict):
        return {name: value}
    parts = enumerate(value) if isinstance(value, list) else value.items()
    return {k: v for step, part in parts for k, v in flattened(part, f"{name}.{step}").items()}


def with_lists(value: Any) -> Any:
    """Records whose names are positions, as lists."""
    if not isinstance(value, dict):
        return value
    if all(name.isdigit() for name in value):
        return [with_lists(part) for part in as_list(value)]
    return {name: with_lists(part) for name, part in value.items()}


@given(TREES)
def test_flattening_attributes_loses_nothing(tree: Any) -> None:
    attributes = flattened(tree, "llm.x")
    found = span_attributes({"attributes": attributes}, ("llm",))
    assert with_lists(found["llm"]["x"]) == tree
    listed = [{"key": key, "value": otlp_value(value)} for key, value in attributes.items()]
    assert span_attributes({"attributes": listed}, ("llm",)) == found


PICTURE = "llm.input_messages.0.message.contents.0.message_content"
SCORE = {"name": "a", "score": 1}
BLOB = {"role": "assistant", "parts": [{"type": "blob", "modality": "image", "content": "…"}]}


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"a": 1}, "a row is a span, or a list of spans; received the columns a"),
        (exported(1, {"gen_ai.operation.name": "chat"}), "the attributes gen_ai.operation"),
        (exported(1, inferred("x", **{f"{PICTURE}.type": "image"})), "a part of type 'image'"),
        (exported(1, conventional([BLOB])), "a part of type 'blob' in a message of role assistant"),
        (
            exported(1, inferred("x", **{"llm.output_messages.1.message.role": "assistant"})),
            "received 2 messages, 1 choices",
        ),
        (
            exported(1, conventional([said("1"), said("2")]), annotations=[SCORE]),
            "received 2 responses with one value of a",
        ),
        (
            exported(1, inferred("x"), annotations=[{"name": "a", "label": "good"}]),
            "the annotation 'a' is a number; received 'good'",
        ),
        (exported(1, inferred("x"), annotations=[{"score": 1}]), "an annotation has a name"),
        (
            exported(1, inferred("x", **{"llm.input_messages.0.message.role": "assistant"})),
            "whether the response continues that message",
        ),
        (exported(1, conventional([said("1", "why")])), "a finish reason is"),
        (exported(1, conventional([{"role": "user", "parts": []}])), "begins with an assistant"),
    ],
)  # fmt: skip
def test_refuses(row: dict[str, Any], match: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "spans.jsonl", [SPANS[0], row])
    with pytest.raises(DataError, match=match) as caught:
        fragments(path, "otel", missing_rewards="drop")
    assert caught.value.row == 1
