"""Columns that are used because they have the name of their setting (`columns.*: auto`)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

from gvpo_offline.importing.settings import AUTO, Columns
from gvpo_offline.importing.sources.files import Source
from gvpo_offline.importing.sources.rows import Row

__all__ = ["DefaultColumns"]

_OTHER_NAMES = {"truncated": ("finish_reason",)}
_NEEDS = {"loss_mask": "response_token_ids"}
# Columns that often say who wrote a response. Named in a note alone: they may mean something else.
_WRITERS = (
    *("model", "model_name", "model_id", "engine", "policy", "checkpoint", "generator"),
    *("writer", "written_by", "author", "agent", "source_model"),
)
_log = logging.getLogger(__name__)


class DefaultColumns:
    """Finds, for each setting of `columns` that is auto, whether the log has such a column.

    A column is used if the first row of every input has it; every later row must then have it too.

    Args:
        columns: the settings.

    Attributes:
        columns: the settings with a name or None for each auto; before `find`, always None.
        unused: names of columns that would have been used if every input had them, and no other
            column of the same meaning.
    """

    def __init__(self, columns: Columns) -> None:
        roles = [f.name for f in fields(Columns) if getattr(columns, f.name) == AUTO]
        self._names = {role: (role, *_OTHER_NAMES.get(role, ())) for role in roles}
        unset: dict[str, Any] = dict.fromkeys(roles)
        self.columns = replace(columns, **unset)
        self.unused: dict[str, str] = {}
        self._used: dict[str, str] = {}
        self._writers: list[str] = []

    def find(self, sources: Sequence[Source]) -> None:
        """Look at the columns, or the first row, of every input.

        Raises:
            DataError: a first row cannot be parsed.
            IntegrityError: an input is damaged.
        """
        found = [source.column_names() for source in sources]
        present = [names for names in found if names is not None]
        for role, names in self._names.items():
            everywhere = [n for n in names if present and all(n in own for own in present)]
            need = _NEEDS.get(role)
            if everywhere and (need is None or self._name_of(need) is not None):
                self._used[role] = everywhere[0]
                self.unused.update(dict.fromkeys((n for n in names if n != everywhere[0]), role))
            else:
                self.unused.update(dict.fromkeys(names, role))
        self._writers = [n for n in _WRITERS if present and all(n in own for own in present)]
        used: dict[str, Any] = dict(self._used)
        self.columns = replace(self.columns, **used)
        for own, source in zip(found, sources, strict=True):
            for name in [n for n in self.unused if own is not None and n in own]:
                self._warn(name, source.label)

    def _name_of(self, role: str) -> str | None:
        return self._used.get(role) or getattr(self.columns, role)

    def _warn(self, name: str, label: str) -> None:
        role = self.unused.pop(name)
        need = _NEEDS.get(role)
        why, instead = "which the first row of an input lacks", "null"
        if role in self._used:
            instead = self._used[role]
            why = f"and the column {instead!r}, which is used as columns.{role}"
        if need is not None and self._name_of(need) is None:
            why = f"since a {role} needs columns.{need}"
        _log.warning(
            "%s has the column %r, %s: it is not used. Set columns.%s: %s to use it, or %s to "
            "leave it out without this warning.",
            label,
            name,
            why,
            role,
            name,
            instead,
        )

    def watched(self, rows: Iterable[Row], label: str) -> Iterator[Row]:
        """The rows, with a warning at the first that has a column which is not used."""
        for row in rows:
            for name in [n for n in self.unused if n in row[1]]:
                self._warn(name, label)
            yield row

    def notes(self) -> list[str]:
        """A line that names the columns that are used, or none."""
        if not self._used:
            return []
        names = ", ".join(f"columns.{role}: {name}" for role, name in self._used.items())
        return [f"found in the log and used: {names} (null: do not use)"]

    def sampler_notes(self) -> list[str]:
        """A line that says that the samplers are the files, if `columns.sampler` was looked for."""
        if "sampler" not in self._names or self.columns.sampler is not None:
            return []
        has = f"; the log has a column {self._writers[0]!r}" if self._writers else ""
        text = (
            "the samplers are the names of the files, since no column is called sampler; "
            f"columns.sampler names the column that says who wrote a response{has}"
        )
        return [text]
