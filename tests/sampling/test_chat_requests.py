"""What chat prompts with more than texts become in requests to a server, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from gvpo_offline.conversations import messages
from gvpo_offline.importing.as_chat import ChatPrompts
from gvpo_offline.sampling.answers import request_body
from gvpo_offline.sampling.prompts import Prompt
from gvpo_offline.sampling.settings import OpenAISettings
from gvpo_offline.sampling.stage import SampleRequest

USER = {"role": "user", "content": "2 + 3?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"x": 2}}}


def body(*turns: dict[str, Any]) -> dict[str, Any]:
    prompt = Prompt(0, "", "", 0, None, messages(turns), None, np.array([1], np.int32))
    settings = OpenAISettings(model="m", base_url="http://localhost", responses=1, api="chat")
    return request_body(settings, [SampleRequest(prompt, 0, 0)])


def test_parts_are_joined_in_the_request() -> None:
    parts = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "3?"}]
    assert body({"role": "user", "content": parts})["messages"] == [USER]


@pytest.mark.parametrize("arguments", [{"x": 2}, '{"x": 2}'])
def test_arguments_of_calls_are_text_in_the_request(arguments: Any) -> None:
    """OpenAI's API takes them as JSON text; the log may hold a record."""
    function = {"name": "add", "arguments": arguments}
    call = {"role": "assistant", "content": None, "tool_calls": [{**CALL, "function": function}]}
    result = {"role": "tool", "content": "5", "tool_call_id": "c1"}
    found = body(USER, call, result)
    sent = found["messages"][1]["tool_calls"][0]["function"]
    assert sent == {"name": "add", "arguments": '{"x": 2}'}
    assert "continue_final_message" not in found


def test_a_last_assistant_message_is_continued_by_the_server_too() -> None:
    """The dataset's prompt ends within it; a server closes it unless the request says so."""
    found = body(USER, {"role": "assistant", "content": "The sum is"})
    assert found["continue_final_message"] is True
    assert found["add_generation_prompt"] is False


def test_a_developers_message_is_a_system_message() -> None:
    class Settings:
        as_chat = False
        system_prompt = "Be brief."

    chat = json.dumps([{"role": "developer", "content": "Be kind."}, USER])
    assert ChatPrompts(Settings(), None).prompt(None, chat, "log", 0) == (None, chat)
    bare = json.dumps([USER])
    _, found = ChatPrompts(Settings(), None).prompt(None, bare, "log", 0)
    assert json.loads(found or "")[0] == {"role": "system", "content": "Be brief."}
