"""Nectar: a prompt and seven answers by several models, ranked by GPT-4; rank 1 is the best."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from gvpo_offline import conversations, values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.row_format import RowFormat, comparison_id, text_fragment
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record

_MARKER = re.compile(r"\n\n(Human|Assistant): ?")


def open_format(config: ImportConfig) -> RowFormat:
    """One group per row; the reward is the share of the other answers with a worse rank."""
    return RowFormat(config, required=("prompt", "answers"), parse=_parse)


def _parse(record: Record) -> list[Fragment]:
    answers = values.structs(record["answers"], "answers")
    ranks = [_rank(answer) for answer in answers]
    prompt = _prompt(record["prompt"])
    responses = [values.field(a, "answer", "an answer") for a in answers]
    return [
        text_fragment(
            prompt,
            responses,
            win_rates(ranks),
            samplers=[values.sampler(answer.get("model")) for answer in answers],
            group_id=comparison_id(prompt, responses),
        )
    ]


def _rank(answer: Record) -> float | None:
    rank = values.number(values.field(answer, "rank", "an answer"), "a rank")
    if rank is not None and not rank >= 1:
        raise DataError("a rank is at least 1, and 1 is the best", received=rank)
    return rank


def win_rates(ranks: Sequence[float | None]) -> list[float | None]:
    """For each answer, the share of the other ranked answers with a worse rank; a tie counts half.

    Without ties the share is (k - rank) / (k - 1), k ranked answers: ranks 1, 2, 3 give 1, 0.5, 0.

    Args:
        ranks: one per answer, 1 the best; None where an answer has no rank.

    Returns:
        One share per answer. None for an answer without a rank, which the other answers are not
        compared with either, and for an answer that is the only one with a rank.
    """
    shares = values.share_beaten(np.array(ranks, np.float64))  # None becomes NaN
    return [None if math.isnan(share) else share for share in shares.tolist()]


def _prompt(text: object) -> conversations.Prompt:
    if not isinstance(text, str):
        return conversations.conversation([text])
    before, *rest = _MARKER.split(text)
    roles, turns = rest[::2], rest[1::2]
    if (
        before
        or not turns
        or turns[-1].strip()
        or roles != ["Human", "Assistant"] * (len(roles) // 2)
    ):
        raise DataError(
            'a prompt is "\\n\\nHuman: ...\\n\\nAssistant: ", of one or more turns',
            received=repr(text),
            remedy="correct or remove the row",
        )
    return conversations.conversation(turns[:-1])
