"""A flat table with one response per row or one group per row; the user names the columns.

A row holds a group if its response column holds a list (of texts, of one-message lists, or of lists
of token ids). Its reward, id, mask and truncation columns then hold lists of the same length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gvpo_offline import conversations, values
from gvpo_offline.cells import cell_value
from gvpo_offline.conversations import Reply
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.default_columns import DefaultColumns
from gvpo_offline.importing.formats.shared.failures import FailedResponses, set_endings
from gvpo_offline.importing.formats.shared.log_format import InputInfo, per_row
from gvpo_offline.importing.formats.shared.parts import part_weights
from gvpo_offline.importing.formats.shared.scores import RewardReader
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.files import Source
from gvpo_offline.importing.sources.json_documents import list_fields
from gvpo_offline.importing.sources.rows import Record, Row
from gvpo_offline.messages import is_message
from gvpo_offline.paths import MISSING, has, nearest, top_level_names, value_at
from gvpo_offline.values import flags, token_ids

_ROLES = (
    "prompt",
    "response",
    "reward",
    "sampler",
    "group_id",
    "response_id",
    "prompt_token_ids",
    "response_token_ids",
    "loss_mask",
    "truncated",
    "stop_reason",
    "sampler_logprob",
    "tools",
    "chat_template_kwargs",
)
# In a text file of columns, the list that such a cell holds is JSON.
_LISTS = ("prompt_token_ids", "response_token_ids", "loss_mask")


def open_format(config: ImportConfig) -> FlatFormat:
    """The format for `config.columns`."""
    part_weights(config, {})
    return FlatFormat(config)


class FlatFormat:
    """Reads a table whose column names are given in `config.columns`."""

    reads_labels = True
    reads_inputs_apart = True

    def __init__(self, config: ImportConfig) -> None:
        self._config = config
        self._default_sampler = config.sampler
        self._failed = FailedResponses(config)
        self._reward = RewardReader(config)
        self._casts = config.cast_rewards
        self._defaults = DefaultColumns(config.columns)
        self._names = self._defaults.columns

    @property
    def columns(self) -> Sequence[str]:
        """The columns that are read."""
        named = [getattr(self._names, role) for role in _ROLES]
        paths = [*(n for n in named if n), *self._names.keep, *self._defaults.unused]
        return top_level_names(paths)

    def find_columns(self, sources: Sequence[Source]) -> ImportConfig:
        """See `FindsColumns.find_columns`."""
        self._defaults.find(sources)
        self._names = self._defaults.columns
        return replace(self._config, columns=self._names)

    def notes(self) -> Sequence[str]:
        """See `FindsColumns.notes`."""
        own = [] if self._default_sampler else self._defaults.sampler_notes()
        return [*own, *self._defaults.notes()]

    def read(self, rows: Iterable[Row], source: InputInfo) -> Iterator[Fragment]:
        """One fragment per row; see `LogFormat.read`."""
        watched = self._defaults.watched(rows, source.label)
        for fragment in per_row(watched, source, self._parse):
            kept = self._failed.without_failed(fragment, source)
            if kept is not None:
                yield kept

    def finish(self) -> Mapping[str, int]:
        """The number of failed responses; see `DropsResponses.finish`."""
        return self._failed.count()

    def _parse(self, record: Record, source: InputInfo) -> Fragment:
        names = self._names

        def value(role: str, *, optional: bool = False) -> Any:
            name = getattr(names, role)
            if name is None:
                return None
            found = value_at(record, name)
            if found is MISSING:
                if optional:
                    return None
                raise _missing(f"columns.{role}", name, record, source)
            return cell_value(found) if role in _LISTS else found

        prompt_ids = value("prompt_token_ids")
        prompt, messages = conversations.prompt(value("prompt", optional=prompt_ids is not None))
        ids = value("response_token_ids")
        replies, all_ids, many = _responses(value("response", optional=ids is not None), ids)
        n = len(replies)

        def each(role: str, parse: Callable[[Any], Any], *, shared: bool = False) -> list[Any]:
            return _spread(value(role), getattr(names, role), n, many, parse, shared=shared)

        fragment = Fragment(
            prompt=prompt,
            messages=messages,
            prompt_token_ids=None if prompt_ids is None else token_ids(prompt_ids, "a prompt"),
            responses=[reply.text for reply in replies],
            response_token_ids=all_ids,
            rewards=each("reward", self._reward) if names.reward else None,
            samplers=each("sampler", self._sampler, shared=True) if names.sampler else [None] * n,
            truncated=[False] * n,
            loss_mask=_masks(value("loss_mask"), names.loss_mask, n, many),
            response_ids=each("response_id", values.identifier) if names.response_id else None,
            sampler_logprobs=each("sampler_logprob", self._logprob)
            if names.sampler_logprob
            else None,
            group_id=values.identifier(value("group_id")) if names.group_id else None,
            metadata=self._metadata(record, source),
            response_messages=[reply.messages for reply in replies]
            if any(reply.messages for reply in replies)
            else None,
            template_arguments=conversations.template_arguments(
                {"tools": value("tools"), "chat_template_kwargs": value("chat_template_kwargs")}
            ),
        )
        if names.truncated or names.stop_reason:
            reasons = each("truncated", _unchanged) if names.truncated else [None] * n
            stops = each("stop_reason", _unchanged) if names.stop_reason else None
            set_endings(fragment, reasons, stops)
            self._failed.check(fragment)
        return fragment

    def _logprob(self, value: Any) -> float | None:
        number = values.rating if self._casts else values.number
        return number(value, "a sampler_logprob")

    def _sampler(self, value: Any) -> str | None:
        if isinstance(value, str) and value:
            return values.valid_text(value)
        if cell_value(value) is None and self._default_sampler:
            return None
        raise DataError(
            "the name of a sampler is text",
            received=repr(value),
            remedy="write the name into the log, set `sampler` to the name that null stands for, "
            "or set columns.sampler to null, so that the column is not used",
        )

    def _metadata(self, record: Record, source: InputInfo) -> str | None:
        for name in self._names.keep:
            if not has(record, name):
                raise _missing("columns.keep", name, record, source)
        return values.metadata(record, self._names.keep)


def _unchanged(value: Any) -> Any:
    return value


def _missing(setting: str, name: str, record: Record, source: InputInfo) -> DataError:
    present = ", ".join(source.columns if source.columns is not None else record) or "none"
    remedy = f"set {setting} to one of them, or to null if the log has no such column"
    within = nearest(record, name)
    if setting == "columns.keep":
        remedy = "remove the name from columns.keep"
    elif source.columns is None and not within and (lists := list_fields(record, name)):
        remedy += f"; if the rows are in {' or '.join(lists)}, set rows_at to it"
    return DataError(
        f"the column {name!r} that {setting} names is in the log",
        received=within or f"the columns {present}",
        remedy=remedy,
    )


def _is_many(value: Any) -> bool:
    """Whether a value of the response column holds a group's responses, not one response."""
    return isinstance(value, list) and not (value and all(map(is_message, value)))


