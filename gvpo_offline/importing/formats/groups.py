"""Rows that follow `schemas/groups.schema.json`: token ids from another program, one group per row.

Rows with the same group_id, in one file or several, are merged into one group. A row may also hold
`rewards`. Reference log-probs (`ref_seq_logprobs`) are not imported, and a warning says so: the
import may reorder and truncate responses, so `gvpo-offline reference` computes them again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gvpo_offline import values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.log_format import InputInfo, per_row
from gvpo_offline.importing.formats.shared.parts import part_weights
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record, Row
from gvpo_offline.json_text import loads
from gvpo_offline.store.schema import GROUPS_COLUMNS
from gvpo_offline.values import flags, token_ids

_NOT_IMPORTED = ("ref_seq_logprobs", "ref_token_logprobs")
_log = logging.getLogger(__name__)


def open_format(config: ImportConfig) -> GroupsFormat:
    """The format; the column names are those of the schema."""
    part_weights(config, {})
    return GroupsFormat()


class GroupsFormat:
    """Reads rows with the columns of `store.schema.GROUPS_COLUMNS` and, optionally, `rewards`."""

    reads_inputs_apart = True

    @property
    def columns(self) -> Sequence[str]:
        """The columns that are read."""
        derived = {"n_tokens", "prompt_length", "response_lengths", "prompt_hash"}
        return [
            *(c.name for c in GROUPS_COLUMNS if c.name not in derived),
            "rewards",
            "components",
            *_NOT_IMPORTED,
        ]

    def read(self, rows: Iterable[Row], source: InputInfo) -> Iterator[Fragment]:
        """One fragment per row; see `LogFormat.read`."""
        warned = told = False
        for row, record in rows:
            if not warned and any(record.get(name) is not None for name in _NOT_IMPORTED):
                warned = True
                _log.warning(
                    "%s holds reference log-probs. They are not imported: run `gvpo-offline "
                    "reference` on the dataset; it uses the forward pass of training.",
                    source.label,
                )
            if not told and record.get("components") is not None:
                told = True
                _log.warning(
                    "%s holds components of rewards, whose names are not in the file. They are not "
                    "imported; `gvpo-offline merge` of the dataset keeps them.",
                    source.label,
                )
            yield from per_row([(row, record)], source, _parse)


def _parse(record: Record, source: InputInfo) -> Fragment:
    for column in GROUPS_COLUMNS:
        if column.required and record.get(column.name) is None:
            present = source.columns if source.columns is not None else list(record)
            raise DataError(
                f"a row of format: groups has a value in {column.name}",
                received=f"none; the columns are {', '.join(present)}",
                remedy="write the column as described in schemas/groups.schema.json, or import "
                "the log with format: flat",
            )
    ids = [
        token_ids(row, "an entry of response_token_ids")
        for row in _list(record, "response_token_ids")
    ]
    n = len(ids)
    masks = record.get("loss_mask")
    rewards = record.get("rewards")
    logprobs = record.get("sampler_seq_logprobs")
    return Fragment(
        prompt=_optional_text(record, "prompt"),
        messages=_messages(record),
        prompt_token_ids=token_ids(record["prompt_token_ids"], "prompt_token_ids"),
        responses=_entries(record, "responses", str) or [None] * n,
        response_token_ids=ids,
        rewards=None if rewards is None else _numbers(rewards, "rewards"),
        samplers=_entries(record, "samplers", str) or [None] * n,
        truncated=_entries(record, "truncated", bool) or [False] * n,
        loss_mask=None
        if masks is None
        else [flags(row, "loss_mask") for row in _list(record, "loss_mask")],
        response_ids=_entries(record, "response_ids", str),
        sampler_logprobs=None if logprobs is None else _numbers(logprobs, "sampler_seq_logprobs"),
        group_id=_optional_text(record, "group_id"),
        metadata=_optional_text(record, "metadata"),
        source=_optional_text(record, "source"),
    )


def _list(record: Record, name: str) -> list[Any]:
    value = record[name]
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list):
        raise DataError(f"{name} is a list, one entry per response", received=value)
    return value


def _entries(record: Record, name: str, kind: type) -> list[Any] | None:
    if record.get(name) is None:
        return None
    found = _list(record, name)
    for value in found:
        if not isinstance(value, kind):
            raise DataError(f"{name} is a list of {kind.__name__}", received=found)
    return found


def _numbers(value: Any, what: str) -> list[float | None]:
    try:
        return [values.number(entry) for entry in values.entries(value, what)]
    except DataError as error:
        raise DataError(f"{what} is a list of numbers", received=value) from error


def _optional_text(record: Record, name: str) -> str | None:
    value = record.get(name)
    if value is not None and not (isinstance(value, str) and (value or name != "group_id")):
        raise DataError(f"{name} is text", received=repr(value))
    return value


def _messages(record: Record) -> str | None:
    text = _optional_text(record, "messages")
    if text is None:
        return None
    try:
        value = loads(text)
    except ValueError as error:
        raise DataError("messages is JSON", received=str(error)) from error
    if not isinstance(value, list):
        raise DataError("messages is a JSON list of chat messages", received=text)
    return text
