"""Rows of tables brought together by a hash, on disk, whatever order they come in.

A row's bucket is the leading bits of its `key`, so that buckets in order, sorted inside, are all
rows in order of their key. A bucket fits in memory; how many rows there are in all does not matter.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from gvpo_offline.hashing import UInt64Array
from gvpo_offline.store.commit import storage_errors

_BUFFER_BYTES = 48 << 20
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


def leading_bits(keys: UInt64Array, n_parts: int) -> UInt64Array:
    """The part of each key where the keys' range is cut into `n_parts`, a power of two."""
    bits = n_parts.bit_length() - 1
    return keys >> np.uint64(64 - bits) if bits else np.zeros_like(keys)


class TableSpill:
    """Rows on disk, by bucket.

    Args:
        folder: where to; made by `open`, removed by `close`.
        schema: of the rows, with `key`, a uint64.
        n_buckets: a power of two.
        skip: buckets whose rows are not needed.
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
        """Start empty, whatever an earlier run left."""
        self.close()
        self.folder.mkdir(parents=True)

    def close(self) -> None:
        """Remove what was spilled."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, table: pa.Table) -> None:
        """Take some rows.

        Raises:
            StorageError: no room.
        """
        self._buffer.append(table)
        self._buffered += table.nbytes
        if self._buffered > _BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Append what is buffered to the buckets' files.

        Raises:
            StorageError: no room.
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
        # One short stream after another in a file: no file stays open however many there are.
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
        """Some columns of a bucket's rows, in one chunk each, or None if it has no rows."""
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
