"""Uploads of what a command finishes in a working copy: tasks at once, the version at its end."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import TracebackType

from gvpo_offline.buckets.lease import LEASE, Lease
from gvpo_offline.buckets.objects import ConditionFailed, Listed, Objects
from gvpo_offline.errors import DataError, GVPOError
from gvpo_offline.files import storage_errors
from gvpo_offline.store.commit import read_record
from gvpo_offline.store.leftovers import COMMITS, commit_records, is_temporary
from gvpo_offline.store.manifest import (
    FileEntry,
    Manifest,
    load_manifest,
    manifest_name,
    manifest_versions,
    version_of,
)

_EVERY_SECONDS = 1.0
_HIDDEN = (".spill", ".pull.tmp")
logger = logging.getLogger(__name__)


class Uploader:
    """Uploads of one working copy; see the docstring of the room for their order.

    Args:
        objects: of the dataset's URL.
        root: the working copy.
        lease: checked before each commit of a version.
        listed: the objects of the URL when the working copy was made.

    Attributes:
        n_files, n_bytes: number and total length of the data files that were uploaded.
    """

    def __init__(
        self, objects: Objects, root: Path, lease: Lease, listed: dict[str, Listed]
    ) -> None:
        self.n_files = 0
        self.n_bytes = 0
        self._objects, self._root, self._lease = objects, root, lease
        self._sizes = {path: own.bytes for path, own in listed.items()}
        self._copied = {path for path in listed if (root / path).is_file()}
        self._files_of = {v: _named(load_manifest(root, v)) for v in manifest_versions(root)}
        self._stamps = {path: _stamp(root / path) for path in self._copied}
        self._lock = threading.Lock()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gvpo-upload", daemon=True)

    def __enter__(self) -> Uploader:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ends.set()
        self._thread.join()
        if kind is not None and issubclass(kind, Exception):
            try:  # committed tasks of a command that failed, and its removals
                self._commit_tasks()
                self._upload_others()
                self._delete_removed()
            except (GVPOError, OSError) as failure:
                logger.warning("committed work is not uploaded yet: %s", failure)

    def finish(self) -> None:
        """Upload what is left, commit the new versions, and delete what the command deleted.

        Raises:
            DataError: another writer has taken over the lease, or committed the same version.
            IntegrityError: a file of the working copy was altered.
            StorageError: the bucket refuses, or cannot be reached.
        """
        self._ends.set()
        self._thread.join()
        self._commit_tasks()
        self._upload_others()
        for version in manifest_versions(self._root):
            name = manifest_name(version)
            if name not in self._sizes:
                self._commit_version(name, load_manifest(self._root, version))
        self._delete_removed()

    def _watch(self) -> None:
        warned = False
        while not self._ends.wait(_EVERY_SECONDS):
            try:
                self._commit_tasks()
            except Exception as error:  # tried again, and at the end once more, where it is raised
                (logger.info if warned else logger.warning)(
                    "a finished task is not uploaded yet: %s", error
                )
                warned = True

    def _commit_tasks(self) -> None:
        """Upload the files of every task that was committed since, and then its record."""
        with self._lock:
            for path in commit_records(self._root):
                name = path.relative_to(self._root).as_posix()
                if name in self._sizes:
                    continue
                try:
                    content = path.read_bytes()
                    for entry in read_record(path).entries():
                        self._upload(entry)
                except FileNotFoundError:  # the stage has removed its work
                    continue
                self._create(name, content)

    def _upload(self, entry: FileEntry) -> None:
        if self._sizes.get(entry.path) == entry.bytes:
            return  # its name holds a hash of its content
        source = self._root / entry.path
        entry.check_size(source.stat().st_size, source)
        self._objects.upload(entry.path, source)
        self._done(entry.path, entry.bytes)
        self.n_files += 1
        self.n_bytes += entry.bytes

    def _create(self, name: str, content: bytes) -> None:
        try:
            self._objects.put(name, content, IfNoneMatch="*")
        except ConditionFailed as error:
            raise DataError(
                "one writer commits a task or a version of a dataset in a bucket",
                received="another content, which another writer has committed meanwhile",
                remedy="run the same command again: it goes on from what the bucket holds",
                file=self._objects.url_of(name),
            ) from error
        self._done(name, len(content))

    def _done(self, name: str, n_bytes: int) -> None:
        self._sizes[name] = n_bytes
        self._copied.add(name)

    def _commit_version(self, name: str, manifest: Manifest) -> None:
        for entry in manifest.files():
            self._upload(entry)
        self._lease.check()
        with storage_errors(self._root / name):
            content = (self._root / name).read_bytes()
        self._create(name, content)

    def _others(self) -> list[str]:
        """Files that stages keep beside data files: reports, journals, requests of batches."""
        found = []
        for path in self._root.rglob("*"):
            name = path.relative_to(self._root).as_posix()
            known = path.suffix == ".parquet" or name.startswith(f"{COMMITS}/")
            if known or version_of(name) is not None or name.split("/")[0] in _HIDDEN:
                continue
            if path.is_file() and not is_temporary(path) and name != LEASE:
                found.append(name)
        return sorted(found)

    def _upload_others(self) -> None:
        for name in self._others():
            stamp = _stamp(self._root / name)
            if self._stamps.get(name) != stamp or name not in self._sizes:
                self._objects.upload(name, self._root / name)
                self._stamps[name] = stamp
                self._done(name, stamp[0])

    def _delete_removed(self) -> None:
        """Delete the objects whose files the command deleted, manifests last.

        Files of a version that the command deleted are deleted too, also where the working copy
        did not have them, unless another version or a record needs them.
        """
        gone = {path for path in self._copied if not (self._root / path).exists()}
        versions = {version_of(path) for path in gone} - {None}
        kept = {
            n for v in manifest_versions(self._root) for n in _named(load_manifest(self._root, v))
        }
        for version in versions:
            gone |= {p for p in self._files_of.get(version or 0, ()) if p in self._sizes}
        for path in commit_records(self._root):
            kept |= {entry.path for entry in read_record(path).entries()}
        doomed = sorted(gone - kept, key=lambda path: (version_of(path) is not None, path))
        for name in doomed:
            self._objects.delete(name)
            self._sizes.pop(name, None)
            self._copied.discard(name)


def _named(manifest: Manifest) -> set[str]:
    return {entry.path for entry in manifest.files()}


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
