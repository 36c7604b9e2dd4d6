"""A bounded local cache of byte ranges, shared by any number of processes.

    <cache_dir>/<hash of the URL>/dataset.json             whose cache this is
    <cache_dir>/<hash of the URL>/<SHA-256 of a file>/<range>

An entry begins with the SHA-256 of its name and content, which every read compares: what a disk or
a killed process damaged is dropped, never served. Entries appear whole, by renaming, and may vanish
at any time; a process that has one open is not disturbed.

A run passes over its data again and again in other orders. Whoever makes room in such a pattern by
throwing out what was used longest ago throws out what comes next, so that a cache of half the data
serves a sixth of the reads instead of half of them. Here a full cache gives up only what nobody has
used since this run began, longest unused first; where there is no such thing, it keeps what it has.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gvpo_offline.errors import ConfigError
from gvpo_offline.hashing import sha256_text

logger = logging.getLogger(__name__)

MARK = "dataset.json"
_FORMAT = 1
_SAYS = "A cache of a dataset that gvpo-offline reads over the network. It may be deleted."
_FOLDER = re.compile(r"[0-9a-f]{16}")
_FILE = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = ".tmp"
_ABANDONED_SECONDS = 3600.0
_DIGEST_BYTES = 32


class _Entry(NamedTuple):
    used_ns: int
    size: int
    path: str


class RangeCache:
    """The cache of one dataset, within a folder whose bound all datasets share.

    Args:
        folder: the cache folder; made if missing.
        url: of the dataset.
        limit: bytes that the whole folder may hold. Several processes keep to it together, but for
            the 256th part of it that each may write between two looks at the folder.

    Raises:
        ConfigError: the folder cannot be written, is no cache, or is another dataset's.
    """

    def __init__(self, folder: Path, url: str, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._own = folder / sha256_text(url)[:16]
        self._began_ns = time.time_ns()
        self._left = 0  # bytes to write before the next look
        self._skip = 0  # bytes to turn away before the next look
        self._writes = True
        try:
            _claim(folder, self._own, url)
        except OSError as error:
            raise ConfigError(
                "the cache folder can be written",
                received=f"{type(error).__name__}: {error.strerror}",
                remedy="set remote.cache_dir (or GVPO_OFFLINE_CACHE) to another folder, or "
                "remote.cache_gb to 0",
                file=folder,
            ) from error

    def get(self, sha256: str, name: str) -> tuple[bytes | None, bool]:
        """An entry's content, or None; and whether there was one that is damaged.

        Args:
            sha256: of the file.
            name: which part of it.
        """
        path = self._own / sha256 / name
        try:
            with path.open("rb") as file:
                data = file.read()
            os.utime(path)
        except FileNotFoundError:
            return None, False
        except OSError as error:
            data = str(error).encode()
        content = memoryview(data)[_DIGEST_BYTES:]
        if data[:_DIGEST_BYTES] == _digest(sha256, name, content):
            return bytes(content), False
        logger.warning("%s: a damaged entry of the cache is dropped and fetched again", path)
        self.drop(sha256, name)
        return None, True

    def put(self, sha256: str, name: str, content: bytes) -> None:
        """Keep an entry, if there is room or room can be made."""
        if not self._writes or not self._room(len(content) + _DIGEST_BYTES):
            return
        folder = self._own / sha256
        temporary = folder / f"{name}.{uuid.uuid4().hex}{_TEMPORARY}"
        try:
            folder.mkdir(exist_ok=True)
            with temporary.open("wb") as file:
                file.write(_digest(sha256, name, content))
                file.write(content)
            os.replace(temporary, folder / name)
        except OSError as error:
            self._writes = False
            temporary.unlink(missing_ok=True)
            logger.warning("%s: the cache takes no more (%s); going on", self.folder, error)

    def drop(self, sha256: str, name: str) -> None:
        """Forget an entry."""
        try:
            (self._own / sha256 / name).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s: %s", self._own / sha256 / name, error)

    def _room(self, size: int) -> bool:
        if size > self._left and self._skip > 0:
            self._skip -= size
            return False
        if size > self._left:
            self._look(size)
        if size > self._left:
            self._skip = self.limit // 64
            return False
        self._left -= size
        return True

    def _look(self, size: int) -> None:
        """See what all processes have written, and throw out what nobody has used for long."""
        entries = list(_entries(self.folder))
        free = self.limit - sum(entry.size for entry in entries)
        stale = sorted(entry for entry in entries if entry.used_ns < self._began_ns)
        for entry in stale if free < size else ():
            if free >= max(size, self.limit // 16):
                break
            Path(entry.path).unlink(missing_ok=True)
            free += entry.size
        # Others write meanwhile, so only a part of the room is this process's.
        share = max(free // 32, self.limit // 256, size)
        self._left = min(share, max(free, 0))


def _digest(sha256: str, name: str, content: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(f"{sha256}/{name}\n".encode())
    digest.update(content)
    return digest.digest()


def _entries(folder: Path) -> Iterator[_Entry]:
    """All files of the cache; temporary ones that nobody finishes are removed on the way."""
    too_old = time.time() - _ABANDONED_SECONDS
    for path, _, names in os.walk(folder):
        for name in names:
            full = os.path.join(path, name)
            try:
                stat = os.stat(full)
            except OSError:
                continue  # another process was faster
            if name.endswith(_TEMPORARY) and stat.st_mtime < too_old:
                Path(full).unlink(missing_ok=True)
            elif name != MARK:
                yield _Entry(stat.st_mtime_ns, stat.st_size, full)


def _claim(folder: Path, own: Path, url: str) -> None:
    """Make the folder of a dataset's cache, or see that it is that."""
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_strangers(folder, _FOLDER)
    if not own.exists():
        # Renamed into place with its mark: no other process sees it without.
        temporary = folder / f"{own.name}.{uuid.uuid4().hex}{_TEMPORARY}"
        temporary.mkdir()
        mark = {"what": _SAYS, "format": _FORMAT, "url": url}
        (temporary / MARK).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")
        try:
            temporary.rename(own)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            if not own.is_dir():
                raise
    mark = _mark_of(own)
    if mark.get("url") != url or mark.get("format") != _FORMAT:
        theirs = mark.get("url") != url
        raise ConfigError(
            "a cache folder belongs to one dataset"
            if theirs
            else f"a cache folder is of format {_FORMAT}",
            received=f"the cache of {mark.get('url')} where that of {url} was expected"
            if theirs
            else f"format {mark.get('format')}",
            remedy="delete the folder, or set remote.cache_dir to another one",
            file=own,
        )
    _refuse_strangers(own, _FILE)


def _mark_of(own: Path) -> dict[str, Any]:
    try:
        mark = json.loads((own / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        mark = None
    return mark if isinstance(mark, dict) else {"url": "nobody: it has no mark"}


def _refuse_strangers(folder: Path, ours: re.Pattern[str]) -> None:
    """Raise ConfigError if a folder of the cache holds what no cache of ours would."""
    names = [entry.name for entry in folder.iterdir()]
    if MARK in names and ours is _FOLDER:
        raise ConfigError(
            "remote.cache_dir is the folder of all caches, not that of one dataset",
            received=f"the cache of {_mark_of(folder).get('url')}",
            remedy=f"set it to {folder.parent}",
            file=folder,
        )
    strangers = sorted(
        name
        for name in names
        if not (ours.fullmatch(name) or name.endswith(_TEMPORARY) or name == MARK)
    )
    if strangers:
        raise ConfigError(
            "a cache folder is empty, or holds a cache and nothing else",
            received=", ".join(strangers[:5]),
            remedy="set remote.cache_dir (or GVPO_OFFLINE_CACHE) to a folder of its own",
            file=folder,
        )
