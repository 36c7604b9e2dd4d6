"""What a dataset is read through: the same calls for a folder of this machine and for a URL."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gvpo_offline.store.commit import verify_file
from gvpo_offline.store.location import RemoteSettings, is_url, local_path
from gvpo_offline.store.manifest import FileEntry, Manifest, load_manifest
from gvpo_offline.store.parquet import Shard, open_parquet


class Storage(Protocol):
    """A place that holds one dataset."""

    @property
    def root(self) -> Path | str:
        """The dataset's folder, or its URL."""

    @property
    def fetches_ahead(self) -> bool:
        """Whether it pays to read what is needed soon, because reading it again costs nothing."""

    def name(self, path: str) -> Path | str:
        """What messages call a file, given its path within the dataset."""

    def manifest(self, version: int | None = None) -> Manifest:
        """One version of the dataset, by default the newest; errors as `load_manifest`."""

    def open(self, entry: FileEntry) -> Shard:
        """A Parquet file; errors as `open_parquet`."""

    def verify(
        self, entries: Iterable[FileEntry], *, content: bool = True, whole: bool = False
    ) -> None:
        """Check files: their size, with `content` what they hold, with `whole` every byte of it
        even where that has to be downloaded. Errors as `verify_file`.
        """


@dataclass(frozen=True)
class LocalStorage:
    """A folder of this machine."""

    root: Path

    @property
    def fetches_ahead(self) -> bool:
        """No: the system's page cache does it."""
        return False

    def name(self, path: str) -> Path:
        """The path of a file."""
        return self.root / path

    def manifest(self, version: int | None = None) -> Manifest:
        """As `load_manifest`."""
        return load_manifest(self.root, version)

    def open(self, entry: FileEntry) -> Shard:
        """As `open_parquet`."""
        return open_parquet(self.root / entry.path, entry.footer_sha256)  # type: ignore[no-any-return]

    def verify(
        self, entries: Iterable[FileEntry], *, content: bool = True, whole: bool = False
    ) -> None:
        """As `verify_file`: `content` is every byte here."""
        for entry in entries:
            verify_file(self.root, entry, content=content or whole)


def open_storage(path: str | Path, remote: RemoteSettings | None = None) -> Storage:
    """The place that a path or URL names.

    Raises:
        ConfigError: no installed file system reads the URL, or the cache folder cannot serve it.
    """
    if is_url(path):
        from gvpo_offline.store.remote.storage import RemoteStorage

        return RemoteStorage(str(path), remote or RemoteSettings())
    return LocalStorage(local_path(path))
