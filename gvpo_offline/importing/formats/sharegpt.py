"""ShareGPT conversations and the layouts of LLaMA-Factory: preference pairs, and single responses
with a label (KTO).

A conversation is a list of turns {"from", "value"}, or of messages {"role", "content"} whose
content may be a list of parts {"type", "value"}. LLaMA-Factory's alpaca layout has `instruction`,
`input`, `history` and `system` instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from gvpo_offline import conversations, values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.row_format import RowFormat, comparison_id, text_fragment
from gvpo_offline.importing.formats.shared.scores import RewardReader
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record
from gvpo_offline.json_text import loads
from gvpo_offline.messages import REASONING, without_nulls

Messages = list[dict[str, Any]]

_TURNS = ("conversations", "messages")
_V1 = ("chosen_messages", "rejected_messages")
_PAIR = ("chosen", "rejected")
_LABELS = ("label", "kto_tag")
_ALPACA = ("instruction", "input", "output", "history")
_CALL = "function_call"
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    _CALL: "assistant",
    "observation": "tool",
    "tool": "tool",
    "system": "system",
}
# Of LLaMA-Factory: 1 where the turn is trained on.
_WEIGHT = "loss_weight"


def open_format(config: ImportConfig) -> RowFormat:
    """A pair per row (rewards 1 and 0, each row its own group), or a response with a label (the
    reward is 1 or 0, grouped by prompt)."""
    return RowFormat(
        config,
        required=(),
        optional=(*_TURNS, *_V1, *_PAIR, *_LABELS, *_ALPACA, "system"),
        parse=partial(_parse, read=RewardReader(config)),
        reads_labels=True,
    )


def _parse(record: Record, *, read: RewardReader) -> list[Fragment]:
    if all(record.get(name) is not None for name in _V1):
        prompt, pair = _split_pair(*(_messages(record[name], name) for name in _V1))
        fragment = _pair(_with_system(prompt, record), pair)
    elif all(record.get(name) is not None for name in _PAIR):
        prompt = _prompt(record)
        if prompt[-1]["role"] == "assistant":
            raise DataError(
                "the conversation before chosen and rejected ends with a message of the user or "
                "of a tool",
                received="a message of the assistant at its end",
                remedy="remove the row, or that message",
            )
        fragment = _pair(prompt, [_answer(record[name], name) for name in _PAIR])
    else:
        fragment = _labelled(record, read)
    fragment.template_arguments = _arguments(record)
    return [fragment]


def _pair(prompt: Messages, pair: Sequence[Messages]) -> Fragment:
    replies = [_reply(messages) for messages in pair]
    head = _prompt_of(prompt)
    return text_fragment(head, replies, [1.0, 0.0], group_id=comparison_id(head, replies))


def _labelled(record: Record, read: RewardReader) -> Fragment:
    name = next((name for name in _LABELS if name in record), None)
    if name is None:
        raise DataError(
            "a row has chosen and rejected (or chosen_messages and rejected_messages), or one "
            "response with a label (label, kto_tag)",
            received=f"the columns {', '.join(record)}",
            remedy="add the label, or import another kind of reward with format: flat",
        )
    label = read(record[name], f"a {name}")
    if label not in (None, 0.0, 1.0):
        raise DataError(
            f"a {name} is true or false",
            received=record[name],
            remedy="set reward_map to 1 or 0 for each label, or import scores with format: flat",
        )
    if any(record.get(turns) is not None for turns in _TURNS):
        every = _prompt(record)
        start = 1 + max((i for i, m in enumerate(every) if not _is_answer(m)), default=-1)
        prompt, answer = every[:start], every[start:]
    else:
        prompt, answer = _prompt(record), _answer(record.get("output"), "output")
    if not answer:
        raise DataError(
            "a conversation with a label ends with the response",
            received=f"a message of role {prompt[-1]['role']} at its end",
            remedy="remove the row",
        )
    return text_fragment(_prompt_of(prompt), [_reply(answer)], [label])


def _is_answer(message: Mapping[str, Any]) -> bool:
    """Whether a message belongs to an answer: the assistant's, or the result of its tool call."""
    return message["role"] in ("assistant", "tool")


def _prompt(record: Record) -> Messages:
    """The conversation of a row, or the prompt of its alpaca layout, with its system message."""
    name = next((name for name in _TURNS if record.get(name) is not None), None)
    if name is not None:
        found = _messages(record[name], name)
    elif record.get("instruction") is not None:
        found = _alpaca(record)
    else:
        raise DataError(
            "a row has a conversation (conversations, messages), or instruction and input",
            received=f"the columns {', '.join(record)}",
            remedy="choose the log's format: preference and unpaired have a prompt column",
        )
    return _with_system(found, record)


