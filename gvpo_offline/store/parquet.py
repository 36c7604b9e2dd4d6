"""Reading and writing of Parquet files.

Token lists are not dictionary-encoded: PLAIN with zstd takes 1.2 bytes per token, the writer's
default 2. Every page has a checksum that every read verifies; without it, a flipped bit in a token
list would be read as another token. Page checksums do not cover the footer, whose hash is in the
manifest, nor the page headers, whose value counts are compared with the footer's.
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

from gvpo_offline.errors import GVPOError
from gvpo_offline.store.arrow import as_numpy
from gvpo_offline.store.commit import write_hashed
from gvpo_offline.store.manifest import FileEntry, check_footer, damaged
from gvpo_offline.store.row_group_sizes import RowGroups
from gvpo_offline.store.within import check_regular, path_within
from gvpo_offline.system_errors import raise_translated

ROWS_PER_ROW_GROUP = 256
_DICTIONARY_COLUMNS = ["source", "samplers.list.element"]
_ZSTD_LEVEL = 3
_TAIL_BYTES = 8  # length of the footer, and "PAR1"
# Raised by pyarrow where a footer or a page does not decode.
UNREADABLE = (OSError, pa.ArrowException, UnicodeError)


class Shard(Protocol):
    """An open Parquet file: the part of `pyarrow.parquet.ParquetFile` that is used here."""

    @property
    def metadata(self) -> pq.FileMetaData: ...

    @property
    def schema_arrow(self) -> pa.Schema: ...

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
        StorageError: the disk is full; the temporary file is removed.
        IntegrityError: `folder` is a link that leaves `root`.
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

    target = path_within(root, f"{folder}/{stem}.parquet")
    path, digest = write_hashed(target.parent, stem, ".parquet", write)
    return FileEntry(
        path=str(path.relative_to(root)),
        sha256=digest,
        bytes=path.stat().st_size,
        row_groups=RowGroups(sizes),
        footer_sha256=footer_sha256(path),
    )


def footer_sha256(path: Path) -> str:
    """SHA-256 of a Parquet file's footer, with its length and the final magic number.

    Of any other file: the SHA-256 of some of its last bytes.
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
        footer: `footer_sha256` of the file when it was written, if known.

    Raises:
        IntegrityError: the file is missing or no regular file, or its footer is another or does not
            decode.
    """
    try:
        check_regular(path)
        check_footer(footer, footer_sha256(path) if footer else "", path)
        file = pq.ParquetFile(path, page_checksum_verification=True)
        file.schema_arrow  # noqa: B018 - decodes the column names
        return file
    except FileNotFoundError as error:
        raise damaged("the file exists", "no such file", path) from error
    except UNREADABLE as error:
        raise_translated(error, path)
        raise damaged("a shard is a readable Parquet file", error, path) from error


def read_row_group(file: Shard, path: Path | str, index: int, columns: Sequence[str]) -> pa.Table:
    """Read some columns of one row group of an open file; a failed read is repeated once.

    Raises:
        IntegrityError: a page fails its checksum, does not decode, or has another number of values
            than the footer says.
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
    assert failure is not None
    raise_translated(failure, path)
    raise damaged(
        f"row group {index} decodes and its pages match their checksums", failure, path
    ) from failure


def _check_counts(table: pa.Table, metadata: pq.RowGroupMetaData) -> None:
    """Raise ArrowInvalid unless every column has the number of values in the footer."""
    chunks = (metadata.column(i) for i in range(metadata.num_columns))
    stated = {chunk.path_in_schema.split(".")[0]: chunk.num_values for chunk in chunks}
    for name, column in zip(table.column_names, table.columns, strict=True):
        innermost = column.type
        while _is_list(innermost):
            innermost = innermost.value_type
        if pa.types.is_nested(innermost):
            continue  # not a column of the schema; `cast_columns` refuses its type
        found = sum(_n_values(chunk) for chunk in column.chunks)
        if found != stated[name]:
            raise pa.ArrowInvalid(f"column {name} has {stated[name]} values, but {found} were read")


def _n_values(array: pa.Array) -> int:
    """Number of values as Parquet counts them: an empty or null list counts as one."""
    if not _is_list(array.type):
        return len(array)
    lengths = pc.list_value_length(array).drop_null()
    return len(array) - int(np.count_nonzero(as_numpy(lengths))) + _n_values(array.flatten())


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
