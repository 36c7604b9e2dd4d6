"""Chatbot Arena votes (55k release): two models answer a user, who votes for the better answer.

The columns of the prompt and the answers are JSON lists in text, one entry per turn. The response
is the last answer; the prompt is everything before it. Where the earlier answers of the two models
differ, the two last answers do not share a prompt, and each becomes a group of one response: the
setting `singletons` decides whether that stops the import.
"""

from __future__ import annotations

from typing import Any

from gvpo_offline import conversations, values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.row_format import RowFormat, text_fragment
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record
from gvpo_offline.json_text import loads

_VOTES = ("winner_model_a", "winner_model_b", "winner_tie")


def open_format(config: ImportConfig) -> RowFormat:
    """One group per row; the reward is 1 for the winner, 0 for the loser, 0.5 each for a tie."""
    return RowFormat(
        config,
        required=("id", "model_a", "model_b", "prompt", "response_a", "response_b", *_VOTES),
        parse=_parse,
    )


def _parse(record: Record) -> list[Fragment]:
    prompt_a, last_a = _side(record, "response_a")
    prompt_b, last_b = _side(record, "response_b")
    rewards = _rewards(record)
    samplers = [values.sampler(record["model_a"]), values.sampler(record["model_b"])]
    battle = values.identifier(record["id"])
    if prompt_a == prompt_b:
        return [
            text_fragment(prompt_a, [last_a, last_b], rewards, samplers=samplers, group_id=battle)
        ]
    return [
        text_fragment(prompt, [last], [reward], samplers=[sampler], group_id=f"{battle}-{side}")
        for prompt, last, reward, sampler, side in zip(
            (prompt_a, prompt_b), (last_a, last_b), rewards, samplers, "ab", strict=True
        )
    ]


def _side(record: Record, name: str) -> tuple[conversations.Prompt, str]:
    """The conversation with one model up to its last answer, and that last answer."""
    asked, answers = _turns(record, "prompt"), _turns(record, name)
    if len(asked) != len(answers) or not asked:
        raise DataError(
            f"prompt and {name} have one entry per turn",
            received=f"{len(asked)} and {len(answers)}",
        )
    # The data set has null where a model gave no answer.
    *earlier, last = (answer or "" for answer in answers)
    turns = [text for pair in zip(asked, earlier, strict=False) for text in pair]
    return conversations.conversation([*turns, asked[-1]]), last


def _turns(record: Record, name: str) -> list[Any]:
    value = record[name]
    if isinstance(value, str):
        try:
            value = loads(value)
        except ValueError as error:
            raise DataError(f"{name} is a list of texts in JSON", received=str(error)) from error
    turns = values.entries(value, name)
    if not all(text is None or isinstance(text, str) for text in turns):
        raise DataError(f"{name} is a list of texts", received=turns)
    return turns


def _rewards(record: Record) -> list[float]:
    a, b, tie = (values.number(record[name], name) for name in _VOTES)
    if a is None or b is None or tie is None or sorted((a, b, tie)) != [0, 0, 1]:
        raise DataError(
            f"one of {', '.join(_VOTES)} is 1 and the others are 0", received=[a, b, tie]
        )
    return [a + tie / 2, b + tie / 2]
