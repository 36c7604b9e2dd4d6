"""The encoding of every Parquet file here, and the only place that reads one.

Token lists take no dictionary: PLAIN with zstd needs 1.2 bytes a token where the writer's default
needs 2. Every page carries a checksum and every read verifies it: without, a flipped bit in a token
list comes back as a different token and nobody is told. Checksums cover neither the footer, whose
hash is in the manifest, nor the headers of pages, whose counts are held against the footer's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gvpo_offline.errors import GVPOError, IntegrityError
from gvpo_offline.store.arrow import as_numpy
from gvpo_offline.store.commit import write_hashed
from gvpo_offline.store.manifest import FileEntry

ROWS_PER_ROW_GROUP = 256
_DICTIONARY_COLUMNS = ["source", "samplers.list.element"]
_ZSTD_LEVEL = 3
_TAIL_BYTES = 8  # length of the footer, and "PAR1"
_RESTORE = "restore the file from a copy"


class Shard(Protocol):
    """An open Parquet file: as much of `pyarrow.parquet.ParquetFile` as is used here."""

    @property
    def metadata(self) -> pq.FileMetaData: ...

    @property
    def schema_arrow(self) -> pa.Schema: ...

    @property
    def num_row_groups(self) -> int: ...

    def read_row_group(
        self, index: int, columns: Sequence[str], use_threads: bool = False
    ) -> pa.Table: ...

    def close(self) -> None: ...


def write_parquet(
    root: Path,
    folder: str,
    stem: str,
    schema: pa.Schema,
    row_groups: Iterable[pa.Table],
) -> FileEntry:
    """Write `root/folder/stem-<hash>.parquet`, one Parquet row group per table.

    Raises:
        StorageError: no room; nothing is left behind.
    """
    sizes: list[int] = []

    def write(path: Path) -> None:
        with pq.ParquetWriter(
            path,
            schema,
            compression="zstd",
            compression_level=_ZSTD_LEVEL,
            use_dictionary=[c for c in _DICTIONARY_COLUMNS if c.split(".")[0] in schema.names],
            write_page_checksum=True,
            write_statistics=["group_id"],
        ) as writer:
            for table in row_groups:
                if table.num_rows:
                    writer.write_table(table, row_group_size=table.num_rows)
                    sizes.append(table.num_rows)

    path, digest = write_hashed(root / folder, stem, ".parquet", write)
    return FileEntry(
        path=str(path.relative_to(root)),
        sha256=digest,
        bytes=path.stat().st_size,
        row_groups=tuple(sizes),
        footer_sha256=footer_sha256(path),
    )


def footer_sha256(path: Path) -> str:
    """SHA-256 of a Parquet file's footer, its length and the closing magic number included.

    What is not a Parquet file gets the hash of some of its last bytes.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - _TAIL_BYTES, 0))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(size - _TAIL_BYTES - length, 0))
        return hashlib.sha256(file.read()).hexdigest()


def open_parquet(path: Path, footer: str | None = None) -> pq.ParquetFile:
    """Open a file with page checksums verified on every read.

    Args:
        path: the file.
        footer: what `footer_sha256` gave when the file was written, if known.

    Raises:
        IntegrityError: the file is missing, its footer is another, or cannot be read.
    """
    try:
        if footer is not None and footer_sha256(path) != footer:
            raise IntegrityError(
                f"the SHA-256 of the file's footer is {footer[:16]}…",
                received="another",
                remedy=_RESTORE,
                file=path,
            )
        file = pq.ParquetFile(path, page_checksum_verification=True)
        file.schema_arrow  # noqa: B018 - names of columns are decoded here
        return file
    except FileNotFoundError as error:
        raise IntegrityError(
            "the file exists", received="no such file", remedy=_RESTORE, file=path
        ) from error
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise IntegrityError(
            "a shard is a readable Parquet file", received=str(error), remedy=_RESTORE, file=path
        ) from error


def read_row_group(file: Shard, path: Path | str, index: int, columns: Sequence[str]) -> pa.Table:
    """Read some columns of one row group of an open file; a failed read is tried once more.

    Raises:
        IntegrityError: a page fails its checksum, does not decode, or holds fewer values than the
            footer says.
    """
    failure: Exception | None = None
    for _ in range(2):
        try:
            table = file.read_row_group(index, columns=list(columns), use_threads=False)
            _check_counts(table, file.metadata.row_group(index))
            return table
        except GVPOError:
            raise
        except (OSError, pa.ArrowException) as error:
            failure = error
    raise IntegrityError(
        f"row group {index} decodes and its pages match their checksums",
        received=str(failure),
        remedy=_RESTORE,
        file=path,
    ) from failure


def _check_counts(table: pa.Table, metadata: pq.RowGroupMetaData) -> None:
    """Raise ArrowInvalid unless every column has as many values as the footer says."""
    chunks = (metadata.column(i) for i in range(metadata.num_columns))
    said = {chunk.path_in_schema.split(".")[0]: chunk.num_values for chunk in chunks}
    for name, column in zip(table.column_names, table.columns, strict=True):
        innermost = column.type
        while _is_list(innermost):
            innermost = innermost.value_type
        if pa.types.is_nested(innermost):
            continue  # no column of ours: its type is refused elsewhere
        found = sum(_n_values(chunk) for chunk in column.chunks)
        if found != said[name]:
            raise pa.ArrowInvalid(f"column {name} has {said[name]} values, but {found} were read")


def _n_values(array: pa.Array) -> int:
    """Values as Parquet counts them: those of the innermost lists, an empty or null list as one."""
    if not _is_list(array.type):
        return len(array)
    lengths = pc.list_value_length(array).drop_null()
    return len(array) - int(np.count_nonzero(as_numpy(lengths))) + _n_values(array.flatten())


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
