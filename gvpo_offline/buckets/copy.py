"""Working copies of datasets in buckets: what is downloaded, and for how long it is kept."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gvpo_offline.buckets.lease import LEASE, Lease
from gvpo_offline.buckets.objects import Listed, Objects
from gvpo_offline.buckets.settings import BucketSettings
from gvpo_offline.buckets.upload import Uploader
from gvpo_offline.errors import ConfigError, DataError, IntegrityError
from gvpo_offline.files import lock_folder, make_folder, replace_text, storage_errors
from gvpo_offline.hashing import sha256_file, sha256_text
from gvpo_offline.store.commit import read_record
from gvpo_offline.store.leftovers import commit_records
from gvpo_offline.store.location import standing_for
from gvpo_offline.store.manifest import (
    FileEntry,
    load_manifest,
    manifest_versions,
    missing,
    read_twice,
    version_of,
)
from gvpo_offline.store.within import name_problem, path_within
from gvpo_offline.store.writer import is_own_entry

_DIGITS = 16
_STATE = "copy.json"
_DATA = "dataset"


@dataclass
class Copied:
    """What a command did with a dataset in a bucket.

    Attributes:
        url: of the dataset.
        folder: its working copy.
        uploaded_files, uploaded_bytes: data files that were uploaded; 0 until the end.
    """

    url: str
    folder: Path
    uploaded_files: int = 0
    uploaded_bytes: int = 0


@contextmanager
def working_copy(
    url: str, settings: BucketSettings | None = None, *, writes: bool = True
) -> Iterator[Copied]:
    """Work on a dataset in a bucket as on a local folder, and commit at the end of the block.

    In the block, and in this process, the stages (`import_log`, `run_reward`, …) take `url` as a
    local folder. Nothing is visible in the bucket before the block has ended without an error.

    Args:
        url: `s3://bucket/name`.
        settings: of the bucket.
        writes: take the lease and upload; False: only read, for a dataset that is merged into
            another one.

    Raises:
        ConfigError: the URL is not one of S3, or its store ignores conditional puts.
        DataError: another writer holds the dataset's lease, or the dataset is larger than
            `spool_gb`.
        IntegrityError: an object is damaged.
        StorageError: the bucket or the local folder cannot be read or written.
    """
    settings = settings or BucketSettings()
    objects = Objects(url, settings.remote)
    spool = settings.folder / sha256_text(objects.url)[:_DIGITS]
    root = spool / _DATA
    with ExitStack() as held:
        with storage_errors(spool):
            make_folder(spool)
            handle = lock_folder(spool, what="one command at a time uses a working copy")
        if handle is not None:
            held.callback(os.close, handle)
        # The id stands for the lock: without locks it says nothing about a dead owner.
        holder = _holder(spool) if handle is not None else ""
        if not writes:
            _pull(objects, objects.listing(), root, spool, settings)
            with standing_for(url, root), _named_by_url(objects.url, root):
                yield Copied(objects.url, root)
        else:
            lease = held.enter_context(Lease(objects, settings.lease_seconds, holder))
            listed = objects.listing()
            _pull(objects, listed, root, spool, settings)
            done = Copied(objects.url, root)
            with standing_for(url, root), Uploader(objects, root, lease, listed) as uploader:
                with _named_by_url(objects.url, root):
                    yield done
                uploader.finish()
            done.uploaded_files, done.uploaded_bytes = uploader.n_files, uploader.n_bytes
            _remember(spool, root, objects.url)
        if not settings.keep_spool:
            shutil.rmtree(root, ignore_errors=True)


@contextmanager
def _named_by_url(url: str, root: Path) -> Iterator[None]:
    """Let errors about data name the object instead of its copy; errors of the disk keep it."""
    try:
        yield
    except (ConfigError, DataError, IntegrityError) as error:
        file = error.file or ""
        if file != str(root) and not file.startswith(f"{root}/"):
            raise
        raise error.replaced(file=url + file[len(str(root)) :]) from error.__cause__


def _holder(spool: Path) -> str:
    """The id of the working copy's folder, made once."""
    path = spool / "id"
    with storage_errors(path):
        if not path.exists():
            replace_text(path, uuid.uuid4().hex)
        return path.read_text(encoding="ascii")


