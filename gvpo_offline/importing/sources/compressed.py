"""Compressed text files: gzip, bzip2 and Zstandard, by their suffix, as streams of bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa

from gvpo_offline.errors import IntegrityError, StorageError
from gvpo_offline.system_errors import raise_translated

__all__ = ["FACTOR", "SUFFIXES", "damage_named", "decompressed", "is_compressed", "without_suffix"]

SUFFIXES = (".gz", ".bz2", ".zst")
FACTOR = 5
"""Approximate ratio of the lengths of logs before and after compression."""

# What the decompressors raise for a file that is damaged or ends early. pyarrow raises OSError.
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, pa.ArrowException, OSError)
_BUFFER = 1 << 18


def is_compressed(path: Path) -> bool:
    """Whether a file's suffix is that of a compressed file."""
    return path.suffix in SUFFIXES


def without_suffix(path: Path) -> Path:
    """The path without the suffix of a compressed file: logs.csv for logs.csv.gz."""
    return path.with_suffix("") if is_compressed(path) else path


def decompressed(raw: IO[bytes], suffix: str) -> IO[bytes]:
    """The content of a file that is open, as a buffered stream.

    Args:
        raw: the file.
        suffix: its suffix; a suffix that is not of a compressed file gives `raw`.
    """
    if suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if suffix == ".bz2":
        return cast(IO[bytes], bz2.BZ2File(raw))
    if suffix == ".zst":
        stream: Any = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
        return io.BufferedReader(stream, _BUFFER)
    return raw


@contextmanager
def damage_named(label: str, suffix: str, row: list[int]) -> Iterator[None]:
    """Turn a decompressor's exceptions into an IntegrityError.

    Args:
        label: the input, for the message.
        suffix: its suffix. If it is not of a compressed file, exceptions pass.
        row: one number, the row that is being read when the exception is raised.
    """
    if suffix not in SUFFIXES:
        yield
        return
    try:
        yield
    except (IntegrityError, StorageError):
        raise
    except _DAMAGE as error:
        raise_translated(error, label)
        raise IntegrityError(
            f"a {suffix} file is complete",
            received=str(error) or type(error).__name__,
            remedy="copy or compress the file again",
            file=label,
            row=row[0],
        ) from error
