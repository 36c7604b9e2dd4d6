"""Chat messages in the attributes of spans: OpenTelemetry's GenAI conventions, OpenInference, and
the numbered attributes (`gen_ai.prompt.0.role`) that came before both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gvpo_offline.conversations import Reply
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.spans import as_list, at, parsed
from gvpo_offline.openai.shapes import output_reply, response_ending

__all__ = ["Generation", "generation", "sent_tools"]

_GENERATIONS = ("chat", "text_completion", "generate_content", "completion")
_REMEDY = "remove the span: the policy is a language model and reads text alone"
Message = dict[str, Any]


@dataclass
class Generation:
    """A request to a model.

    Attributes:
        prompt: the messages that were sent.
        responses: the messages of each choice.
        reasons: the finish reason of each choice, or None.
        model: name of the model, or None.
        tools: tool definitions, as OpenAI's API has them.
    """

    prompt: list[Message] | str | None
    responses: list[list[Message] | Reply]
    reasons: list[Any]
    model: Any
    tools: list[Any] = field(default_factory=list)


def generation(attributes: Mapping[str, Any], kind: Any) -> Generation | None:
    """The request to a model that a span stands for, or None if it stands for anything else.

    Args:
        attributes: as `span_attributes` returns them.
        kind: OpenInference's kind of the span, if it has one outside of its attributes.

    Raises:
        DataError: it does not hold the messages, or holds more than text, reasoning and calls.
    """
    kind = at(attributes, "openinference", "span", "kind") or kind
    gen_ai = at(attributes, "gen_ai") or {}
    operation = at(gen_ai, "operation", "name") or at(attributes, "llm", "request", "type")
    if str(kind).upper() != "LLM" and operation not in _GENERATIONS:
        return None
    model = at(gen_ai, "response", "model") or at(gen_ai, "request", "model")
    reasons = as_list(at(gen_ai, "response", "finish_reasons"))
    if any(at(attributes, "llm", name) is not None for name in ("output_messages", "choices")):
        return _openinference(attributes, at(attributes, "llm", "model_name") or model)
    if at(gen_ai, "output", "messages") is not None:
        outputs = as_list(at(gen_ai, "output", "messages"))
        asked = as_list(at(gen_ai, "input", "messages"))
        system = as_list(at(gen_ai, "system_instructions"))
        first = [{"role": "system", "parts": system}] if system else []
        given = [own for message in [*first, *asked] for own in _genai(message)]
        found = [_genai(message) for message in outputs]
        named = [at(message, "finish_reason") for message in outputs]
        tools = as_list(at(gen_ai, "tool", "definitions"))
    elif at(gen_ai, "completion") is not None:
        outputs = as_list(at(gen_ai, "completion"))
        given = [_numbered(message) for message in as_list(at(gen_ai, "prompt"))]
        found = [[{**_numbered(message), "role": "assistant"}] for message in outputs]
        named = [at(message, "finish_reason") for message in outputs]
        tools = as_list(at(attributes, "llm", "request", "functions"))
    else:
        raise DataError(
            "a span of a request to a model holds the messages (llm.output_messages, "
            "gen_ai.output.messages or gen_ai.completion.0)",
            received=f"the attributes {_names(attributes)}",
            remedy="switch the recording of contents on where the spans are made",
        )
    _check_last(given)
    own = reasons if len(reasons) == len(found) else [None] * len(found)
    words = [name or word for name, word in zip(named, own, strict=True)]
    return Generation(given, list(found), words, model, sent_tools(tools))


def _check_last(given: list[Message] | str) -> None:
    last = given[-1] if isinstance(given, list) and given else {}
    if isinstance(last, dict) and last.get("role") == "assistant":
        raise DataError(
            "the last message that was sent is not the assistant's",
            received=f"the assistant's {str(last.get('content'))[:80]!r}",
            remedy="remove the span: whether the response continues that message is not known",
        )


def _names(attributes: Mapping[str, Any]) -> str:
    inner = [f"{k}.{n}" for k, v in attributes.items() for n in (v if isinstance(v, dict) else ())]
    return ", ".join(inner[:20]) or "none"


def sent_tools(tools: Sequence[Any]) -> list[Any]:
    """Tool definitions in OpenAI's form, {"type": "function", "function": …}."""
    found = []
    for tool in map(parsed, tools):
        schema = parsed(at(tool, "tool", "json_schema")) or tool
        if isinstance(schema, dict) and "function" not in schema and "name" in schema:
            schema = {
                "type": "function",
                "function": {k: parsed(v) for k, v in schema.items() if k != "type"},
            }
        found.append(schema)
    return found


