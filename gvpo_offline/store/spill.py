"""Tables on disk, partitioned by a hash of their rows, in any order of arrival.

The bucket of a row is the leading bits of its `key`. Buckets in ascending order, sorted inside, are
therefore all rows in ascending order of key. Memory holds one bucket at a time, however many rows
there are.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from gvpo_offline.files import storage_errors
from gvpo_offline.hashing import UInt64Array

_BUFFER_BYTES = 48 << 20
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


_MAX_BITS = 16


def power_of_two(total_bytes: int, part_bytes: int) -> int:
    """The number of parts, a power of two up to 65,536, at which a part is at most `part_bytes`."""
    bits = 0
    while bits < _MAX_BITS and (total_bytes >> bits) > part_bytes:
        bits += 1
    return 1 << bits


def leading_bits(keys: UInt64Array, n_parts: int) -> UInt64Array:
    """The index of each key's part when the range of uint64 is cut into `n_parts` equal parts.

    Args:
        keys: (N,) uint64.
        n_parts: a power of two.

    Returns:
        (N,) uint64 in [0, n_parts).
    """
    bits = n_parts.bit_length() - 1
    return keys >> np.uint64(64 - bits) if bits else np.zeros_like(keys)


class TableSpill:
    """Rows on disk, by bucket.

    Args:
        folder: the folder of the bucket files; `open` creates it and `close` removes it.
        schema: schema of the rows, with a uint64 column `key`.
        n_buckets: a power of two.
        skip: buckets whose rows are discarded.
    """

    def __init__(
        self, folder: Path, schema: pa.Schema, n_buckets: int, skip: Collection[int] = ()
    ) -> None:
        self.folder = folder
        self.schema = schema
        self._n_buckets = n_buckets
        self._skip = np.isin(np.arange(n_buckets), list(skip))
        self._buffer: list[pa.Table] = []
        self._buffered = 0

    def open(self) -> None:
        """Create an empty folder; files of an earlier run are removed."""
        self.close()
        self.folder.mkdir(parents=True)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, table: pa.Table) -> None:
        """Buffer rows; write the buffer to disk when it is large.

        Raises:
            StorageError: the disk is full.
        """
        self._buffer.append(table)
        self._buffered += table.nbytes
        if self._buffered > _BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Append the buffered rows to the files of their buckets.

        Raises:
            StorageError: the disk is full.
        """
        if not self._buffer:
            return
        table = pa.concat_tables(self._buffer).combine_chunks()
        self._buffer, self._buffered = [], 0
        buckets = leading_bits(table.column("key").to_numpy(), self._n_buckets).astype(np.int64)
        order = np.argsort(buckets, kind="stable")
        order = order[~self._skip[buckets[order]]]
        cuts = np.flatnonzero(np.diff(buckets[order])) + 1
        for rows in np.split(order, cuts):
            if len(rows):
                self._append(int(buckets[rows[0]]), table.take(pa.array(rows)))

    def _append(self, bucket: int, table: pa.Table) -> None:
        path = self._path(bucket)
        # A file holds one short stream per flush, so that no file stays open between flushes.
        with (
            storage_errors(path),
            path.open("ab") as file,
            pa.ipc.new_stream(file, self.schema, options=_OPTIONS) as stream,
        ):
            stream.write_table(table)

    def holds(self, bucket: int) -> bool:
        """Whether a bucket has rows."""
        return self._path(bucket).exists()

    def read(self, bucket: int, columns: Sequence[str]) -> pa.Table | None:
        """The given columns of a bucket's rows, one chunk each, or None if it has no rows."""
        if not self.holds(bucket):
            return None
        path = self._path(bucket)
        indices = sorted(self.schema.get_field_index(name) for name in columns)
        options = pa.ipc.IpcReadOptions(included_fields=indices, use_threads=False)
        batches: list[pa.RecordBatch] = []
        size = path.stat().st_size
        with pa.OSFile(str(path)) as file:
            while file.tell() < size:
                with pa.ipc.open_stream(file, options=options) as stream:
                    batches.extend(stream)
        return pa.Table.from_batches(batches).combine_chunks()

    def remove(self, bucket: int) -> None:
        """Remove one bucket's file."""
        self._path(bucket).unlink(missing_ok=True)

    def _path(self, bucket: int) -> Path:
        return self.folder / f"{bucket:05d}.arrows"
