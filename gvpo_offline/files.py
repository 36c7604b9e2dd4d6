"""Files that are complete or absent, locks of folders, and the errors of the file system."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from gvpo_offline.errors import DataError, StorageError
from gvpo_offline.system_errors import translated

# Files that are open already, such as the pipe of a shell's <(…) or >(…).
_OPEN_FILES = ("/dev/fd/", "/dev/std", "/proc/self/fd/")
_STREAMS = (*_OPEN_FILES, "/dev/tty", "/dev/pts/")


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn errors of the operating system into StorageErrors that name the file, or else `path`.

    A full disk, missing rights, a read-only file system, too many open files and the like; see
    `system_errors`. Other exceptions pass.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        found = translated(error, path)
        if found is None:
            raise
        try:
            raise found from error
        finally:
            del found  # a cycle with its traceback would keep files open that failed to be written


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


def check_file(path: str | Path) -> None:
    """Check that a path is that of a file, or of a pipe that is open already (/dev/fd/63).

    Opening a named pipe without a writer would wait for ever, and a device may have no end.

    Raises:
        OSError: it is a folder, a named pipe, a socket or a device, does not exist, or is a link
            that leads to itself.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode) or str(path).startswith(_OPEN_FILES):
        return
    if os.path.samefile(path, os.devnull):
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, f"{kind_of_file(mode)}, not a file", str(path))


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        OSError: as `check_file`, or the file cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    check_file(path)
    return Path(path).read_text(encoding="utf-8")


def replace_text(path: Path, text: str) -> None:
    """Write a file of text, complete or not at all: beside the old one, synced to disk, renamed.

    A symbolic link stays, and the file that it leads to is replaced. A terminal, a pipe that is
    open already (/dev/stdout, /dev/fd/3) and /dev/null are written to. Lone surrogates, which UTF-8
    cannot hold, are written as escapes.

    Raises:
        StorageError: the disk is full, the folder cannot be written to, or the path is that of a
            folder, a named pipe or a device; see `storage_errors`.
    """
    data = text.encode("utf-8", errors="backslashreplace")
    with storage_errors(path):
        target = _target(path)
        if target is None:
            with path.open("wb") as stream:
                stream.write(data)
            return
    with storage_errors(path):
        make_folder(target.parent)
        remove_abandoned(target.parent, glob.escape(target.name))
        with owned_file(target) as (file, temporary):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
        fsync_folder(target.parent)


@contextmanager
def owned_file(target: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file beside `target`, to be renamed or linked to it, locked until the block ends.

    The end of the process releases the lock, so that others can tell what a killed process left
    (`remove_abandoned`) from what is being written. If the file still exists at the end of the
    block, it is removed.

    Yields:
        The file, open for writing, and its path.

    Raises:
        OSError: the file cannot be created.
    """
    file, temporary = _locked_file(target)
    try:
        with file:
            yield file, temporary
    finally:
        with suppress(OSError):  # the error of the write says more
            temporary.unlink(missing_ok=True)


def _locked_file(target: Path) -> tuple[BinaryIO, Path]:
    while True:
        temporary = temporary_name(target.parent, target.name)
        file = temporary.open("xb")
        with suppress(OSError):  # a file system without locks: nothing is removed there either
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        if temporary.exists():
            return file, temporary
        file.close()  # removed by another process before it was locked


def remove_abandoned(folder: Path, target: str) -> None:
    """Remove the temporary files of killed processes (see `owned_file`).

    Args:
        folder: of the files that were to be written.
        target: pattern (`glob`) of their names.
    """
    for path in folder.glob(f".{target}.{'[0-9a-f]' * 32}.tmp"):
        remove_if_abandoned(path)


def is_held(path: Path) -> bool:
    """Whether a process is writing a temporary file (see `owned_file`)."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(handle)
    return False


def remove_if_abandoned(path: Path) -> bool:
    """Remove a temporary file if no process holds its lock; whether it was removed."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:  # locked, renamed in the meantime, or a file system without locks
        return False
    finally:
        os.close(handle)
    return True


def _target(path: Path) -> Path | None:
    """The file to replace, links followed; None if the path is of a stream that is written to.

    Raises:
        OSError: the link leads to itself.
        StorageError: the path is that of something else.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    if stat.S_ISREG(mode) and not str(path).startswith(_STREAMS):
        return Path(os.path.realpath(path))
    if str(path).startswith(_STREAMS) or os.path.samefile(path, os.devnull):
        return None
    raise StorageError(
        "what is written is a file, new or to be replaced",
        received=kind_of_file(mode),
        remedy="choose another path, or remove what is there",
        file=path,
    )


def kind_of_file(mode: int) -> str:
    """What is at a path, by its mode, where it is no regular file: "a folder", "a named pipe"."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


_WRITERS = "one import, merge, compaction or pull at a time writes to a folder"


def lock_folder(
    root: Path, *, wait: bool = False, what: str = _WRITERS, shared: bool = False
) -> int | None:
    """Lock a folder, so that no other process that locks it writes to it.

    Args:
        root: the folder.
        wait: wait for the lock instead of raising.
        what: the rule that a second process breaks.
        shared: any number of processes that share the lock may hold it at a time.

    Returns:
        A file descriptor; closing it, or the end of the process, releases the lock. None on a file
        system without locks; there, commit records alone keep two runs apart.

    Raises:
        DataError: another process holds the lock.
    """
    handle = os.open(root, os.O_RDONLY)
    try:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
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
