"""A remote Parquet file with the reading methods of `pyarrow.parquet.ParquetFile`."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from gvpo_offline.errors import GVPOError
from gvpo_offline.store.remote.ranges import Range, column_ranges

Fetch = Callable[[Sequence[Range]], dict[Range, bytes]]


class RemoteShard:
    """One Parquet file of which only the requested column chunks are fetched.

    Threads may share it: each read keeps its own bytes.

    Args:
        footer: the file's footer with the magic number after it.
        size: length of the file in bytes.
        fetch: returns the bytes of ranges of the file.
        forget: removes ranges from the cache, so that the next `fetch` downloads them.

    Raises:
        OSError, ArrowException, UnicodeDecodeError: the footer does not decode.
    """

    def __init__(
        self, footer: bytes, size: int, fetch: Fetch, forget: Callable[[Sequence[Range]], None]
    ) -> None:
        with pq.ParquetFile(pa.BufferReader(footer)) as file:
            self.metadata = file.metadata
            self.schema_arrow = file.schema_arrow
        self._size = size
        self._fetch = fetch
        self._forget = forget

    def read_row_group(
        self, index: int, columns: Sequence[str], use_threads: bool = False
    ) -> pa.Table:
        """Some columns of one row group; ranges that do not decode are removed from the cache.

        Raises:
            IntegrityError, StorageError: `fetch` failed.
            OSError, ArrowException: a page fails its checksum or does not decode.
        """
        ranges = column_ranges(self.metadata.row_group(index), columns)
        if any(not 0 <= start < stop <= self._size for start, stop in ranges):
            raise pa.ArrowInvalid("the footer names bytes beyond the file")
        chunks = _ColumnChunks(self._size, self._fetch, self._fetch(ranges))
        try:
            with pq.ParquetFile(
                pa.PythonFile(chunks, mode="r"),
                metadata=self.metadata,
                page_checksum_verification=True,
                pre_buffer=False,  # it would also read the bytes between the columns
            ) as file:
                return file.read_row_group(index, columns=list(columns), use_threads=use_threads)
        except (OSError, pa.ArrowException) as error:
            if not isinstance(error, GVPOError):
                self._forget(ranges)
            raise

    def close(self) -> None:
        """Nothing to close: every read has its own file object."""


class _ColumnChunks(io.RawIOBase):
    """A read-only file of which some ranges are in memory; any other read is fetched."""

    def __init__(self, size: int, fetch: Fetch, chunks: dict[Range, bytes]) -> None:
        super().__init__()
        self._size = size
        self._fetch = fetch
        self._chunks = chunks
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        start = self._at
        self._at = stop = self._size if size < 0 else min(start + size, self._size)
        for (first, last), content in self._chunks.items():
            if first <= start and stop <= last:
                return content[start - first : stop - first]
        return self._fetch([(start, stop)])[start, stop] if start < stop else b""
