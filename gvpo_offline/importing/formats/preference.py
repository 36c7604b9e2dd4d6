"""Preferences, TRL's format for DPO: a chosen and a rejected response, with or without a prompt.

Values are texts or chat messages. Without a prompt column, or where `chosen` and `rejected` repeat
the prompt, the prompt is the common beginning of the two.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from gvpo_offline import conversations, values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.row_format import RowFormat, comparison_id, text_fragment
from gvpo_offline.importing.formats.shared.scores import RewardReader
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record

_SCORES = ("score_chosen", "score_rejected")
_TURN = "\n\nAssistant:"
_NEXT_TURN = "\n\nHuman:"

Messages = list[dict[str, Any]]
Pair = list[Any]


def open_format(config: ImportConfig) -> RowFormat:
    """One pair per row; the rewards are the scores if the row has any, else 1 and 0.

    Scores of different pairs are on the same scale, so all pairs with the same prompt are one
    group. Rewards of 1 and 0 only order the two responses of a pair, so each pair is a group.
    """
    return RowFormat(
        config,
        required=("chosen", "rejected"),
        optional=("prompt", *_SCORES),
        parse=partial(_parse, read=RewardReader(config)),
        reads_labels=True,
    )


def _parse(record: Record, *, read: RewardReader) -> list[Fragment]:
    chosen, rejected, given = record["chosen"], record["rejected"], record.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt, pair = _from_texts(chosen, rejected, given)
    else:
        prompt, pair = _from_messages(
            values.structs(chosen, "the messages of chosen"),
            values.structs(rejected, "the messages of rejected"),
            given,
        )
    if any(name in record for name in _SCORES):
        return [text_fragment(prompt, pair, [read(record.get(n), n) for n in _SCORES])]
    return [text_fragment(prompt, pair, [1.0, 0.0], group_id=comparison_id(prompt, pair))]


def _from_texts(chosen: str, rejected: str, given: Any) -> tuple[conversations.Prompt, Pair]:
    if given is not None:
        return conversations.prompt(given), [chosen, rejected]
    end = _prompt_end(_common_prefix(chosen, rejected))
    pair = [chosen[end:], rejected[end:]]
    if not end or chosen == rejected or any(_NEXT_TURN in text for text in pair):
        raise _without_prompt([chosen, rejected])
    return conversations.prompt(chosen[:end]), pair


def _common_prefix(a: str, b: str) -> str:
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return a[: next(differ, min(len(a), len(b)))]


def _prompt_end(shared: str) -> int:
    """The length of the prompt, given the common beginning of both texts."""
    if shared.startswith(_NEXT_TURN):
        # In a conversation the prompt ends at the last turn marker: both answers may begin alike.
        start = shared.rfind(_TURN)
        return 0 if start < 0 else start + len(_TURN)
    return len(shared.removesuffix(" "))  # a space belongs to the word after it


def _from_messages(
    chosen: Messages, rejected: Messages, given: Any
) -> tuple[conversations.Prompt, Pair]:
    shared = _shared(chosen, rejected, given)
    pair: Pair = [_reply(chosen[shared:]), _reply(rejected[shared:])]
    if not shared:
        if given is None:
            raise _without_prompt([chosen, rejected])
        return conversations.prompt(given), pair
    head = chosen[:shared]
    if not _agrees(given, head):
        raise DataError(
            "the prompt column equals the messages that both chosen and rejected begin with",
            received=f"{given!r} and {head!r}",
            remedy="remove the prompt column, or the messages that chosen and rejected share",
        )
    return conversations.prompt(head), pair


def _shared(chosen: Messages, rejected: Messages, given: Any) -> int:
    """The number of messages that both begin with and that are the prompt's.

    A response begins with the assistant's message: what a tool returned after equal calls is part
    of both responses, and so are the calls.
    """
    shared, most = 0, min(len(chosen), len(rejected)) - 1
    if most < 0 or (given is not None and chosen[0].get("role") == "assistant"):
        return 0
    while shared < most and chosen[shared] == rejected[shared]:
        shared += 1
    before = shared
    while before and any(m[before].get("role") != "assistant" for m in (chosen, rejected)):
        before -= 1
    return before or shared


def _reply(messages: Messages) -> str | conversations.Reply:
    """A response of a pair: its text, if it is one text."""
    reply = conversations.response(messages)
    return (reply.text or "") if reply.messages is None else reply


def _agrees(given: Any, head: Messages) -> bool:
    """Whether the prompt column agrees with the messages that both responses follow."""
    if given is None:
        return True
    if isinstance(given, str):  # the text of one of the user's turns, the first or the last
        return any(given.strip() == str(message.get("content")).strip() for message in head)
    turns = [(message.get("role"), message.get("content")) for message in head]
    return turns == [
        (message.get("role"), message.get("content"))
        for message in values.structs(given, "the messages of prompt")
    ]


def _without_prompt(received: Any) -> DataError:
    return DataError(
        "without a prompt column, chosen and rejected both begin with the prompt, followed by one "
        "answer each, and the answers differ",
        received=received,
        remedy="add the prompt column, or remove the row",
    )
