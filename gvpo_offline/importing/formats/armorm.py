"""SimPO's data sets: five responses of one policy per prompt, scored by a reward model.

Reads `princeton-nlp/*-ultrafeedback-armorm` and the output of SimPO's `on_policy_data_gen`. The
reward model scored the prompt as a chat of a single user message, and so is it imported.
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
    """One group per row; the reward is the reward model's score."""
    return RowFormat(
        config,
        required=("prompt", "all_generated_responses", "all_rm_scores"),
        parse=partial(_parse, read=RewardReader(config)),
        reads_labels=True,
    )


def _parse(record: Record, *, read: RewardReader) -> list[Fragment]:
    return [
        text_fragment(
            conversations.conversation([record["prompt"]]),
            values.entries(record["all_generated_responses"], "all_generated_responses"),
            [read(score) for score in values.entries(record["all_rm_scores"], "scores")],
        )
    ]
