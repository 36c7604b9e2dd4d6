"""The storage of a dataset: one interface for local folders and URLs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gvpo_offline.store.commit import verify_at
from gvpo_offline.store.location import RemoteSettings, is_url, local_path
from gvpo_offline.store.manifest import FileEntry, Manifest, load_manifest
from gvpo_offline.store.parquet import Shard, open_parquet


class Storage(Protocol):
    """The files of one dataset."""

    @property
    def root(self) -> Path | str:
        """The dataset's folder, or its URL."""

    @property
    def fetches_ahead(self) -> bool:
        """Whether to read ahead: True where a cache keeps what was read."""

    def name(self, path: str) -> Path | str:
        """The full path or URL of a file, given its path within the dataset."""

    def manifest(self, version: int | None = None) -> Manifest:
        """One version of the dataset, by default the newest; errors as `load_manifest`."""

    def open(self, entry: FileEntry) -> Shard:
        """A Parquet file; errors as `open_parquet`."""

    def verify(
        self, entries: Iterable[FileEntry], *, content: bool = True, whole: bool = False
    ) -> None:
        """Check files; errors as `verify_file`.

        Args:
            entries: which.
            content: check the content as well as the size; at a URL only that of the footers.
            whole: check every byte, also where that downloads the files.
        """


@dataclass(frozen=True)
class LocalStorage:
    """A local folder."""

    root: Path

    @property
    def fetches_ahead(self) -> bool:
        """False: the operating system reads ahead by itself."""
        return False

    def name(self, path: str) -> Path:
        """The path of a file."""
        return self.root / path

    def manifest(self, version: int | None = None) -> Manifest:
        """As `load_manifest`."""
        return load_manifest(self.root, version)

    def open(self, entry: FileEntry) -> Shard:
        """As `open_parquet`."""
        path = self.name(entry.path)
        if entry.footer_sha256 is None and path.is_symlink():
            # Nothing else says that what lies elsewhere is the file that the manifest names.
            verify_at(path, entry)
        return open_parquet(path, entry.footer_sha256)  # type: ignore[no-any-return]

    def verify(
        self, entries: Iterable[FileEntry], *, content: bool = True, whole: bool = False
    ) -> None:
        """As `verify_file`; `content` reads every byte."""
        for entry in entries:
            verify_at(self.name(entry.path), entry, content=content or whole)


def open_storage(path: str | Path, remote: RemoteSettings | None = None) -> Storage:
    """The storage of the dataset at a path or URL.

    Raises:
        ConfigError: no installed file system reads the URL, or the cache folder cannot be written.
    """
    if is_url(path):
        from gvpo_offline.store.remote.storage import RemoteStorage

        return RemoteStorage(str(path), remote or RemoteSettings())
    return LocalStorage(local_path(path))
