"""A dataset from the hub: its manifest, then the files asked for, each held against its hash; the
manifest appears in the folder once everything that it names is there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gvpo_offline.errors import DataError, IntegrityError
from gvpo_offline.hashing import sha256_file
from gvpo_offline.hub.repo import Repo, hub_errors, progress_bars
from gvpo_offline.hub.settings import PullConfig
from gvpo_offline.hub.versions import check_goes_on, is_partial, newest_of, without_parts
from gvpo_offline.store.commit import create_only, fsync_folder, make_folder, storage_errors
from gvpo_offline.store.location import local_folder
from gvpo_offline.store.manifest import (
    FileEntry,
    Manifest,
    dump_manifest,
    load_manifest,
    manifest_path,
    manifest_versions,
)
from gvpo_offline.store.writer import claim_folder, lock_folder

_AT_ONCE = 8


@dataclass(frozen=True)
class Pulled:
    """What a pull did.

    Attributes:
        manifest: the version that is in the folder now.
        commit: the commit of the repository that it came from.
        files, bytes: files that were downloaded, and their length; 0 where all was there.
    """

    manifest: Manifest
    commit: str
    files: int
    bytes: int


def pull(config: PullConfig) -> Pulled:
    """Download one version of a dataset.

    Raises:
        ConfigError: no such repository, revision, reward or reference, or no permission.
        DataError: the repository has no manifest, or the folder holds something else.
        IntegrityError: a file is not the one that the manifest names.
        StorageError: the hub does not answer, or there is no room.
    """
    root = local_folder("output_dir", config.output_dir)
    bars = progress_bars(shown=config.show_progress)
    with bars, hub_errors(config.repo_id), storage_errors(root):
        repo = Repo.open(config.repo_id, config.revision)
        version = newest_of(repo.manifest_versions(), config.dataset_version, repo.label)
        claim_folder(root)
        with _staging(root) as staging:
            whole = repo.manifest(version, staging)
            wanted = without_parts(whole, config, repo.commit)
            _check_paths(wanted, repo)
            _check_folder(root, wanted)
            fetched = _fetch_all(repo, wanted.files(), root, staging)
            _publish(root, wanted, staging if wanted is whole else None)
    n_bytes = sum(entry.bytes for entry in fetched)
    return Pulled(wanted, repo.commit, files=len(fetched), bytes=n_bytes)


@contextmanager
def _staging(root: Path) -> Iterator[Path]:
    """A folder for what is not checked yet; DataError while another process writes to `root`."""
    handle = lock_folder(root)
    folder = root / ".pull.tmp"
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _check_paths(manifest: Manifest, repo: Repo) -> None:
    """Raise IntegrityError if a path would lie outside the folder, or where no dataset has files:
    a manifest from the hub is whatever somebody wrote.
    """
    for entry in manifest.files():
        parts = PurePosixPath(entry.path).parts
        inside = len(parts) > 1 and parts[0] in ("groups", "rewards", "reference")
        if not inside or ".." in parts or "\\" in entry.path:
            raise IntegrityError(
                "the files of a dataset lie under groups, rewards and reference",
                received=entry.path,
                remedy="do not use this repository",
                file=repo.label,
            )


def _check_folder(root: Path, manifest: Manifest) -> None:
    """Raise DataError if the folder holds a dataset that this is no later version of."""
    versions = manifest_versions(root)
    if not versions:
        return
    held = load_manifest(root)
    if not _is_held(root, manifest):
        check_goes_on(manifest, held, root, "choose another output_dir")


def _is_held(root: Path, manifest: Manifest) -> bool:
    """Whether the folder's newest version is this one: of partial copies, with the same parts."""
    held = load_manifest(root)
    if is_partial(held) and is_partial(manifest):  # which may name different commits
        held = held.model_copy(update={"lineage": manifest.lineage})
    return held == manifest


def _fetch_all(
    repo: Repo, entries: Sequence[FileEntry], root: Path, staging: Path
) -> list[FileEntry]:
    """Fetch what the folder lacks, several files at once; those that were fetched."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        running = [pool.submit(_fetch, repo, entry, root, staging) for entry in entries]
        try:
            fetched = [future.result() for future in running]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [entry for entry, new in zip(entries, fetched, strict=True) if new]


def _fetch(repo: Repo, entry: FileEntry, root: Path, staging: Path) -> bool:
    """Make sure that a file is in the folder; False if it was there already."""
    final = root / entry.path
    if final.is_file() and _is(final, entry):
        return False
    for again in (False, True):
        found = repo.download(entry.path, staging, again=again)
        if _is(found, entry):
            with found.open("rb") as file:
                os.fsync(file.fileno())
            make_folder(final.parent)
            os.replace(found, final)
            fsync_folder(final.parent)
            return True
    raise IntegrityError(
        f"the file has {entry.bytes} bytes and the SHA-256 {entry.sha256[:16]}…, as the manifest "
        "says",
        received=f"{found.stat().st_size} bytes, {sha256_file(found)[:16]}…, twice",
        remedy="ask whoever pushed the dataset to push it again",
        file=f"{repo.label}/{entry.path}",
    )


def _is(path: Path, entry: FileEntry) -> bool:
    return path.stat().st_size == entry.bytes and sha256_file(path) == entry.sha256


def _publish(root: Path, manifest: Manifest, staging: Path | None) -> None:
    """Create the manifest: the hub's own file, or that of a partial copy.

    Raises:
        DataError: another process has created one in the meantime.
    """
    path = manifest_path(root, manifest.version)
    text = (
        dump_manifest(manifest)
        if staging is None
        else (staging / path.name).read_text(encoding="utf-8")
    )
    if not create_only(path, text) and not _is_held(root, manifest):
        raise DataError(
            "nobody else writes to the folder during a pull",
            received=f"another version {manifest.version}",
            remedy="choose another output_dir",
            file=root,
        )
