"""The encoding of every Parquet file here, and the only place that reads one.

Token lists take no dictionary: PLAIN with zstd needs 1.2 bytes a token where the writer's default
needs 2. Every page carries a checksum and every read verifies it: without, a flipped bit in a token
list comes back as a different token and nobody is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gvpo_offline.errors import IntegrityError
from gvpo_offline.store.commit import write_hashed
from gvpo_offline.store.manifest import FileEntry

ROWS_PER_ROW_GROUP = 256
_DICTIONARY_COLUMNS = ["source", "samplers.list.element"]
_ZSTD_LEVEL = 3


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
        row_groups=sizes,
    )


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a file with page checksums verified on every read.

    Raises:
        IntegrityError: the file is missing or its footer cannot be read.
    """
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except FileNotFoundError as error:
        raise IntegrityError("every file that the manifest names exists", file=path) from error
    except (OSError, pa.ArrowException) as error:
        raise IntegrityError(
            "a shard is a readable Parquet file", received=str(error), file=path
        ) from error


def read_row_group(
    file: pq.ParquetFile, path: Path, index: int, columns: Sequence[str]
) -> pa.Table:
    """Read some columns of one row group; a failed read is tried once more.

    Raises:
        IntegrityError: a page fails its checksum, or does not decode.
    """
    failure: Exception | None = None
    for _ in range(2):
        try:
            return file.read_row_group(index, columns=list(columns), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            failure = error
    raise IntegrityError(
        f"row group {index} decodes and its pages match their checksums",
        received=str(failure),
        remedy="restore the file from a copy",
        file=path,
    ) from failure
