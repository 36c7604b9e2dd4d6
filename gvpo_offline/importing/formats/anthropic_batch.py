"""Anthropic's Message Batches: the result file, joined by `custom_id` with the requests and,
optionally, a file of rewards (`rewards`).

Thinking becomes reasoning, tool_use becomes tool calls, tool_result becomes messages of role tool.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gvpo_offline import conversations, values
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.finish_reasons import ending, stop_string
from gvpo_offline.importing.formats.shared.assistant import AssistantTurns
from gvpo_offline.importing.formats.shared.batches import BatchFormat, Sent
from gvpo_offline.importing.formats.shared.trainer_logs import one_response
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record
from gvpo_offline.messages import content_text

Messages = list[dict[str, Any]]


def open_format(config: ImportConfig) -> AnthropicBatchFormat:
    """The format; the keys of `reward_weights` are columns of the file of rewards."""
    if config.requests is None:
        raise ConfigError(
            "the result file of a batch has no prompts, so the requests are needed",
            received="no requests",
            remedy="set requests to a file with the requests that were sent: rows of custom_id and "
            "params",
        )
    return AnthropicBatchFormat(config, config.requests)


class AnthropicBatchFormat(BatchFormat):
    """Reads the lines of a batch's results."""

    def __init__(self, config: ImportConfig, requests: str) -> None:
        super().__init__(config, required=("custom_id", "result"), requests=requests)

    def sent(self, record: Record) -> Sent:
        """See `BatchFormat.sent`."""
        params = record.get("params")
        if not isinstance(params, dict) or "messages" not in params:
            raise DataError(
                "a request has params with messages", received=f"the columns {', '.join(record)}"
            )
        system = params.get("system")
        found: Messages = [{"role": "system", "content": system}] if system else []
        for message in values.structs(params["messages"], "the messages of a request"):
            found += _messages(message)
        tools = [_tool(tool) for tool in values.entries(params.get("tools") or [], "tools")]
        arguments = conversations.template_arguments({"tools": tools})
        return Sent(conversations.prompt(found), arguments, model=params.get("model"))

    def answers(self, record: Record, sent: Sent) -> Sequence[Fragment | str]:
        """See `BatchFormat.answers`."""
        result = values.struct(record["result"], "the result")
        kind = result.get("type")
        if kind != "succeeded":
            return [_cause(kind, result)]
        message = values.struct(result.get("message"), "the message of a result")
        reason, stopped_at = message.get("stop_reason"), message.get("stop_sequence")
        ended = ending(reason)
        if ended == "failed":
            return [f"the stop reason {reason!r}"]
        return [
            one_response(
                prompt=sent.prompt,
                arguments=sent.arguments,
                text=conversations.response(_assistant(message.get("content"))),
                sampler=values.sampler(message.get("model") or sent.model),
                truncated=ended == "cut",
                stop_string=stop_string(reason, stopped_at),
                reward=None,
            )
        ]


def _cause(kind: Any, result: Mapping[str, Any]) -> str:
    if kind not in ("errored", "canceled", "expired"):
        raise DataError(
            "a result has the type succeeded, errored, canceled or expired",
            received=repr(kind),
            remedy="set inputs to the results that the batch API returns",
        )
    error = result.get("error")
    while isinstance(error, dict) and isinstance(error.get("error"), dict):
        error = error["error"]
    said = error.get("message") or error.get("type") if isinstance(error, dict) else error
    return kind if said is None else f"{kind} ({said})"


def _messages(message: Mapping[str, Any]) -> Messages:
    """A message of a request; one with results of tools becomes several."""
    role, content = message.get("role"), message.get("content")
    if role == "assistant":
        return _assistant(content)
    if not isinstance(content, list):
        return [{"role": role, "content": content}]
    return list(_user_messages(role, content))


def _user_messages(role: Any, blocks: Sequence[Any]) -> Iterator[dict[str, Any]]:
    texts: list[Any] = []
    for block in blocks:
        if not isinstance(block, dict) or block.get("type") != "tool_result":
            texts.append(block)
            continue
        if texts:
            yield {"role": role, "content": texts}
            texts = []
        content = block.get("content")
        yield {
            "role": "tool",
            "content": "" if content is None else content_text(content, role="tool"),
            "tool_call_id": block.get("tool_use_id"),
        }
    if texts:
        yield {"role": role, "content": texts}


def _assistant(content: Any) -> Messages:
    """The assistant's messages: thinking, text and tool calls that follow each other are one."""
    if isinstance(content, str):
        return [{"role": "assistant", "content": content}]
    turns = AssistantTurns()
    for block in values.structs(content, "the content blocks of the assistant"):
        kind = block.get("type")
        if kind == "text":
            turns.add_text(content_text([block], role="assistant"))
        elif kind == "tool_use":
            turns.add_call(block.get("name"), block.get("input") or {}, block.get("id"))
        elif kind == "thinking" and (block.get("thinking") or not block.get("signature")):
            turns.add_reasoning(block.get("thinking"))
        else:
            raise DataError(
                "the content of the assistant is text, thinking and tool_use",
                received="thinking whose text the API left out"
                if kind == "thinking"
                else f"a block of type {kind!r}: {json.dumps(block, default=str)[:120]}",
                remedy="remove the row: what the policy would have to write is not in it",
            )
    return turns.messages


def _tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict) or "input_schema" not in tool:
        kind = tool.get("type") if isinstance(tool, dict) else tool
        raise DataError(
            "a request's tools have an input_schema",
            received=f"a tool of the server: {kind!r}",
            remedy="remove the row: its answer may hold what the server's tool returned",
        )
    function = {key: tool[key] for key in ("name", "description") if tool.get(key) is not None}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}
