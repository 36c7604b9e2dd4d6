"""A bounded local cache of byte ranges, shared by any number of processes.

    <cache_dir>/<16 digits of the SHA-256 of the URL>/<SHA-256 of a file>/<range>

An entry begins with the SHA-256 of its name and content, which every read compares: a damaged entry
is deleted and reported as missing. Entries are written to a temporary file and renamed, and another
process may delete them at any time. Only files at such paths are counted or deleted.

Training reads all its data once per epoch, each time in another order. With least-recently-used
eviction, a cache of half the data would serve 15% of an epoch's reads instead of 50%. A full cache
therefore evicts only entries that nobody has used since this process opened it, least recently used
first; if there are none, new ranges are not cached.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from gvpo_offline.errors import ConfigError, IntegrityError
from gvpo_offline.files import temporary_name
from gvpo_offline.hashing import sha256_text
from gvpo_offline.store.within import check_regular

logger = logging.getLogger(__name__)

_URL_DIGITS = 16
_DIGEST_BYTES = 32
_ENTRIES = "/".join(("[0-9a-f]" * _URL_DIGITS, "[0-9a-f]" * 2 * _DIGEST_BYTES, "*"))


class RangeCache:
    """The cache of one dataset, in a folder that all datasets share.

    Args:
        folder: the cache folder; created if missing.
        url: of the dataset.
        limit: bytes that the whole folder may hold. Each process checks it after writing 1/256 of
            it, so several processes may exceed it by as much.

    Raises:
        ConfigError: the folder cannot be written.
    """

    def __init__(self, folder: Path, url: str, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._own = folder / sha256_text(url)[:_URL_DIGITS]
        self._budget = 0  # bytes to store, or to turn away, before the folder is scanned again
        self._has_room = True
        self._writes = True
        try:
            self._own.mkdir(parents=True, exist_ok=True)
            os.utime(self._own)
            # By the clock that stamps the entries: the system's may be ahead of it.
            self._opened_ns = self._own.stat().st_mtime_ns
        except OSError as error:
            raise ConfigError(
                "the cache folder can be written",
                received=f"{type(error).__name__}: {error.strerror}",
                remedy="set remote.cache_dir (or GVPO_OFFLINE_CACHE) to another folder, or "
                "remote.cache_gb to 0",
                file=folder,
            ) from error

    def get(self, sha256: str, name: str) -> tuple[bytes | None, bool]:
        """An entry's content, or None; and whether a damaged entry was deleted.

        Args:
            sha256: of the file.
            name: of the range within the file.
        """
        path = self._own / sha256 / name
        try:
            check_regular(path)
            data = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None, False
        except (OSError, IntegrityError) as error:
            data = str(error).encode()
        content = data[_DIGEST_BYTES:]
        if data[:_DIGEST_BYTES] == _digest(sha256, name, content):
            return content, False
        logger.warning("%s: the cache entry is damaged; deleting it and fetching it again", path)
        self.drop(sha256, name)
        return None, True

    def put(self, sha256: str, name: str, content: bytes) -> None:
        """Store an entry, if there is room or room can be made."""
        size = len(content) + _DIGEST_BYTES
        if size > self._budget and self._writes:
            self._scan(size)
        self._budget -= size
        if not self._has_room or not self._writes:
            return
        folder = self._own / sha256
        temporary = temporary_name(folder, name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(_digest(sha256, name, content))
                file.write(content)
            os.replace(temporary, folder / name)
        except FileNotFoundError:
            pass  # another process evicted the temporary file, or deleted the folder
        except OSError as error:
            self._writes = False
            temporary.unlink(missing_ok=True)
            logger.warning("%s: nothing more is cached (%s)", self.folder, error)

    def drop(self, sha256: str, name: str) -> None:
        """Delete an entry."""
        try:
            (self._own / sha256 / name).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s: %s", self._own / sha256 / name, error)

    def _scan(self, size: int) -> None:
        """Count the entries of all processes, and evict some if there is no room for `size`."""
        entries = list(_entries(self.folder))
        free = self.limit - sum(n_bytes for _, n_bytes, _ in entries)
        stale = sorted(entry for entry in entries if entry[0] < self._opened_ns)
        for _, n_bytes, path in stale if free < size else ():
            if free >= max(size, self.limit // 16):
                break
            path.unlink(missing_ok=True)
            free += n_bytes
        self._has_room = free >= size
        # Other processes write at the same time, so this one takes a part of the room only.
        share = min(max(free // 32, self.limit // 256, size), free)
        self._budget = share if self._has_room else self.limit // 64


def _digest(sha256: str, name: str, content: bytes) -> bytes:
    digest = hashlib.sha256(f"{sha256}/{name}\n".encode())
    digest.update(content)
    return digest.digest()


def _entries(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """Time of last use (ns), size in bytes and path of every entry, unfinished ones included."""
    for path in folder.glob(_ENTRIES):
        try:
            stat = path.stat()
        except OSError:
            continue  # deleted by another process
        yield stat.st_mtime_ns, stat.st_size, path
