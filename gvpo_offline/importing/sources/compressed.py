"""Compressed text files: gzip, bzip2 and Zstandard, by their suffix, as streams of bytes.

A stream ends with an error once a file of a few bytes has given far more than it can hold.
"""

from __future__ import annotations

import bz2
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa

from gvpo_offline.errors import DataError, IntegrityError, StorageError
from gvpo_offline.limits import BoundedReader, Limits
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


def decompressed(
    raw: IO[bytes], suffix: str, limits: Limits | None = None, file: Any = None
) -> IO[bytes]:
    """The content of a file that is open, as a buffered stream.

    Args:
        raw: the file.
        suffix: its suffix; a suffix that is not of a compressed file gives `raw`.
        limits: bound the ratio of both lengths. Default: the defaults.
        file: the file, for the error.

    Reading raises DataError if the file gives too many bytes for its own.
    """
    content: Any
    if suffix == ".gz":
        content = gzip.GzipFile(fileobj=raw)
    elif suffix == ".bz2":
        content = bz2.BZ2File(raw)
    elif suffix == ".zst":
        content = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    else:
        return raw
    size = os.fstat(raw.fileno()).st_size
    bounded = BoundedReader(content, size, limits or Limits(), file)
    return cast(IO[bytes], io.BufferedReader(bounded, _BUFFER))


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
    except (IntegrityError, DataError, StorageError):
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
