"""Logged requests and responses of OpenAI's APIs: chat completions, completions, responses.

A response that is more than one text (reasoning apart from it, tool calls and their results) is
kept as messages, which the policy's chat template renders. What no template renders (pictures,
encrypted reasoning, calls of the server's own tools) is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from gvpo_offline import conversations
from gvpo_offline.errors import DataError
from gvpo_offline.finish_reasons import Ending, ending
from gvpo_offline.group import Int32Array
from gvpo_offline.json_text import kind_of
from gvpo_offline.messages import CONTINUE, content_text, is_message
from gvpo_offline.openai.answer import (
    BESIDE_TEXT,
    AnswerChoice,
    BadAnswerError,
)
from gvpo_offline.values import entries, structs, text, token_ids

__all__ = [
    "answer_errors",
    "chat",
    "choice_content",
    "item_messages",
    "output_reply",
    "request_arguments",
    "request_prompt",
    "response_ending",
    "responses_prompt",
    "was_cut",
]

EFFORT = "reasoning_effort"
_WITH_IDS = "sample again and have the server return token ids (vLLM: return_token_ids)"


@contextmanager
def answer_errors(rule: str) -> Iterator[None]:
    """Raise a BadAnswerError of the block as a DataError with this rule."""
    try:
        yield
    except BadAnswerError as error:
        raise DataError(rule, received=str(error), remedy=_WITH_IDS) from error


def _record(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"{what} is a record", received=repr(value), remedy="correct the row")
    return value


def chat(messages: Any) -> conversations.Prompt:
    """The messages of a chat completion's request as a prompt.

    Raises:
        DataError: they are anything else, or hold more than text and tool calls.
    """
    if not (isinstance(messages, list) and all(map(is_message, messages))):
        raise DataError("a chat's prompt is a list of messages", received=repr(messages))
    return conversations.prompt(messages)


def request_arguments(body: Mapping[str, Any]) -> str | None:
    """The arguments that a request gives the chat template, as JSON; None without any.

    Servers pass `reasoning_effort` on to the template, and `reasoning.effort` of the responses API.
    A request of chat completions that ends with an assistant message is continued only where it
    says so (`continue_final_message`): servers close that message and open another one.

    Raises:
        DataError: the request replaces the template or switches the generation prompt off.
    """
    body = _record(body, "a request")
    opened = body.get("add_generation_prompt") is False and not body.get(CONTINUE)
    if body.get("chat_template") or opened:
        raise DataError(
            "a request is rendered with the server's chat template and its generation prompt",
            received="chat_template"
            if body.get("chat_template")
            else "add_generation_prompt: false without continue_final_message",
            remedy="log the prompt's token ids",
        )
    messages = body.get("messages")
    last = messages[-1] if messages and isinstance(messages, list) else None
    last = last if isinstance(last, dict) else {}
    closed = last.get("role") == "assistant" and not (body.get(CONTINUE) or last.get("prefix"))
    tools, reasoning = body.get("tools"), body.get("reasoning")
    effort = body.get(EFFORT) or (reasoning.get("effort") if isinstance(reasoning, dict) else None)
    if isinstance(tools, list):
        tools = [_nested_tool(tool) for tool in tools]
    return conversations.template_arguments(
        {**body, "tools": tools},
        documents=body.get("documents") or None,
        **({EFFORT: effort} if effort else {}),
        **({CONTINUE: False} if closed else {}),
    )


def _nested_tool(tool: Any) -> Any:
    """A tool definition as chat completions have it; the responses API has it flat."""
    if isinstance(tool, dict) and "function" not in tool and tool.get("type") == "function":
        return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
    return tool


def request_prompt(body: Mapping[str, Any]) -> tuple[conversations.Prompt, Int32Array | None]:
    """The prompt of a request to any of the three APIs, and its token ids if it was sent so.

    Raises:
        DataError: the request is of another kind, or for several prompts at once.
    """
    body = _record(body, "a request")
    if "messages" in body:
        return chat(body["messages"]), None
    if "input" in body:
        return responses_prompt(body), None
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(i, int) for i in prompt):
        return (None, None), token_ids(prompt, "prompt")
    if isinstance(prompt, str):
        return conversations.prompt(prompt), None
    raise DataError(
        "a request holds one prompt: messages, input, or prompt",
        received=f"prompt {prompt!r} among {', '.join(body) or 'nothing'}",
        remedy="send one prompt in a request",
    )


def responses_prompt(params: Mapping[str, Any]) -> conversations.Prompt:
    """The prompt of a request to the responses API.

    Raises:
        DataError: an item is of another kind than text, reasoning, tool calls and their results.
    """
    given = _record(params, "a request").get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list):
        raise DataError("a chat's prompt is a list of messages", received=repr(given))
    if params.get("instructions"):
        items = [{"role": "system", "content": params["instructions"]}, *items]
    return conversations.prompt(item_messages(items))


def item_messages(items: Sequence[Any]) -> list[dict[str, Any]]:
    """Items of the responses API as chat messages.

    Reasoning, text and tool calls that follow each other are one message of the assistant.

    Raises:
        DataError: an item is of another kind; names it.
    """
    if not isinstance(items, list | tuple):
        raise DataError(
            "the items of a response are a list",
            received=repr(items),
            remedy=_WITH_IDS,
        )
    found: list[dict[str, Any]] = []
    for item in items:
        kind = item.get("type", "message") if isinstance(item, dict) else kind_of(item)
        if kind == "message" and is_message(item) and item["role"] != "assistant":
            found.append(item)
        elif kind == "function_call_output":
            output = item.get("output")
            content = output if isinstance(output, str | list) else json.dumps(output)
            found.append({"role": "tool", "content": content, "tool_call_id": item.get("call_id")})
        elif kind in ("message", "reasoning", "function_call") and isinstance(item, dict):
            _add_to_assistant(found, kind, item)
        else:
            raise DataError(
                "the items of a response are messages, reasoning, function calls and their outputs",
                received=f"an item of type {kind!r}",
                remedy=_WITH_IDS,
            )
    return found


def _add_to_assistant(found: list[dict[str, Any]], kind: str, item: Mapping[str, Any]) -> None:
    own = found[-1] if found and found[-1].get("_open") else None
    # A message closes the reasoning and begins the calls; a second text is a message of its own.
    if (
        own is None
        or (kind != "function_call" and own.get("content"))
        or (kind != "function_call" and own.get("tool_calls"))
    ):
        own = {"role": "assistant", "content": "", "_open": True}
        found.append(own)
    if kind == "message":
        own["content"] = content_text(item.get("content"), role="assistant")
    elif kind == "reasoning":
        parts = structs(item.get("content") or item.get("summary") or [], "the parts of reasoning")
        texts = [text(part.get("text"), "the text of reasoning") for part in parts]
        if not any(texts) and item.get("encrypted_content"):
            raise DataError(
                "the reasoning of a response is text",
                received="reasoning that is encrypted",
                remedy=_WITH_IDS,
            )
        own["reasoning_content"] = own.get("reasoning_content", "") + "".join(texts)
    else:
        call = {"name": item.get("name"), "arguments": item.get("arguments") or {}}
        own.setdefault("tool_calls", []).append(
            {"type": "function", "id": item.get("call_id"), "function": call}
        )


def choice_content(choice: AnswerChoice) -> tuple[conversations.Reply, Int32Array | None]:
    """A choice of either completions API: text or messages, and (T,) int32 token ids or None.

    Raises:
        DataError: they are invalid, or the message holds more than text, reasoning and tool calls.
    """
    with answer_errors("a response is text, or has token ids"):
        ids = choice.token_ids
    message = choice.message
    if message.get("content") is None and not (message.keys() & {*BESIDE_TEXT} - {"content"}):
        return conversations.Reply(None), None if ids is None else np.array(ids, np.int32)
    if all(not message.get(name) for name in ("content", *BESIDE_TEXT)):
        reply = conversations.Reply(content_text(message.get("content"), role="assistant"))
    else:
        reply = conversations.response([{**message, "role": "assistant"}])
    return reply, None if ids is None else np.array(ids, np.int32)


def output_reply(output: Any) -> conversations.Reply:
    """A response of the responses API, from its items.

    Raises:
        DataError: an item is of a kind that no chat template renders, or there is none.
    """
    found = item_messages(entries(output, "the items of a response"))
    if not found:
        raise DataError(
            "a response has at least 1 item", received="no items", remedy="sample it again"
        )
    return conversations.response(found)


def response_ending(response: Mapping[str, Any]) -> tuple[Ending, str | None]:
    """How a response of the responses API ended, and the word that says so.

    Of an incomplete one `incomplete_details.reason` decides: a filter is no cut.

    Raises:
        DataError: a word that `finish_reasons` does not list.
    """
    details = _record(response, "a response").get("incomplete_details")
    reason = details.get("reason") if isinstance(details, dict) else details
    if reason is not None:
        found = ending(reason)
        return ("cut" if found == "unknown" else found), reason
    status = response.get("status")
    return ending(status), status


def was_cut(response: Mapping[str, Any]) -> bool:
    """Whether a response of the responses API was cut before its end."""
    return response_ending(response)[0] == "cut"
