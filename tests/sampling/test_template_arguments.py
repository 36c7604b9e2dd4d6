"""Prompts with tools, arguments of the chat template, and a message that the response continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.importing import write_jsonl
from support.sampling import config, local

from gvpo_offline.chat.encoder import Encoder
from gvpo_offline.errors import DataError
from gvpo_offline.sampling.answers import request_body
from gvpo_offline.sampling.prompts import Prompt, prepare_prompts
from gvpo_offline.sampling.settings import sampler_settings
from gvpo_offline.sampling.stage import SampleRequest
from gvpo_offline.tokenizer import load_tokenizer

QUESTION = {"role": "user", "content": "2 + 3?"}
TOOL = {"type": "function", "function": {"name": "add_up", "parameters": {"type": "object"}}}
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{{ '<think>' if enable_thinking }}{% endif %}"
)


def test_the_prompt_is_rendered_with_its_arguments(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    """Rows that differ in them alone are three prompts, not one that occurs three times."""
    rows: list[dict[str, Any]] = [{"prompt": [QUESTION]}]
    rows.append({"prompt": [QUESTION], "tools": [TOOL]})
    rows.append({"prompt": [QUESTION], "chat_template_kwargs": {"enable_thinking": True}})
    tokenizer = load_tokenizer(str(tiny_tokenizer_dir))
    tokenizer.chat_template = TEMPLATE
    inputs = str(write_jsonl(tmp_path / "p.jsonl", rows))
    samplers = {"s": local(tmp_path)}
    settings = config(tmp_path, tiny_tokenizer_dir, samplers, inputs=inputs)
    found = prepare_prompts(settings, Encoder(tokenizer, append_eos=True), {}).read(0)
    texts = [tokenizer.decode(prompt.token_ids) for prompt in found]
    plain = "<|user|>\n2 + 3?<eos>\n<|assistant|>\n"
    assert texts == [plain, f"add_up\n{plain}", f"{plain}<think>"]
    assert [json.loads(p.template_arguments or "{}") for p in found] == [
        {},
        {"tools": [TOOL]},
        {"enable_thinking": True},
    ]


def test_text_has_no_tools(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    rows = [{"prompt": "2 + 3?", "tools": [TOOL]}]
    inputs = str(write_jsonl(tmp_path / "p.jsonl", rows))
    samplers = {"s": local(tmp_path)}
    settings = config(tmp_path, tiny_tokenizer_dir, samplers, inputs=inputs)
    encoder = Encoder(load_tokenizer(str(tiny_tokenizer_dir)), append_eos=True)
    with pytest.raises(DataError, match="belong to a prompt of chat messages"):
        prepare_prompts(settings, encoder, {})


def body(messages: list[dict[str, Any]], arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    settings: Any = sampler_settings(
        "s", {"kind": "openai", "base_url": "http://localhost/v1", "model": "m", "responses": 1,
              "max_new_tokens": 4}
    )  # fmt: skip
    prompt = Prompt(
        *(0, "k", "file", 0, None, json.dumps(messages), None, None),  # type: ignore[arg-type]
        None if arguments is None else json.dumps(arguments),
    )
    return request_body(settings, [SampleRequest(prompt, 0, 17)])


def test_what_a_server_is_sent() -> None:
    call = {"type": "function", "id": "c", "function": {"name": "add_up", "arguments": {"a": 2}}}
    messages = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "5", "tool_call_id": "c"},
    ]
    sent = body(messages, {"tools": [TOOL], "enable_thinking": False})
    # OpenAI's API takes a call's arguments as JSON text.
    assert sent["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"a": 2}'
    assert sent["tools"] == [TOOL]
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}
    assert "continue_final_message" not in sent


def test_a_prompt_that_is_continued() -> None:
    prefilled = [QUESTION, {"role": "assistant", "content": "The sum is"}]
    sent = body(prefilled)
    assert sent["continue_final_message"] is True
    assert sent["add_generation_prompt"] is False
    closed = body(prefilled, {"continue_final_message": False})
    assert "continue_final_message" not in closed
