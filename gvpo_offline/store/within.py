"""The paths that sealed files name: they lie in the dataset's folder, and lead to regular files.

A manifest or a commit record may come from anyone. What it names is therefore checked twice: its
spelling when the file is parsed (`check_entries`), and where it leads when it is used.

What is written or removed lies in the folder itself, after all links are followed (`path_within`).
What is read may be a link to a file elsewhere (`readable_within`): the cache of the Hugging Face
Hub, DVC and git-annex keep the files of a folder as links. Size and hashes of what is read are
those of the manifest, wherever the bytes are. The dataset's folder itself may be a link.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from gvpo_offline.errors import IntegrityError
from gvpo_offline.files import kind_of_file
from gvpo_offline.store.row_group_sizes import sizes_problem

_RULE = "the files of a dataset lie in its folder, and are named by relative paths"
_REMEDY = "do not use this dataset, or restore the file that names it from a copy"
_RESTORE = "restore the file from a copy"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONGEST_NAME = 255  # bytes, on every common file system
_MANIFEST = re.compile(r"manifest-\d{6,}\.json")
_COMMITS = "commits"


def name_problem(name: str) -> str | None:
    """Why `name` cannot be the relative path of a file within a folder; None if it can.

    One file has one spelling: no `.`, no empty part. Otherwise a file could be removed under one
    name while another version needs it under the other.
    """
    if not name:
        return "an empty path"
    if name.startswith("/"):
        return f"the absolute path {name}"
    if "\0" in name:
        return f"a null character in {name!r}"
    parts = name.split("/")
    if ".." in parts:
        return f"{name}, which leaves the folder"
    if "." in parts or "" in parts:
        return f"{name}, which is not the plain spelling of a path"
    try:
        longest = max(len(os.fsencode(part)) for part in parts)
    except UnicodeEncodeError:
        return f"{name!r}, which has no UTF-8"
    return f"a name of {longest} bytes" if longest > _LONGEST_NAME else None


class NamedFile(Protocol):
    """What a sealed file says of another file (`manifest.FileEntry`)."""

    @property
    def path(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    @property
    def bytes(self) -> int: ...

    @property
    def row_groups(self) -> Sequence[int]: ...


def check_entries(entries: Iterable[NamedFile], file: Path | str) -> None:
    """Check what a sealed file says of other files, before any of them is looked for.

    Args:
        entries: what it says.
        file: the sealed file.

    Raises:
        IntegrityError: a path is absolute, leaves the folder (also as part of a URL, where `%2e` is
            a dot), is not spelled plainly, or is that of a manifest or commit record; a SHA-256 is
            not 64 hexadecimal digits; or a file has more rows than its bytes can hold.
    """
    for entry in entries:
        name = entry.path
        problem = name_problem(name)
        if problem is None and "%" in name and ".." in unquote(name).split("/"):
            problem = f"{name}, which leaves the folder of a URL"
        if problem is None and _is_bookkeeping(name):
            problem = f"{name}, which is a manifest or commit record and no data"
        if problem is not None:
            raise IntegrityError(_RULE, received=problem, remedy=_REMEDY, file=file)
        if not _SHA256.fullmatch(entry.sha256):
            raise IntegrityError(
                "the SHA-256 of a file is 64 hexadecimal digits in lower case",
                received=f"{entry.sha256!r} of {name}",
                remedy=_REMEDY,
                file=file,
            )
        problem = sizes_problem(entry.row_groups, entry.bytes)
        if problem is not None:
            raise IntegrityError(
                "a file has no more rows and row groups than its bytes can hold",
                received=f"{problem}: {name}",
                remedy=_REMEDY,
                file=file,
            )


def _is_bookkeeping(name: str) -> bool:
    first, *others = name.split("/")
    return first == _COMMITS or (not others and bool(_MANIFEST.fullmatch(first)))


def path_within(root: Path, name: str) -> Path:
    """The path of a file that is written to or removed from a folder.

    Args:
        root: the folder; it may be a link, and need not exist.
        name: path of the file relative to it.

    Raises:
        IntegrityError: the path is absolute, leaves the folder by `..` or by a link, or is not
            spelled plainly.
    """
    path = readable_within(root, name)
    own, found = os.path.realpath(root), os.path.realpath(path)
    if os.path.commonpath([own, found]) != own or found == own:
        raise IntegrityError(
            "what is written to a dataset, or removed from it, lies in its folder",
            received=f"{name}, a link that leads to {found}",
            remedy="put the files themselves into the folder, or a link to the dataset's whole "
            "folder in its place",
            file=root,
        )
    return path


def readable_within(root: Path, name: str) -> Path:
    """The path of a file that is read; it may be a link to a file elsewhere.

    Raises:
        IntegrityError: the path is absolute, leaves the folder by `..`, or is not spelled plainly.
    """
    problem = name_problem(name)
    if problem is not None:
        raise IntegrityError(_RULE, received=problem, remedy=_REMEDY, file=root)
    return root / name


def own_files(root: Path, pattern: str) -> Iterator[Path]:
    """The files of a dataset's folder whose name matches, without those of datasets inside it.

    Links to folders are not followed.

    Args:
        root: the folder.
        pattern: of the file's name, as for `fnmatch`.
    """
    for folder, folders, names in os.walk(root):
        if Path(folder) != root and any(_MANIFEST.fullmatch(name) for name in names):
            folders.clear()  # another dataset, whose writers lock another folder
            continue
        yield from (Path(folder) / name for name in fnmatch.filter(names, pattern))


def check_regular(path: Path) -> os.stat_result:
    """The status of a file that is about to be opened, links followed.

    Opening a named pipe would wait for ever, and reading a device might never end.

    Raises:
        IntegrityError: it is a folder, a named pipe, a socket, a device or a loop of links.
        FileNotFoundError: it does not exist, or is a link to nothing.
    """
    try:
        found = os.stat(path)
    except NotADirectoryError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise _not_regular("a loop of links", path) from error
    if not stat.S_ISREG(found.st_mode):
        raise _not_regular(kind_of_file(found.st_mode), path)
    return found


def read_regular(path: Path) -> bytes:
    """The content of a manifest or commit record.

    Raises:
        IntegrityError: it is not a regular file, or a link to nothing.
    """
    try:
        check_regular(path)
        return path.read_bytes()
    except FileNotFoundError as error:
        raise _not_regular("no such file, or a link to nothing", path) from error


def _not_regular(received: str, path: Path) -> IntegrityError:
    return IntegrityError(
        "a file of a dataset is a regular file, or a link to one",
        received=received,
        remedy=_RESTORE,
        file=path,
    )
