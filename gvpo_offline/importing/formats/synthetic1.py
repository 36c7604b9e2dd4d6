"""SYNTHETIC-1, the raw release: one row a response, scored from 0 to 1 by a verifier of its task.

A verifier that timed out or failed left no score.
"""

from __future__ import annotations

from gvpo_offline import values
from gvpo_offline.importing.formats.shared.row_format import RowFormat, text_fragment
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record


def open_format(config: ImportConfig) -> RowFormat:
    """One row a response, a group per `problem_id`; the reward is the score."""
    return RowFormat(
        config,
        required=("problem_id", "response_id", "prompt", "llm_response", "score"),
        parse=_parse,
    )


def _parse(record: Record) -> list[Fragment]:
    return [
        text_fragment(
            values.conversation([record["prompt"]]),
            [record["llm_response"]],
            [values.number(record["score"], "a score")],
            group_id=values.identifier(record["problem_id"]),
            response_ids=[values.identifier(record["response_id"])],
        )
    ]
