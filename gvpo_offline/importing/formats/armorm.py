"""SimPO's data sets: five responses of one policy, scored by a reward model.

`princeton-nlp/*-ultrafeedback-armorm` and what SimPO's `on_policy_data_gen` writes. The reward
model saw the prompt as a chat's only message, so that is the prompt.
"""

from __future__ import annotations

from gvpo_offline import values
from gvpo_offline.importing.formats.shared.row_format import RowFormat, text_fragment
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record


def open_format(config: ImportConfig) -> RowFormat:
    """One row a group; the reward is the reward model's score."""
    return RowFormat(
        config, required=("prompt", "all_generated_responses", "all_rm_scores"), parse=_parse
    )


def _parse(record: Record) -> list[Fragment]:
    return [
        text_fragment(
            values.conversation([record["prompt"]]),
            values.entries(record["all_generated_responses"], "all_generated_responses"),
            [values.number(score) for score in values.entries(record["all_rm_scores"], "scores")],
        )
    ]
