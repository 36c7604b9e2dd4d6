"""SYNTHETIC-1, raw release: one response per row, scored from 0 to 1 by the verifier of its task.

A response whose verifier timed out or failed has no score: its reward is missing.
"""

from __future__ import annotations

from functools import partial

from gvpo_offline import conversations, values
from gvpo_offline.importing.formats.shared.row_format import RowFormat, text_fragment
from gvpo_offline.importing.formats.shared.scores import RewardReader
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record


def open_format(config: ImportConfig) -> RowFormat:
    """One response per row, one group per `problem_id`; the reward is the score."""
    return RowFormat(
        config,
        required=("problem_id", "response_id", "prompt", "llm_response", "score"),
        parse=partial(_parse, read=RewardReader(config)),
        reads_labels=True,
    )


def _parse(record: Record, *, read: RewardReader) -> list[Fragment]:
    return [
        text_fragment(
            conversations.conversation([record["prompt"]]),
            [record["llm_response"]],
            [read(record["score"], "a score")],
            group_id=values.identifier(record["problem_id"]),
            response_ids=[values.identifier(record["response_id"])],
        )
    ]
