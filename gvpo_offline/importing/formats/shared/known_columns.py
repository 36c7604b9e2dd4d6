"""Column checks of formats with fixed column names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from gvpo_offline import values
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.settings import AUTO, Columns, ImportConfig
from gvpo_offline.paths import has, top_level_names

__all__ = ["KnownColumns"]


class KnownColumns:
    """The columns that each row of a format must have, and those that `columns.keep` names.

    Args:
        config: the import's settings; of `columns` only `keep` may be set.
        required: the columns that each row has.

    Attributes:
        names: both kinds of columns; for a path in `columns.keep`, the columns that may hold it.

    Raises:
        ConfigError: a setting of `columns` other than `keep` is set.
    """

    def __init__(self, config: ImportConfig, required: Sequence[str]) -> None:
        default = Columns()
        named = [f.name for f in fields(Columns) if f.name != "keep"]
        unset = {n: (getattr(default, n), None) for n in named if getattr(default, n) == AUTO}
        changed = [
            n
            for n in named
            if getattr(config.columns, n) not in unset.get(n, (getattr(default, n),))
        ]
        if changed:
            raise ConfigError(
                f"format: {config.format} has fixed column names, so only columns.keep is set",
                received=", ".join(f"columns.{name}" for name in changed),
                remedy="leave it out, or choose format: flat",
            )
        self._format = config.format
        self._keep = config.columns.keep
        self._needed = [*required, *self._keep]
        self.names = [*required, *top_level_names(self._keep)]

    def metadata(self, record: Mapping[str, Any], present: Sequence[str] | None) -> str | None:
        """The values of the row's `columns.keep`, as a JSON object, or None if none are kept.

        Args:
            record: the row.
            present: the columns of the input, or None where each row names its own.

        Raises:
            DataError: a column is missing.
        """
        missing = [name for name in self._needed if not has(record, name)]
        if missing:
            there = ", ".join(record if present is None else present) or "none"
            raise DataError(
                f"a row of format: {self._format} has the columns {', '.join(self._needed)}",
                received=f"no {', '.join(missing)} among {there}",
                remedy="choose the log's format, or format: flat with the names of its columns",
            )
        return values.metadata(record, self._keep)
