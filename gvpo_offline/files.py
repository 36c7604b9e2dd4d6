"""Files that are complete or absent, locks of folders, and the errors of the file system."""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gvpo_offline.errors import DataError, StorageError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full disk (or quota, or file-size limit) into a StorageError that names `path`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError) or error.errno not in _NO_ROOM:
            raise
        raise StorageError(
            "there must be room on the disk for what is written",
            received=os.strerror(error.errno),
            remedy="free some space and run the same command again: committed tasks are kept",
            file=path,
        ) from error


def make_folder(folder: Path) -> None:
    """Create `folder` with its parents, and sync the new directory entries to disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Sync the entries of a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_name(folder: Path, stem: str) -> Path:
    """A unique temporary path in `folder`."""
    return folder / f".{stem}.{uuid.uuid4().hex}.tmp"


def replace_text(path: Path, text: str) -> None:
    """Write a file of text, complete or not at all: beside the old one, synced to disk, renamed.

    Lone surrogates, which UTF-8 cannot hold, are written as escapes.

    Raises:
        StorageError: the disk is full.
    """
    temporary = temporary_name(path.parent, path.name)
    try:
        with storage_errors(path):
            make_folder(path.parent)
            with temporary.open(
                "w", encoding="utf-8", errors="backslashreplace", newline=""
            ) as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


_WRITERS = "one import, merge, compaction or pull at a time writes to a folder"


def lock_folder(root: Path, *, wait: bool = False, what: str = _WRITERS) -> int | None:
    """Lock a folder, so that no other process that locks it writes to it.

    Args:
        root: the folder.
        wait: wait for the lock instead of raising.
        what: the rule that a second process breaks.

    Returns:
        A file descriptor; closing it, or the end of the process, releases the lock. None on a file
        system without locks; there, commit records alone keep two runs apart.

    Raises:
        DataError: another process holds the lock.
    """
    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise DataError(
            what,
            received="another process that holds the lock",
            remedy="wait until it ends, or choose another folder",
            file=root,
        ) from error
    except OSError:
        os.close(handle)
        return None
    return handle
