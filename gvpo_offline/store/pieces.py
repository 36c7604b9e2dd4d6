"""Files of rows that are cut into parts by a hash: what a map task hands to the reduce tasks.

Each map task writes one file, whatever the number of parts, and a reduce task reads from each file
the bytes of its own part only. A file consists of flushes; each holds one piece for each part, in
the order of the parts, then the places of the pieces:

    piece 0, piece 1, … piece n-1      Arrow IPC streams; nothing where a part has no rows
    n + 1 int64                        where each piece begins, and where the last one ends
    …                                  further flushes
    one int64 for each flush           where its list of places begins
    int64                              number of flushes

Integers are little-endian. The file is written under a temporary name and renamed when complete.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from gvpo_offline.errors import IntegrityError
from gvpo_offline.files import fsync_folder, make_folder, storage_errors, temporary_name
from gvpo_offline.store.spill import leading_bits

_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")
_LEAST_BUFFER, _MOST_BUFFER = 48 << 20, 512 << 20
# A stream takes about 3 KB besides its rows: with many parts more rows are held before a flush.
_PIECE_BYTES = 64 << 10
_INT = np.dtype("<i8")


class PieceWriter:
    """Writes the file of one map task.

    Args:
        path: of the file; it appears with `finish`.
        schema: schema of the rows, with a uint64 column `key`.
        n_parts: a power of two; the part of a row is the leading bits of its key.
    """

    def __init__(self, path: Path, schema: pa.Schema, n_parts: int) -> None:
        self._path = path
        self._schema = schema
        self._n_parts = n_parts
        self._limit = min(_MOST_BUFFER, max(_LEAST_BUFFER, n_parts * _PIECE_BYTES))
        self._buffer: list[pa.Table] = []
        self._buffered = 0
        self._places: list[int] = []
        self._parts = np.zeros(n_parts, bool)
        make_folder(path.parent)
        self._temporary = temporary_name(path.parent, path.stem)
        self._file: IO[bytes] = self._temporary.open("wb")

    def add(self, table: pa.Table) -> None:
        """Add rows; they are written when there are many.

        Raises:
            StorageError: the disk is full.
        """
        self._buffer.append(table)
        self._buffered += table.nbytes
        if self._buffered > self._limit:
            self._flush()

    def finish(self) -> list[int]:
        """Complete the file.

        Returns:
            The parts that have rows, ascending.

        Raises:
            StorageError: the disk is full.
        """
        self._flush()
        with storage_errors(self._path):
            self._file.write(np.array([*self._places, len(self._places)], _INT).tobytes())
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.rename(self._temporary, self._path)
            fsync_folder(self._path.parent)
        return [int(part) for part in np.flatnonzero(self._parts)]

    def close(self) -> None:
        """Remove an unfinished file."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._buffered:
            return
        table = pa.concat_tables(self._buffer).combine_chunks()
        self._buffer, self._buffered = [], 0
        parts = leading_bits(table.column("key").to_numpy(), self._n_parts).astype(np.int64)
        # Stable: the rows of a part stay in the order in which they were added.
        order = np.argsort(parts, kind="stable")
        ends = np.searchsorted(parts[order], np.arange(self._n_parts), side="right")
        places, start = [self._file.tell()], 0
        with storage_errors(self._path):
            for part, end in enumerate(ends.tolist()):
                if end > start:
                    self._parts[part] = True
                    rows = table.take(pa.array(order[start:end]))
                    with pa.ipc.new_stream(self._file, self._schema, options=_OPTIONS) as stream:
                        stream.write_table(rows)
                places.append(self._file.tell())
                start = end
            self._places.append(self._file.tell())
            self._file.write(np.array(places, _INT).tobytes())


def read_pieces(path: Path, part: int) -> Iterator[pa.Table]:
    """The rows of one part in a map task's file, a table for each flush, in order.

    Args:
        path: of the file.
        part: number of the part.

    Raises:
        IntegrityError: the file is missing or damaged.
    """
    try:
        with path.open("rb") as file:
            for start, end in _places(file, part):
                found = _read(file, start, end - start)
                with pa.ipc.open_stream(pa.py_buffer(found)) as stream:
                    yield stream.read_all()
    except (OSError, EOFError, ValueError, pa.ArrowException) as error:
        raise IntegrityError(
            "the rows that a map task wrote stay complete until the dataset is published",
            received=str(error),
            remedy="remove the folder .spill of the dataset and run the same command again",
            file=path,
        ) from error


def _places(file: IO[bytes], part: int) -> Iterator[tuple[int, int]]:
    size = file.seek(0, os.SEEK_END)
    (n_flushes,) = _integers(file, size - _INT.itemsize, 1)
    for flush in _integers(file, size - (n_flushes + 1) * _INT.itemsize, n_flushes):
        start, end = _integers(file, flush + part * _INT.itemsize, 2)
        if end > start:
            yield start, end


def _integers(file: IO[bytes], at: int, n: int) -> list[int]:
    found: list[int] = np.frombuffer(_read(file, at, n * _INT.itemsize), _INT).tolist()
    return found


def _read(file: IO[bytes], at: int, n: int) -> bytes:
    size = file.seek(0, os.SEEK_END)
    if not 0 <= at <= at + n <= size:
        raise EOFError(f"a place that it does not have: {n} bytes at {at} of {size}")
    file.seek(at)
    return file.read(n)