def _is_many_ids(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(v, list | np.ndarray) for v in value)


def _responses(text: Any, ids: Any) -> tuple[list[Reply], list[Any] | None, bool]:
    """Responses, token ids, and whether the row holds a group."""
    if ids is not None:
        listed = values.entries(ids, "token ids")
    many = _is_many(text) if text is not None else _is_many_ids(ids)
    if text is not None and ids is not None and listed and many != _is_many_ids(ids):
        raise DataError(
            "text and token ids of a row both hold one response, or both hold a group",
            received=f"text {text!r}, token ids {ids!r}",
        )
    all_ids: list[Any] | None = None
    if ids is not None:
        all_ids = [
            None if row is None else token_ids(row, "a response")
            for row in (listed if many else [ids])
        ]
    if text is None:
        return [Reply(None)] * (1 if all_ids is None else len(all_ids)), all_ids, many
    return [conversations.response(part) for part in (text if many else [text])], all_ids, many


def _spread(
    value: Any, name: str, n: int, many: bool, parse: Callable[[Any], Any], *, shared: bool
) -> list[Any]:
    """`parse` applied per response, n results; a `shared` scalar applies to all responses."""
    if not many:
        return [parse(value)]
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list):
        if shared:
            return [parse(value)] * n
        raise DataError(
            f"in a row that holds a group, column {name!r} holds a list, one entry per response",
            received=value,
        )
    if len(value) != n:
        raise DataError(
            f"column {name!r} has one entry per response of the row",
            received=f"{len(value)} for {n} responses",
            remedy="log lists of one length in a row",
        )
    return [parse(part) for part in value]


def _masks(value: Any, name: str | None, n: int, many: bool) -> list[Any] | None:
    if name is None or value is None:
        return None
    rows = values.entries(value, "the loss masks of a group") if many else [value]
    if many and not _is_many_ids(rows) and n:
        raise DataError(
            f"in a row that holds a group, column {name!r} holds a list of lists", received=value
        )
    return [None if row is None else flags(row, "a loss mask") for row in rows]