def _alpaca(record: Record) -> Messages:
    texts = [record.get(name) for name in ("instruction", "input")]
    found: Messages = []
    for pair in values.entries(record.get("history") or [], "history"):
        turns = values.entries(pair, "an entry of history")
        if len(turns) != 2:
            raise DataError("an entry of history is a prompt and its response", received=turns)
        found += [_plain("user", turns[0]), _plain("assistant", turns[1])]
    given = [values.text(text, "instruction and input") for text in texts]
    return [*found, _plain("user", "\n".join(text for text in given if text))]


def _plain(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _with_system(messages: Messages, record: Record) -> Messages:
    system = record.get("system")
    if system and (not messages or messages[0]["role"] != "system"):
        return [_plain("system", system), *messages]
    return messages


def _answer(value: Any, name: str) -> Messages:
    """A response: text, a turn, or turns."""
    if isinstance(value, str):
        return [_plain("assistant", value)]
    return _messages([value] if isinstance(value, dict) else value, name)


def _messages(value: Any, name: str) -> Messages:
    turns = values.structs(value, f"the turns of {name}")
    if not turns:
        raise DataError(f"{name} is not empty", received="no turns", remedy="remove the row")
    return [_message(without_nulls(turn)) for turn in turns]


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn as a message; `loss_weight` is kept for `_reply`."""
    names = ("from", "value") if "from" in turn else ("role", "content")
    sender, content = (turn.get(name) for name in names)
    role = _ROLES.get(str(sender))
    if role is None and names[0] == "role" and isinstance(sender, str) and sender:
        role = sender
    if role is None:
        raise DataError(
            f"a turn is by one of {', '.join(_ROLES)}",
            received=f"{sender!r} in a turn with {', '.join(turn) or 'nothing'}",
            remedy="rename the role, or remove the row",
        )
    rest = {key: part for key, part in turn.items() if key not in names}
    if sender == _CALL:
        return {"role": role, "content": None, "tool_calls": _calls(content), **rest}
    if isinstance(content, list) and role == "assistant":
        return {"role": role, **_parts(content), **rest}
    return {"role": role, "content": content, **rest}


def _parts(parts: Sequence[Any]) -> dict[str, Any]:
    """Parts of the assistant's content: text, reasoning and tool calls."""
    kinds = [part.get("type") if isinstance(part, dict) else None for part in parts]
    texts = [p for p, k in zip(parts, kinds, strict=True) if k not in ("reasoning", "tool_call")]
    found: dict[str, Any] = {"content": texts}
    for part, kind in zip(parts, kinds, strict=True):
        if kind == "reasoning":
            thought = values.text(part.get("value"), "the value of reasoning")
            found[REASONING] = found.get(REASONING, "") + thought
        elif kind == "tool_call":
            found.setdefault("tool_calls", []).extend(_calls(part.get("value")))
    if not texts:
        found["content"] = None if "tool_calls" in found else ""
    return found


def _calls(value: Any) -> list[Any]:
    """The tool calls of a turn: JSON of one {"name", "arguments"}, or of a list of them."""
    try:
        decoded = loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DataError(
            'a function call is JSON: {"name": ..., "arguments": ...}, or a list of these',
            received=repr(value)[:200],
            remedy="correct or remove the row",
        ) from error
    return list(decoded) if isinstance(decoded, list) else [decoded]


def _split_pair(chosen: Messages, rejected: Messages) -> tuple[Messages, list[Messages]]:
    """The messages that both conversations begin with, and the rest of each."""
    shared, most = 0, min(len(chosen), len(rejected)) - 1
    while shared < most and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise DataError(
            "chosen_messages and rejected_messages begin with the same prompt",
            received=[chosen[0].get("content"), rejected[0].get("content")],
            remedy="remove the row",
        )
    return chosen[:shared], [chosen[shared:], rejected[shared:]]


def _prompt_of(messages: Messages) -> conversations.Prompt:
    return conversations.prompt([_without_weight(message) for message in messages])


def _reply(messages: Messages) -> conversations.Reply:
    """A response, whose assistant messages all count.

    Raises:
        DataError: it is no response, or a loss_weight says that part of it does not count.
    """
    for message in messages:
        weight = message.get(_WEIGHT)
        expected = 1 if message.get("role") == "assistant" else 0
        if weight is not None and weight != expected:
            raise DataError(
                f"in a response, {_WEIGHT} is 1 for the assistant's messages and 0 for others",
                received=f"{weight} for a message of role {message['role']}",
                remedy="remove the row, or log token ids with a loss mask (format: flat)",
            )
    return conversations.response([_without_weight(message) for message in messages])


def _without_weight(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != _WEIGHT}


def _arguments(record: Record) -> str | None:
    """The template's arguments; LLaMA-Factory's tools are functions without an envelope."""
    found = conversations.template_arguments(record)
    if found is None or "tools" not in (arguments := json.loads(found)):
        return found
    tools = [
        tool if "function" in tool else {"type": "function", "function": tool}
        for tool in values.structs(arguments["tools"], "tools")
    ]
    return conversations.template_arguments({**record, "tools": tools})
