"""One remote Parquet file, read like a local one, of which only some bytes are here."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from gvpo_offline.errors import GVPOError
from gvpo_offline.store.manifest import FileEntry
from gvpo_offline.store.remote.ranges import Range, column_ranges


class Source(Protocol):
    """What brings the bytes of a file."""

    def fetch(self, entry: FileEntry, ranges: Sequence[Range]) -> list[tuple[Range, bytes]]:
        """Ranges of a file, perhaps in smaller pieces, in the order of the file."""

    def forget(self, entry: FileEntry, ranges: Sequence[Range]) -> None:
        """See that ranges are fetched anew when they are next asked for."""


class RemoteShard:
    """One Parquet file, read as `pyarrow.parquet.ParquetFile` reads a local one.

    Threads may share it: each read has its own bytes.

    Args:
        source: brings the bytes.
        entry: which file.
        metadata, schema_arrow: what its footer says.
    """

    def __init__(
        self,
        source: Source,
        entry: FileEntry,
        metadata: pq.FileMetaData,
        schema_arrow: pa.Schema,
    ) -> None:
        self.metadata = metadata
        self.schema_arrow = schema_arrow
        self._source = source
        self._entry = entry

    @property
    def num_row_groups(self) -> int:
        """Row groups of the file."""
        return int(self.metadata.num_row_groups)

    def read_row_group(
        self, index: int, columns: Sequence[str], use_threads: bool = False
    ) -> pa.Table:
        """Some columns of one row group; what does not decode is not kept in the cache.

        Raises:
            IntegrityError, StorageError: as `Source.fetch`.
            OSError, ArrowException: a page fails its checksum or does not decode.
        """
        ranges = column_ranges(self.metadata.row_group(index), columns)
        pieces = self._source.fetch(self._entry, self._within(ranges))
        opened = pa.PythonFile(_Pieces(self._source, self._entry, pieces), mode="r")
        try:
            with pq.ParquetFile(
                opened,
                metadata=self.metadata,
                page_checksum_verification=True,
                pre_buffer=False,  # it would read what lies between the columns as well
            ) as file:
                return file.read_row_group(index, columns=list(columns), use_threads=use_threads)
        except GVPOError:
            raise
        except (OSError, pa.ArrowException):
            self._source.forget(self._entry, ranges)
            raise

    def _within(self, ranges: list[Range]) -> list[Range]:
        if any(not 0 <= start < stop <= self._entry.bytes for start, stop in ranges):
            raise pa.ArrowInvalid("the footer names bytes beyond the file")
        return ranges

    def close(self) -> None:
        """There is nothing to close."""


class _Pieces(io.RawIOBase):
    """A file of which some ranges are here; others are fetched when asked for."""

    def __init__(self, source: Source, entry: FileEntry, pieces: list[tuple[Range, bytes]]) -> None:
        super().__init__()
        self._source = source
        self._entry = entry
        self._pieces = pieces
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._entry.bytes}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._entry.bytes if size < 0 else min(self._at + size, self._entry.bytes)
        parts = []
        for (start, stop), content in self._pieces:
            if start <= self._at < stop:
                part = content[self._at - start : end - start]
                parts.append(part)
                self._at += len(part)
        if self._at < end:
            rest = self._source.fetch(self._entry, [(self._at, end)])
            parts += [content for _, content in rest]
            self._at = end
        return parts[0] if len(parts) == 1 else b"".join(parts)
