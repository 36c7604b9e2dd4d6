"""Datasets at a URL: manifests, and Parquet files by row group.

Only the bytes of the requested columns of a row group are fetched. They are verified at every read,
whether they come from the network or the cache: each page by its checksum, each footer by its hash
in the manifest.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from gvpo_offline.errors import StorageError
from gvpo_offline.store.location import RemoteSettings
from gvpo_offline.store.manifest import (
    FileEntry,
    Manifest,
    check_footer,
    choose_version,
    damaged,
    manifest_name,
    missing,
    parse_manifest,
    read_twice,
    version_of,
)
from gvpo_offline.store.parquet import UNREADABLE
from gvpo_offline.store.remote.cache import RangeCache
from gvpo_offline.store.remote.folder import CONNECTIONS, RefusedError, RemoteFolder, Traffic
from gvpo_offline.store.remote.ranges import Range, coalesce, cut
from gvpo_offline.store.remote.shard import RemoteShard

_PIECE_BYTES = 8 * 2**20
_GAP_BYTES = 64 * 2**10
_TAIL_BYTES = 64 * 2**10
_FOOTER = "footer"
_DEFAULT_CACHE = "~/.cache/gvpo_offline"


class RemoteStorage:
    """The files of a dataset at a URL. Threads may share it, and processes may copy it.

    Args:
        url: of the dataset's folder.
        settings: cache, timeout, attempts, options of the file system.

    Raises:
        ConfigError: no file system reads this URL, or the cache folder cannot be written.
    """

    def __init__(self, url: str, settings: RemoteSettings) -> None:
        self.folder = RemoteFolder(url, settings)
        limit = int(settings.cache_gb * 10**9)
        where = settings.cache_dir or os.environ.get("GVPO_OFFLINE_CACHE") or _DEFAULT_CACHE
        self._cache = RangeCache(Path(where).expanduser(), self.root, limit) if limit else None

    @property
    def root(self) -> str:
        """The dataset's URL."""
        return self.folder.url

    @property
    def fetches_ahead(self) -> bool:
        """True if there is a cache to keep what is fetched."""
        return self._cache is not None

    @property
    def traffic(self) -> Traffic:
        """Counts of this process: requests, retries, bytes from the network and the cache."""
        return self.folder.traffic

    def name(self, path: str) -> str:
        """The URL of a file of the dataset."""
        return self.folder.url_of(path)

    def manifest(self, version: int | None = None) -> Manifest:
        """One version of the dataset, by default the newest.

        Where files cannot be listed (http without an index page), versions are probed one by one,
        which finds the newest if none before it is missing.

        Raises:
            DataError: there is none.
            IntegrityError: it was altered, or has a newer schema.
            StorageError: it cannot be read.
        """
        path = manifest_name(choose_version(self._versions(version), version, self.root))
        return read_twice(lambda: parse_manifest(self.folder.read(path), self.name(path)))

    def _versions(self, wanted: int | None) -> list[int]:
        if not self.folder.lists:
            found = self._probe() if wanted is None else self._exists(wanted) * wanted
            if found:
                return [found]
        try:
            versions = [version_of(name) for name in self.folder.names()]
        except RefusedError:
            if self.folder.lists:
                raise
            versions = []  # no index page
        return [version for version in versions if version is not None]

    def _exists(self, version: int) -> bool:
        try:
            return bool(self.folder.read(manifest_name(version), (0, 1)))
        except FileNotFoundError:
            return False
        except RefusedError:
            # Object stores answer 403 for a missing file if the reader may not list the bucket.
            if version == 1:
                raise
            return False

    def _probe(self) -> int:
        """The newest version, found by doubling and bisection; 0 if there is no version 1."""
        low, high = 0, 1
        while self._exists(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._exists(middle) else (low, middle)
        return low

    def open(self, entry: FileEntry) -> RemoteShard:
        """A Parquet file of the dataset; its footer is verified.

        Raises:
            IntegrityError: it is missing, or its footer is not that of the manifest.
            StorageError: it cannot be read.
        """
        with self.folder.lock(entry.path):
            footer = self._cached(entry, _FOOTER) or read_twice(lambda: self._footer(entry))
        fetch = functools.partial(self._fetch, entry)
        forget = functools.partial(self._forget, entry)
        try:
            return RemoteShard(footer, entry.bytes, fetch, forget)
        except UNREADABLE as error:
            self._drop(entry, _FOOTER)
            file = self.name(entry.path)
            raise damaged("a shard is a readable Parquet file", error, file) from error

    def verify(
        self, entries: Iterable[FileEntry], *, content: bool = True, whole: bool = False
    ) -> None:
        """Check files, several at once.

        Args:
            entries: which.
            content: compare the hash of the footer as well as the size. Pages are not read: they
                are verified whenever they are.
            whole: read every byte and compare the file's SHA-256.

        Raises:
            IntegrityError: a file is missing, shortened or altered.
            StorageError: a file cannot be read.
        """

        def check(entry: FileEntry) -> None:
            try:
                self._check_size(entry)
            except FileNotFoundError as error:
                raise missing(self.name(entry.path)) from error
            if whole:
                read_twice(lambda: self._check_sha256(entry))
            elif content and entry.footer_sha256 is not None:
                read_twice(lambda: self._footer(entry))

        remaining = iter(entries)
        while batch := list(itertools.islice(remaining, CONNECTIONS)):
            self.folder.map(check, batch)

    def _fetch(self, entry: FileEntry, ranges: Sequence[Range]) -> dict[Range, bytes]:
        """The bytes of ranges of a file, from the cache or the network.

        Raises:
            IntegrityError: the file is missing, or has another length.
            StorageError: it cannot be read.
        """
        found = {piece: self._cached(entry, _name(piece)) for piece in cut(ranges, _PIECE_BYTES)}
        absent = [piece for piece, content in found.items() if content is None]
        requests = coalesce(absent, gap=_GAP_BYTES, limit=_PIECE_BYTES)
        bodies = self._read(entry, [(pieces[0][0], pieces[-1][1]) for pieces in requests])
        for pieces, body in zip(requests, bodies, strict=True):
            first = pieces[0][0]
            for start, stop in pieces:
                content = body[start - first : stop - first]
                self._keep(entry, _name((start, stop)), content)
                found[start, stop] = content
        return {
            span: b"".join(found.pop(piece) or b"" for piece in cut([span], _PIECE_BYTES))
            for span in ranges
        }

    def _forget(self, entry: FileEntry, ranges: Sequence[Range]) -> None:
        """Remove ranges from the cache."""
        for piece in cut(ranges, _PIECE_BYTES):
            self._drop(entry, _name(piece))

    def _cached(self, entry: FileEntry, name: str) -> bytes | None:
        if self._cache is None:
            return None
        content, dropped = self._cache.get(entry.sha256, name)
        self.traffic.add(cached_bytes=len(content or b""), damaged_entries=dropped)
        return content

    def _keep(self, entry: FileEntry, name: str, content: bytes) -> None:
        if self._cache is not None:
            self._cache.put(entry.sha256, name, content)

    def _drop(self, entry: FileEntry, name: str) -> None:
        if self._cache is not None:
            self._cache.drop(entry.sha256, name)

    def _read(self, entry: FileEntry, spans: list[Range]) -> list[bytes]:
        """Ranges over the network; IntegrityError if the file is missing or has another length."""
        try:
            return self.folder.read_ranges(entry.path, spans)
        except FileNotFoundError as error:
            raise missing(self.name(entry.path)) from error
        except StorageError:
            with contextlib.suppress(StorageError, FileNotFoundError):
                self._check_size(entry, recheck=True)
            raise

    def _footer(self, entry: FileEntry) -> bytes:
        """A file's footer and final magic number, fetched, verified and cached."""
        at = max(entry.bytes - _TAIL_BYTES, 0)
        tail = self._read(entry, [(at, entry.bytes)])[0]
        length = min(int.from_bytes(tail[-8:-4], "little") + 8, entry.bytes)
        if length > len(tail):
            tail = self._read(entry, [(entry.bytes - length, at)])[0] + tail
        footer = tail[-length:]
        sha256 = hashlib.sha256(footer).hexdigest()
        check_footer(entry.footer_sha256, sha256, self.name(entry.path))
        self._keep(entry, _FOOTER, footer)
        return footer

    def _check_size(self, entry: FileEntry, *, recheck: bool = False) -> None:
        size = self.folder.size(entry.path, recheck=recheck)
        if size is not None:
            entry.check_size(size, self.name(entry.path))

    def _check_sha256(self, entry: FileEntry) -> None:
        digest = hashlib.sha256()
        for piece in cut([(0, entry.bytes)], _PIECE_BYTES):
            digest.update(self._read(entry, [piece])[0])
        entry.check_sha256(digest.hexdigest(), self.name(entry.path))


def _name(piece: Range) -> str:
    return f"{piece[0]}-{piece[1]}"
