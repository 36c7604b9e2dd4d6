"""What a dataset at a URL is read through: manifests, and Parquet files by the row group.

Only the bytes of the wanted columns of the wanted row group are fetched. What they hold is verified
at every read, wherever it came from: each page by its checksum, the footer by its hash in the
manifest.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gvpo_offline.errors import IntegrityError, StorageError
from gvpo_offline.store.location import RemoteSettings
from gvpo_offline.store.manifest import (
    FileEntry,
    Manifest,
    choose_version,
    manifest_name,
    parse_manifest,
    version_of,
)
from gvpo_offline.store.remote.cache import RangeCache
from gvpo_offline.store.remote.folder import CONNECTIONS, RefusedError, RemoteFolder, Traffic
from gvpo_offline.store.remote.ranges import Range, coalesce, cut
from gvpo_offline.store.remote.shard import RemoteShard

_PIECE_BYTES = 8 * 2**20
_GAP_BYTES = 64 * 2**10
_TAIL_BYTES = 64 * 2**10
_FOOTER = "footer"
_RESTORE = "restore the file from a copy"


class RemoteStorage:
    """The files of a dataset at a URL. Threads may share it, and processes copy it.

    Args:
        url: of the dataset's folder.
        settings: cache, patience, options of the file system.

    Raises:
        ConfigError: nothing reads this URL, or the cache folder cannot serve it.
    """

    def __init__(self, url: str, settings: RemoteSettings) -> None:
        self.folder = RemoteFolder(url, settings)
        limit = int(settings.cache_gb * 10**9)
        where = settings.cache_dir or os.environ.get("GVPO_OFFLINE_CACHE") or _default_cache()
        self._cache = RangeCache(Path(where).expanduser(), self.root, limit) if limit else None

    @property
    def root(self) -> str:
        """The dataset's URL."""
        return self.folder.url

    @property
    def fetches_ahead(self) -> bool:
        """Yes, where there is a cache to keep it."""
        return self._cache is not None

    @property
    def traffic(self) -> Traffic:
        """What this process has fetched, and what it found in the cache."""
        return self.folder.traffic

    def name(self, path: str) -> str:
        """The URL of a file of the dataset."""
        return self.folder.url_of(path)

    def manifest(self, version: int | None = None) -> Manifest:
        """One version of the dataset, by default the newest.

        Where files cannot be listed (http) and the server shows no index of the folder either,
        versions are asked for one by one, which finds the newest as long as none is missing.

        Raises:
            DataError: there is none.
            IntegrityError: it was altered, or is of a newer schema.
            StorageError: it cannot be read.
        """
        versions = self._versions(version)
        path = manifest_name(choose_version(versions, version, self.root))
        try:
            return parse_manifest(self.folder.read_whole(path), self.name(path))
        except IntegrityError:  # what came may be at fault, and not what is there
            return parse_manifest(self.folder.read_whole(path), self.name(path))

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
            return bool(self.folder.read(manifest_name(version), 0, 1))
        except FileNotFoundError:
            return False
        except RefusedError:
            # So do object stores answer to strangers about a file that is not there.
            if version == 1:
                raise
            return False

    def _probe(self) -> int:
        """The newest version, found by doubling and halving; 0 if there is no first one."""
        low, high = 0, 1
        while self._exists(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._exists(middle) else (low, middle)
        return low

    def open(self, entry: FileEntry) -> RemoteShard:
        """A Parquet file of the dataset, its footer verified.

        Raises:
            IntegrityError: it is missing, or its footer is not that of the manifest.
            StorageError: it cannot be read.
        """
        with self.folder.lock(entry.path):
            footer = self._cached(entry, _FOOTER) or self._footer(entry)
        try:
            with pq.ParquetFile(pa.BufferReader(footer)) as file:
                return RemoteShard(self, entry, file.metadata, file.schema_arrow)
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            self._drop(entry, [_FOOTER])
            raise IntegrityError(
                "a shard is a readable Parquet file",
                received=str(error),
                remedy=_RESTORE,
                file=self.name(entry.path),
            ) from error

    def verify(
        self, entries: Iterable[FileEntry], *, content: bool = True, whole: bool = False
    ) -> None:
        """Check files, several at once.

        Args:
            entries: which.
            content: compare the footer's hash beside the size. The rest need not be read ahead:
                its pages are verified whenever they are.
            whole: read every byte and compare the file's SHA-256.

        Raises:
            IntegrityError: naming a file that is missing, shortened or altered.
            StorageError: one cannot be read.
        """

        def check(entry: FileEntry) -> None:
            self._check_size(entry)
            if whole:
                self._check_sha256(entry)
            elif content and entry.footer_sha256 is not None:
                self._footer(entry)

        remaining = iter(entries)
        while batch := list(itertools.islice(remaining, CONNECTIONS)):
            self.folder.map(check, batch)

    def fetch(self, entry: FileEntry, ranges: Sequence[Range]) -> list[tuple[Range, bytes]]:
        """Ranges of a file, from the cache or the network, in the order of the file.

        Raises:
            IntegrityError: the file is missing, or of another length.
            StorageError: it cannot be read.
        """
        found: dict[Range, bytes] = {}
        missing = []
        for piece in cut(ranges, _PIECE_BYTES):
            content = self._cached(entry, _entry_name(piece))
            if content is None:
                missing.append(piece)
            else:
                found[piece] = content
        requests = coalesce(missing, gap=_GAP_BYTES, limit=_PIECE_BYTES)
        bodies = self._read(entry, [span for span, _ in requests])
        for ((start, _), pieces), body in zip(requests, bodies, strict=True):
            for piece in pieces:
                found[piece] = body[piece[0] - start : piece[1] - start]
                if self._cache is not None:
                    self._cache.put(entry.sha256, _entry_name(piece), found[piece])
        return sorted(found.items())

    def forget(self, entry: FileEntry, ranges: Sequence[Range]) -> None:
        """Drop ranges from the cache, so that they are fetched again."""
        self._drop(entry, [_entry_name(piece) for piece in cut(ranges, _PIECE_BYTES)])

    def _cached(self, entry: FileEntry, name: str) -> bytes | None:
        if self._cache is None:
            return None
        content, damaged = self._cache.get(entry.sha256, name)
        self.traffic.add(cached_bytes=len(content or b""), damaged_entries=damaged)
        return content

    def _drop(self, entry: FileEntry, names: Iterable[str]) -> None:
        for name in names if self._cache else ():
            self._cache.drop(entry.sha256, name)  # type: ignore[union-attr]

    def _read(self, entry: FileEntry, spans: list[Range]) -> list[bytes]:
        """Ranges over the network; a file that is missing or of another length is said to be."""
        if not spans:
            return []
        try:
            return self.folder.read_ranges(entry.path, spans)
        except FileNotFoundError as error:
            raise self._missing(entry) from error
        except StorageError:
            self._compare_size(entry, self.folder.size_at_once(entry.path))
            raise

    def _footer(self, entry: FileEntry) -> bytes:
        """A file's footer over the network, the magic number after it included; it is cached."""
        for last in (False, True):
            at = max(entry.bytes - _TAIL_BYTES, 0)
            tail = self._read(entry, [(at, entry.bytes)])[0]
            length = min(int.from_bytes(tail[-8:-4], "little") + 8, entry.bytes)
            if length > len(tail):
                tail = self._read(entry, [(entry.bytes - length, at)])[0] + tail
            footer = tail[-length:]
            found = hashlib.sha256(footer).hexdigest()
            if entry.footer_sha256 in (None, found):
                break
            if last:
                raise IntegrityError(
                    f"the SHA-256 of the file's footer is {str(entry.footer_sha256)[:16]}…",
                    received=f"{found[:16]}…",
                    remedy=_RESTORE,
                    file=self.name(entry.path),
                )
        if self._cache is not None:
            self._cache.put(entry.sha256, _FOOTER, footer)
        return footer

    def _check_size(self, entry: FileEntry) -> None:
        try:
            size = self.folder.size(entry.path)
        except FileNotFoundError as error:
            raise self._missing(entry) from error
        self._compare_size(entry, size)

    def _compare_size(self, entry: FileEntry, size: int | None) -> None:
        if size not in (None, entry.bytes):
            raise IntegrityError(
                f"the file is {entry.bytes} bytes long",
                received=f"{size} bytes",
                remedy=_RESTORE,
                file=self.name(entry.path),
            )

    def _check_sha256(self, entry: FileEntry) -> None:
        found = ""
        for _ in range(2):
            digest = hashlib.sha256()
            for piece in cut([(0, entry.bytes)], _PIECE_BYTES):
                digest.update(self._read(entry, [piece])[0])
            found = digest.hexdigest()
            if found == entry.sha256:
                return
        raise IntegrityError(
            f"the file's SHA-256 is {entry.sha256[:16]}…",
            received=f"{found[:16]}…",
            remedy=_RESTORE,
            file=self.name(entry.path),
        )

    def _missing(self, entry: FileEntry) -> IntegrityError:
        return IntegrityError(
            "every file that the manifest names exists",
            received="no such file",
            remedy=_RESTORE,
            file=self.name(entry.path),
        )


def _entry_name(piece: Range) -> str:
    return f"{piece[0]}-{piece[1]}"


def _default_cache() -> str:
    return "~/.cache/gvpo_offline"