def _openinference(attributes: Mapping[str, Any], model: Any) -> Generation:
    llm = at(attributes, "llm")
    given: list[Message] | str = [_inferred(m) for m in as_list(at(llm, "input_messages"))]
    prompts = as_list(at(llm, "prompts"))
    if not given and len(prompts) == 1:
        given = at(prompts[0], "prompt", "text") or prompts[0]
    outputs = [_inferred(message) for message in as_list(at(llm, "output_messages"))]
    _check_last(given)
    raw = parsed(at(attributes, "output", "value"))
    tools = sent_tools(as_list(at(llm, "tools")))
    if isinstance(at(raw, "output"), list):  # the responses API, whose items are messages here
        _, word = response_ending(raw)
        return Generation(given, [output_reply(raw["output"])], [word], model, tools)
    # The instrumentation of OpenAI's client numbers choices; others number messages.
    choices = as_list(at(raw, "choices"))
    texts = [at(choice, "completion", "text") for choice in as_list(at(llm, "choices"))]
    if texts and not outputs:
        outputs = [{"role": "assistant", "content": text} for text in texts]
    if len(outputs) > 1 and len(choices) != len(outputs):
        raise DataError(
            "a span has one output message, or one for each choice of output.value",
            received=f"{len(outputs)} messages, {len(choices)} choices",
            remedy="remove the span: whether they are one response or several is not known",
        )
    words = [at(choice, "finish_reason") for choice in choices]
    if len(words) != len(outputs):
        words = [at(llm, "finish_reason")] * len(outputs)
    return Generation(given, [[own] for own in outputs], words, model, tools)


def _inferred(entry: Any) -> Message:
    """A message of OpenInference."""
    message = at(entry, "message") or entry
    found: Message = {"role": at(message, "role"), "content": at(message, "content")}
    contents = as_list(at(message, "contents"))
    calls = [_call(at(call, "tool_call") or call) for call in as_list(at(message, "tool_calls"))]
    if contents:
        parts = [at(part, "message_content") or part for part in contents]
        if calls:  # which Anthropic's content repeats
            parts = [part for part in parts if at(part, "type") != "tool_use"]
        found |= _joined([(at(p, "type"), at(p, "text")) for p in parts], str(found["role"]))
    if at(message, "function_call_name"):
        arguments = at(message, "function_call_arguments_json")
        calls.append(_call({"name": at(message, "function_call_name"), "arguments": arguments}))
    return _with_calls(found, calls, message)


def _numbered(message: Any) -> Message:
    """A message of the numbered attributes."""
    found: Message = {"role": at(message, "role") or "user", "content": at(message, "content")}
    parts = parsed(found["content"])
    if isinstance(parts, list) and parts and all(at(part, "type") for part in parts):
        found |= _joined([(at(p, "type"), at(p, "text")) for p in parts], str(found["role"]))
    calls = [_call(call) for call in as_list(at(message, "tool_calls"))]
    return _with_calls(found, calls, message)


def _genai(message: Any) -> list[Message]:
    """The messages of one of the GenAI conventions: each result of a tool is a message."""
    role = at(message, "role")
    if at(message, "parts") is None:
        calls = [_call(call) for call in as_list(at(message, "tool_calls"))]
        return [_with_calls({"role": role, "content": at(message, "content")}, calls, message)]
    texts, calls, results = [], [], []
    for part in as_list(at(message, "parts")):
        kind = at(part, "type")
        if kind == "tool_call":
            calls.append(_call(part))
        elif kind == "tool_call_response":
            content = at(part, "response")
            content = at(part, "result") if content is None else content
            result = {"role": "tool", "content": _text(content)}
            results.append(_with_calls(result, [], {"tool_call_id": at(part, "id")}))
        else:
            texts.append((kind, at(part, "content")))
    own = {"role": role, **_joined(texts, str(role))}
    return [*([_with_calls(own, calls, {})] if texts or calls or not results else []), *results]


def _text(content: Any) -> Any:
    return content if isinstance(content, str | None) else json.dumps(content, ensure_ascii=False)


def _joined(parts: Sequence[tuple[Any, Any]], role: str) -> Message:
    """Content and reasoning of a message from its parts: kinds and texts."""
    found = {"content": "", "reasoning_content": ""}
    for kind, text in parts:
        if kind not in ("text", "reasoning", "thinking") or not isinstance(text, str):
            raise DataError(
                "the parts of a message are text, reasoning, tool calls and their results",
                received=f"a part of type {kind!r} in a message of role {role}: {str(text)[:120]}",
                remedy=_REMEDY,
            )
        found["content" if kind == "text" else "reasoning_content"] += text
    return {name: text for name, text in found.items() if text or name == "content"}


def _call(call: Any) -> Message:
    function = at(call, "function") or call
    arguments = at(function, "arguments")
    own = {"name": at(function, "name"), "arguments": {} if arguments is None else arguments}
    return {"type": "function", "id": at(call, "id"), "function": own}


def _with_calls(found: Message, calls: Sequence[Message], message: Any) -> Message:
    if calls:
        found["tool_calls"] = list(calls)
    elif found.get("content") is None:
        found["content"] = ""
    for name in ("tool_call_id", "name"):
        if found.get("role") == "tool" and at(message, name):
            found[name] = at(message, name)
    return found
