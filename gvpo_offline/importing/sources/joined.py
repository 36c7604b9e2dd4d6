"""Joins: columns of other files, added to the rows of an input by a key.

The joined files are read once into a temporary database on disk, so memory does not depend on their
length; the rows of the log keep their order. The database is SQLite's, without a name: it is in the
folder for temporary files (SQLITE_TMPDIR, TMPDIR, else /var/tmp) and is removed with the process.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gvpo_offline.errors import ConfigError, DataError, StorageError
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.files import Advance, Source
from gvpo_offline.importing.sources.inputs import find_sources
from gvpo_offline.importing.sources.rows import Record, Row
from gvpo_offline.limits import Limits
from gvpo_offline.paths import MISSING, top_level_names, value_at
from gvpo_offline.values import plain

__all__ = ["open_inputs"]

_CACHE_KIB = 32 << 10
_KEY_BYTES = 16  # of BLAKE2b: two of 2^40 keys are equal with a probability of 2^-49
_DROPPED = "dropped_unmatched_rows"


def open_inputs(config: ImportConfig) -> list[Source]:
    """The inputs of an import, with the columns of the files in `join`.

    Raises:
        ConfigError: as `find_sources`, or `on` is not a key.
        DataError: a path or glob matches nothing.
        IntegrityError: the footer of a Parquet file cannot be read.
    """
    limits = config.limits
    sources = find_sources(
        config.inputs, rows_at=config.rows_at, log_format=config.format, limits=limits
    )
    patterns = [config.join] if isinstance(config.join, str) else list(config.join)
    if not patterns:
        return sources
    on = [config.on] if isinstance(config.on, str) else list(config.on)
    keys = map(_Key.parse, on * len(patterns) if len(on) == 1 else on)
    joins = [_Join(pattern, key, limits) for pattern, key in zip(patterns, keys, strict=True)]
    extra = sum(s.text_bytes for join in joins for s in join.sources) // len(sources)
    drop = config.on_missing == "drop"
    return [JoinedRows(source, joins, drop=drop, extra_bytes=extra) for source in sources]


@dataclass(frozen=True)
class _Key:
    """The paths of a key in the log and in the joined file, in the same order."""

    text: str
    log: tuple[str, ...]
    file: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> _Key:
        pairs = [part.strip().partition("=") for part in text.split(",")]
        log = tuple(left.strip() for left, _, _ in pairs)
        file = tuple((right if equals else left).strip() for left, equals, right in pairs)
        if not all(log) or not all(file):
            raise ConfigError(
                "on names the key of a join",
                received=repr(text),
                remedy="write it as task_id, doc.id=task_id, or task_id,epoch",
            )
        return cls(text, log, file)


def _key_of(record: Record, paths: Sequence[str]) -> list[str | None]:
    """The texts of the values of a key: None for null.

    Raises:
        DataError: a value is missing, or neither text nor an integer.
    """
    found: list[str | None] = []
    for path in paths:
        value = value_at(record, path)
        if value is MISSING:
            raise DataError(
                f"a row has the column {path!r}, which `on` names",
                received=f"the columns {', '.join(record)}",
                remedy="set on to the key of both files; log=file where their names differ",
            )
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # of a column of integers with nulls
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise DataError("a key is text or an integer", received=f"{path}: {value!r}")
        found.append(None if value is None else str(value))
    return found


def _hashed(key: Sequence[str | None]) -> bytes:
    # The text of the list, in which a lone surrogate is an escape.
    return hashlib.blake2b(repr(key).encode(), digest_size=_KEY_BYTES).digest()


class _Join:
    """The files of one entry of `join`."""

    def __init__(self, pattern: str, key: _Key, limits: Limits) -> None:
        self.key = key
        self.sources = find_sources(pattern, limits=limits)
        self.label = ", ".join(source.label for source in self.sources)
        self._digests: list[str] | None = None
        self._read: tuple[str, ...] | None = None
        self._table: sqlite3.Connection | None = None

    def describe(self) -> str:
        """The key, and name and SHA-256 of each file."""
        if self._digests is None:
            self._digests = [source.sha256(lambda _: None) for source in self.sources]
        names = [source.file_name for source in self.sources]
        files = [f"{name} {digest}" for name, digest in zip(names, self._digests, strict=True)]
        return f"{', '.join(files)} on {self.key.text}"

    def load(self, columns: Sequence[str] | None) -> None:
        """Read the given columns (None: all) of the files, unless that was done before.

        Raises:
            DataError: a row cannot be parsed, or its key is null or that of an earlier row.
            StorageError: the disk is full.
        """
        wanted = ("*",) if columns is None else tuple(columns)
        if self._table is not None and wanted == self._read:
            return
        table = sqlite3.connect("", isolation_level=None)
        table.execute("PRAGMA journal_mode = OFF")
        table.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        table.execute("CREATE TABLE rows (key BLOB PRIMARY KEY, file INT, row INT, record BLOB)")
        read = None if columns is None else [*columns, *top_level_names(self.key.file)]
        table.execute("BEGIN")
        for number, source in enumerate(self.sources):
            for row, record in source.rows(read, lambda _: None):
                self._add(table, (number, row), record)
            source.check_unchanged()
        self._table, self._read = table, wanted

    def _add(self, table: sqlite3.Connection, place: tuple[int, int], record: Record) -> None:
        location: dict[str, Any] = {"file": self.sources[place[0]].label, "row": place[1]}
        try:
            key = _key_of(record, self.key.file)
        except DataError as error:
            raise error.replaced(**location) from None
        if None in key:
            raise DataError("a key is not null", received=key, remedy="remove the row", **location)
        # The log has the key under its own name.
        kept = {name: value for name, value in record.items() if name not in self.key.file}
        hashed = _hashed(key)
        try:
            table.execute(
                "INSERT INTO rows VALUES (?, ?, ?, ?)", (hashed, *place, pickle.dumps(kept, 5))
            )
        except sqlite3.IntegrityError:
            query = "SELECT file, row FROM rows WHERE key = ?"
            file, row = table.execute(query, (hashed,)).fetchone()
            raise DataError(
                "a key occurs once in a joined file",
                received=f"{_shown(key)} again, first at {self.sources[file].label}, row {row}",
                remedy="remove one of the rows, or name further columns in `on`. If a key has "
                "several responses, make this file the input and join the other one",
                **location,
            ) from None
        except sqlite3.OperationalError as error:
            raise StorageError(
                "the folder for temporary files has room for the joined files",
                received=str(error),
                remedy="free space, or set TMPDIR to a folder on a larger disk",
            ) from error

    def extended(self, record: Record, columns: Sequence[str] | None) -> Record | None:
        """A row of the log with the columns of its row in the files; None if there is none.

        Raises:
            DataError: the key is missing, or a column that both have differs.
        """
        assert self._table is not None
        key = _key_of(record, self.key.log)
        query = "SELECT file, row, record FROM rows WHERE key = ?"
        found = None if None in key else self._table.execute(query, (_hashed(key),)).fetchone()
        if found is None:
            return None
        added: Mapping[str, Any] = pickle.loads(found[2])
        if columns is not None:
            added = {name: value for name, value in added.items() if name in columns}
        for name in added.keys() & record.keys():
            if not _equal(added[name], record[name]):
                place = f"{self.sources[found[0]].label}, row {found[1]}"
                raise DataError(
                    "a column that the log and a joined file both have is equal in both",
                    received=f"{name}: {record[name]!r}, and {added[name]!r} in {place}",
                    remedy="rename or remove the column in one of the files",
                )
        return {**added, **record}

    def unmatched(self, record: Record) -> DataError:
        """The error of a row that has no row in the files."""
        return DataError(
            "each row of the log has a row with its key in a joined file",
            received=f"{_shown(_key_of(record, self.key.log))}, which is not in {self.label}",
            remedy="correct the key (on) or the file, or drop such rows (on_missing: drop)",
        )


def _shown(key: Sequence[str | None]) -> str:
    return ", ".join(map(repr, key))


def _equal(a: Any, b: Any) -> bool:
    # By their JSON: NaN equals NaN, an array equals the list of its values.
    return a is b or (
        json.dumps(a, default=plain, sort_keys=True) == json.dumps(b, default=plain, sort_keys=True)
    )


class JoinedRows(Source):
    """An input with the columns of joined files.

    Args:
        source: the input.
        joins: the joined files; a key may be a column that an earlier one of them adds.
        drop: whether rows without a row in a joined file are dropped; else they are an error.
        extra_bytes: approximate length of what is added to all rows.
    """

    def __init__(
        self, source: Source, joins: Sequence[_Join], *, drop: bool, extra_bytes: int
    ) -> None:
        super().__init__(source.label, source.name, source.files)
        self.size = source.size
        self.text_bytes = source.text_bytes + extra_bytes
        self._source = source
        self._joins = joins
        self._drop = drop
        self._dropped: Counter[str] = Counter()
        parts = [source, *(own for join in joins for own in join.sources)]
        if all(part.columns is not None for part in parts):
            self.columns = _union([part.columns or () for part in parts])
            self.floats = _union([part.floats or () for part in parts])

    def sha256(self, advance: Advance) -> str:
        """SHA-256 of the input alone; those of the joined files are `dependencies`."""
        return self._source.sha256(advance)

    def dependencies(self) -> Mapping[str, str]:
        """See `Source.dependencies`."""
        own = {"join": "; ".join(join.describe() for join in self._joins)}
        return {**self._source.dependencies(), **own}

    def left_out(self) -> Mapping[str, int]:
        """See `Source.left_out`."""
        return dict(self._dropped)

    def column_names(self) -> Sequence[str] | None:
        """See `Source.column_names`."""
        own = self._source.column_names()
        if own is None:
            return None
        added = [[s.column_names() or () for s in join.sources] for join in self._joins]
        # A column that only some of the files have is not in every row.
        common = [[n for n in each[0] if all(n in other for other in each)] for each in added]
        return _union([own, *common])

    def check_unchanged(self) -> None:
        """See `Source.check_unchanged`."""
        self._source.check_unchanged()
        for join in self._joins:
            for source in join.sources:
                source.check_unchanged()

    def rows(self, columns: Sequence[str] | None, advance: Advance) -> Iterator[Row]:
        """See `Source.rows`; rows that are left out keep their numbers."""
        wanted = columns
        if columns is not None:
            wanted = _union([columns, *(top_level_names(j.key.log) for j in self._joins)])
        for join in self._joins:
            join.load(wanted)
        self._source.on_refused = self.on_refused
        for number, row in self._source.rows(wanted, advance):
            record: Record | None = row
            try:
                for join in self._joins:
                    assert record is not None
                    before, record = record, join.extended(record, wanted)
                    if record is None:
                        if not self._drop:
                            raise join.unmatched(before)
                        self._dropped[_DROPPED] += 1
                        break
            except DataError as error:
                located = error.replaced(file=self.label, row=number)
                self.refuse(located, row)
                continue
            if record is not None:
                yield number, record


def _union(names: Sequence[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for own in names for name in own))
