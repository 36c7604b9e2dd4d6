"""Unpaired preferences, TRL's shape for KTO: a prompt, a completion, whether it is desirable."""

from __future__ import annotations

from gvpo_offline.collect.fragment import Fragment
from gvpo_offline.collect.importing.config import ImportConfig
from gvpo_offline.collect.reading.rows import Record
from gvpo_offline.collect.shapes import values
from gvpo_offline.collect.shapes.row_format import RowFormat, text_fragment
from gvpo_offline.errors import DataError


def open_format(config: ImportConfig) -> RowFormat:
    """One row a response, grouped by the prompt; the reward is 1 or 0."""
    return RowFormat(
        config, required=("prompt", "completion", "label"), optional=("tools",), parse=_parse
    )


def _parse(record: Record) -> list[Fragment]:
    values.no_tools(record)
    label = values.number(record["label"], "a label")
    if label not in (None, 0.0, 1.0):
        raise DataError(
            "a label is true or false",
            received=record["label"],
            remedy="import scores with format: flat and columns.reward: label",
        )
    return [text_fragment(values.prompt(record["prompt"]), [record["completion"]], [label])]
