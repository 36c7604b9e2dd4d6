"""Messages as logs hold them, and the one form that they become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.importing import config, read_groups, write_jsonl

from gvpo_offline import conversations
from gvpo_offline.errors import DataError
from gvpo_offline.importing.importer import import_log
from gvpo_offline.importing.settings import Columns
from gvpo_offline.messages import normalised, response_messages

USER = {"role": "user", "content": "2 + 3?"}


def test_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "2 + "}, {"type": "input_text", "text": "3?"}]
    assert normalised({"role": "user", "content": parts}) == USER
    # LLaMA-Factory's parts hold their text in `value`.
    v1 = [{"type": "text", "value": "2 + 3?"}]
    assert normalised({"role": "user", "content": v1, "loss_weight": 0.0})["content"] == "2 + 3?"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "input_audio", "input_audio": {}},
        {"type": "video", "video": "x.mp4"},
    ],
)
def test_other_parts_are_refused_by_name(part: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=rf"a part of type '{part['type']}' in a message of role"):
        normalised({"role": "user", "content": [{"type": "text", "text": "what is"}, part]})


def test_nulls_and_text_arguments() -> None:
    """What Parquet adds to a tool call, and the JSON text that OpenAI's API has, are one call."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    columnar = {"type": "function", "id": None, "function": {"name": "add", "arguments": {
        "x": 1, "y": None, "deep": {"z": None}}}}  # fmt: skip
    openai = {"type": "function", "function": {"name": "add", "arguments": '{"x": 1, "y": null}'}}
    found = [
        normalised({"role": "assistant", "content": None, "tool_calls": [one], "refusal": None})
        for one in (call, columnar, openai)
    ]
    assert found[0] == found[2]
    assert found[0]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    # An empty record is an argument, null is none.
    assert found[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1, "deep": {}}
    # Text that is no JSON object stays as the model wrote it.
    broken = {"function": {"name": "add", "arguments": '{"x": '}}
    message = normalised({"role": "assistant", "content": "", "tool_calls": [broken]})
    assert message["tool_calls"][0]["function"]["arguments"] == '{"x": '


def test_one_name_for_reasoning() -> None:
    for name in ("reasoning", "reasoning_content", "thinking"):
        message = normalised({"role": "assistant", "content": "5", name: "2 and 3"})
        assert message == {"role": "assistant", "content": "5", "reasoning_content": "2 and 3"}


def test_the_old_form_of_a_call() -> None:
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    function = {"name": "f", "arguments": {}}
    assert normalised(old)["tool_calls"] == [{"type": "function", "function": function}]


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ({"content": "x"}, "a message has a role"),
        ({"role": "user", "content": None}, "the content of a message is text"),
        ({"role": "user", "content": {"text": "x"}}, "the content of a message is text"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "has a function with a name"),
    ],
)
def test_bad_messages(message: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        normalised(message)


def test_responses() -> None:
    one = {"role": "assistant", "content": [{"type": "text", "text": "5"}]}
    assert conversations.response([one]) == conversations.Reply("5")
    assert conversations.response(one) == conversations.Reply("5")
    tool = {"role": "tool", "content": "5"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    several = conversations.response([call, tool, one])
    assert several.text == "5"
    assert several.messages is not None
    assert [m["role"] for m in json.loads(several.messages)] == ["assistant", "tool", "assistant"]
    # What a tool returned last, nobody read.
    assert [m["role"] for m in response_messages([call, tool])] == ["assistant"]
    with pytest.raises(DataError, match="was not refused; received refusal: 'I cannot'"):
        conversations.response([{"role": "assistant", "content": None, "refusal": "I cannot"}])


def test_arguments_of_the_template() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": None}}
    found = conversations.template_arguments(
        {"tools": [tool], "chat_template_kwargs": {"enable_thinking": False, "unset": None}}
    )
    assert json.loads(found or "") == {
        "enable_thinking": False,
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    assert conversations.template_arguments(
        {"tools": json.dumps([tool])}
    ) == conversations.template_arguments({"tools": [json.dumps(tool)]})
    assert conversations.template_arguments({"tools": [], "chat_template_kwargs": None}) is None
    with pytest.raises(DataError, match="tools is a list, or its JSON"):
        conversations.template_arguments({"tools": {"name": "f"}})


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}{% endfor %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def test_json_and_parquet_give_the_same_groups(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """Two tools with other arguments: Parquet unites their fields and fills them with nulls."""
    rows = []
    for name, arguments in (("add", {"x": 2, "y": 3}), ("say", {"text": "hello"})):
        call = {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}
        prompt = [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "5", "tool_call_id": "c"},
        ]
        rows += [{"prompt": prompt, "response": text, "reward": float(i)}
                 for i, text in enumerate(("It is 5.", "4"))]  # fmt: skip
    template = tmp_path / "tools.jinja"
    template.write_text(TEMPLATE)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "log.parquet")
    found = []
    for number, log in enumerate(
        (write_jsonl(tmp_path / "log.jsonl", rows), tmp_path / "log.parquet")
    ):
        settings = config(
            log,
            tmp_path / f"out{number}",
            tokenizer_name_or_path=str(tiny_tokenizer_dir),
            chat_template=str(template),
            columns=Columns(),
        )
        import_log(settings)
        found.append(read_groups(tmp_path / f"out{number}"))
    assert [len(groups) for groups in found] == [2, 2]
    for one, other in zip(*found, strict=True):
        assert one.group_id == other.group_id
        assert one.messages == other.messages
        assert one.prompt_token_ids.tolist() == other.prompt_token_ids.tolist()