def _pull(
    objects: Objects, listed: dict[str, Listed], root: Path, spool: Path, settings: BucketSettings
) -> None:
    """Bring the working copy to what the bucket holds, as far as the newest version needs it.

    Files that a killed or failed command has left in it stay while the bucket's newest version is
    the one that it began with. Where both have a file, the bucket's counts.
    """
    for name in listed:
        if problem := name_problem(name):
            raise IntegrityError(
                "the objects under a dataset's URL have the names of files",
                received=problem,
                remedy="delete the object, or choose another URL",
                file=objects.url,
            )
    with storage_errors(root):
        newest = _newest_sha256(objects, listed)
        if _state(spool) != newest or not root.is_dir():
            shutil.rmtree(root, ignore_errors=True)
        make_folder(root)
        replace_text(spool / _STATE, json.dumps({"url": objects.url, "newest": newest}))
        for name in _own(objects.url, listed, new=not newest):
            if not name.endswith(".parquet"):
                _download(objects, name, root)
        entries = _needed(root)
        absent = [entry for entry in entries if not _is_here(root, entry)]
        _check_room(objects.url, entries, settings)
        for entry in absent:
            if entry.path in listed:
                _download_verified(objects, entry, root)


def _own(url: str, listed: Iterable[str], *, new: bool) -> list[str]:
    """The objects of the dataset; DataError if there are others where none was begun."""
    names = [name for name in listed if name != LEASE]
    others = sorted({name.split("/")[0] for name in names if not is_own_entry(name.split("/")[0])})
    if others and new:
        raise DataError(
            "the output folder is empty or holds a dataset",
            received=", ".join(others[:5]),
            remedy="choose another URL, or delete these objects",
            file=url,
        )
    return [name for name in names if name.split("/")[0] not in others]


def _needed(root: Path) -> list[FileEntry]:
    """The data files of the newest version, and of tasks that no version has yet."""
    versions = manifest_versions(root)
    needed: dict[str, FileEntry] = {}
    published: set[str] = set()
    for version in versions:
        files = load_manifest(root, version).files()
        published |= {entry.path for entry in files}
        if version == versions[-1]:
            needed |= {entry.path: entry for entry in files}
    for path in commit_records(root):
        for entry in read_record(path).entries():
            if entry.path not in published:
                needed[entry.path] = entry
    return list(needed.values())


def _check_room(url: str, entries: Iterable[FileEntry], settings: BucketSettings) -> None:
    total = sum(entry.bytes for entry in entries)
    if total > settings.spool_gb * 10**9:
        raise ConfigError(
            f"the working copy of a dataset takes at most {settings.spool_gb:g} GB (spool_gb)",
            received=f"{total / 10**9:,.1f} GB of data files",
            remedy="set spool_gb higher, and spool_dir to a disk with that much room",
            file=url,
        )


def _is_here(root: Path, entry: FileEntry) -> bool:
    path = path_within(root, entry.path)
    return path.is_file() and path.stat().st_size == entry.bytes


def _download(objects: Objects, name: str, root: Path) -> None:
    try:
        objects.download(name, path_within(root, name))
    except FileNotFoundError as error:
        raise missing(objects.url_of(name)) from error


def _download_verified(objects: Objects, entry: FileEntry, root: Path) -> None:
    path = path_within(root, entry.path)

    def once() -> None:
        _download(objects, entry.path, root)
        try:
            entry.check_size(path.stat().st_size, objects.url_of(entry.path))
            entry.check_sha256(sha256_file(path), objects.url_of(entry.path))
        except IntegrityError:
            path.unlink()
            raise

    read_twice(once)


def _newest_sha256(objects: Objects, listed: dict[str, Listed]) -> str:
    """SHA-256 of the newest manifest in the bucket; "" if there is none."""
    versions = sorted((version_of(name) or 0, name) for name in listed if version_of(name))
    if not versions:
        return ""
    return sha256_text(objects.get(versions[-1][1]).content.decode("utf-8", "replace"))


def _state(spool: Path) -> str | None:
    """The newest manifest's SHA-256 that the working copy began with; None if it is not known."""
    try:
        found = json.loads((spool / _STATE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found.get("newest") if isinstance(found, dict) else None


def _remember(spool: Path, root: Path, url: str) -> None:
    """Note after a commit that the working copy is of the version that it committed."""
    versions = manifest_versions(root)
    newest = ""
    if versions:
        name = root / f"manifest-{versions[-1]:06d}.json"
        newest = sha256_text(name.read_text(encoding="utf-8"))
    replace_text(spool / _STATE, json.dumps({"url": url, "newest": newest}))
