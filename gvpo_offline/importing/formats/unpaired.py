"""Unpaired preferences, TRL's format for KTO: a prompt, a completion, whether it is desirable."""

from __future__ import annotations

from functools import partial

from gvpo_offline import conversations
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.row_format import RowFormat, text_fragment
from gvpo_offline.importing.formats.shared.scores import RewardReader
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record


def open_format(config: ImportConfig) -> RowFormat:
    """One response per row, grouped by prompt; the reward is 1 (desirable) or 0."""
    return RowFormat(
        config,
        required=("prompt", "completion", "label"),
        parse=partial(_parse, read=RewardReader(config)),
        reads_labels=True,
    )


def _parse(record: Record, *, read: RewardReader) -> list[Fragment]:
    label = read(record["label"], "a label")
    if label not in (None, 0.0, 1.0):
        raise DataError(
            "a label is true or false",
            received=record["label"],
            remedy="import scores with format: flat and columns.reward: label",
        )
    return [text_fragment(conversations.prompt(record["prompt"]), [record["completion"]], [label])]
