"""Errors of the operating system as errors of this package: one line with rule, value and remedy.

What a user can cause and correct (rights, a full disk, too many open files, a folder in the place
of a file …) is told by the error's number. pyarrow and Python give the number of the system; an
OSError without one is a library's own, such as pyarrow's for a file that does not decode.
"""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

from gvpo_offline.errors import GVPOError, StorageError
from gvpo_offline.visible import visible

_AGAIN = "run the same command again: committed tasks are kept"
_ROOM = ("there must be room on the disk for what is written", f"free some space and {_AGAIN}")
_RIGHTS = (
    "this process has the right to read what it needs and to write what it makes",
    f"correct the rights or the owner of the file or its folder, or choose another; then {_AGAIN}",
)
_DEVICE = (
    "the disk or network file system reads and writes without errors of its own",
    f"look at the system's log for errors of this device, then {_AGAIN}",
)
_FILE = (
    "the path is that of a file",
    "name a file, or another path",
)
_GONE = (
    "the file and its folder exist while the command runs",
    "correct the path, or make the folder again, then run the same command again",
)
# Number: what must hold, and what to do.
_CAUSES: dict[int, tuple[str, str]] = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: (
        "what is written lies on a file system that can be written to",
        f"choose another folder, or mount the file system for writing; then {_AGAIN}",
    ),
    errno.EMFILE: (
        "this process may open as many files as it needs",
        f"raise the limit of open files (ulimit -n 65536), or start fewer workers; then {_AGAIN}",
    ),
    errno.ENFILE: (
        "this machine may open as many files as its processes need",
        "close other programs, or raise fs.file-max, and run the same command again",
    ),
    errno.ENOTDIR: (
        "every part of a path but the last is a folder",
        "correct the path: a part of it is a file",
    ),
    errno.EISDIR: _FILE,
    errno.ENXIO: _FILE,
    errno.EEXIST: (
        "the path of a new file or folder is free",
        "move away what is there, or choose another path",
    ),
    errno.ELOOP: (
        "a symbolic link leads to a file or folder",
        "correct the link, which leads to itself, or name another path",
    ),
    errno.ENAMETOOLONG: (
        "a name has at most 255 bytes, and a path as many as the file system allows",
        "choose a shorter name",
    ),
    errno.ENOENT: _GONE,
    errno.ESTALE: (
        "the network file system keeps a file for as long as it is used",
        f"see whether the folder was removed or mounted again, then {_AGAIN}",
    ),
    errno.EIO: _DEVICE,
    errno.ENODEV: _DEVICE,
    errno.EREMOTEIO: _DEVICE,
    errno.ETXTBSY: (
        "a file that is written is not a program that runs",
        "end the program, or choose another path",
    ),
    errno.EBUSY: (
        "no other program holds the file or folder",
        "end the program that holds it, or choose another folder",
    ),
    errno.ENOTEMPTY: (
        "no other program writes to a folder while it is removed",
        "see what else writes there, and run the same command again",
    ),
}

_OF_THE_PATH = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.EEXIST),
    *(errno.ELOOP, errno.ENAMETOOLONG),
}


def translated(error: OSError, path: Any = None) -> StorageError | None:
    """The StorageError for an error of the operating system; None for any other OSError.

    Args:
        error: what was raised.
        path: the file in question, unless the error names one itself.
    """
    if isinstance(error, GVPOError):
        return error if isinstance(error, StorageError) else None
    if error.errno not in _CAUSES:
        return None
    rule, remedy = _CAUSES[error.errno]
    received = f"{os.strerror(error.errno)} ({errno.errorcode[error.errno]})"
    if error.errno == errno.EMFILE:
        received += f", with a limit of {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"
    found = StorageError(rule, received=received, remedy=remedy, file=_named(error, path))
    found.errno = error.errno
    found.__cause__ = error
    return found


def raise_translated(error: BaseException, path: Any = None) -> None:
    """Raise the StorageError for an error of the operating system; return after any other error.

    For code that takes every OSError for damage of a file, or for the name of a model that does not
    exist: a file that cannot be opened for want of rights or open files is whole. Returns as well
    after errors of the path itself, such as no such file, which such code reports in its own words.

    Raises:
        StorageError: see `translated`.
    """
    if isinstance(error, GVPOError) or not isinstance(error, OSError):
        return
    found = None if error.errno in _OF_THE_PATH else translated(error, path)
    if found is None:
        return
    try:
        raise found from error
    finally:
        del found  # a cycle with its traceback would keep files open


def untranslated_lines(error: OSError) -> list[str]:
    """The message for an OSError that no code has translated, in one line."""
    found = translated(error)
    if found is not None:
        return found.lines()
    named = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    text = " ".join(str(error.strerror or error or type(error).__name__).split())
    return [visible(f"{named}{text} ({type(error).__name__}, an error of the system)")]


def _named(error: OSError, path: Any) -> Any:
    """The file that an error is about: the one that it names, else `path`."""
    name = error.filename
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    if not isinstance(name, str | Path) or not str(name):
        return path
    # A temporary file is called by the name that it would get.
    return path if path is not None and str(name).endswith(".tmp") else name
