"""Download of a dataset: its manifest, then its files through `snapshot_download`.

A file is moved into the dataset's folder once its SHA-256 is the manifest's, and the manifest comes
last: readers see all of a version or nothing of it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gvpo_offline.errors import ConfigError, DataError, IntegrityError
from gvpo_offline.files import (
    fsync_folder,
    lock_folder,
    make_folder,
    remove_abandoned,
    storage_errors,
)
from gvpo_offline.hashing import sha256_file
from gvpo_offline.hub.repo import Repo, hub_errors, progress_bars
from gvpo_offline.hub.settings import PullConfig
from gvpo_offline.hub.versions import check_continues, choose_version, is_partial, without_parts
from gvpo_offline.store.commit import create_only
from gvpo_offline.store.location import local_folder
from gvpo_offline.store.manifest import (
    FileEntry,
    Manifest,
    dump_manifest,
    load_manifest,
    manifest_path,
    manifest_versions,
)
from gvpo_offline.store.within import check_regular, path_within
from gvpo_offline.store.writer import claim_folder

_FOLDERS = ("groups", "rewards", "reference", "incomplete")


@dataclass(frozen=True)
class PullResult:
    """Result of a pull.

    Attributes:
        manifest: the version that is in the folder now.
        commit: the commit of the repository that it came from.
        files, bytes: number and total length of the files that were downloaded; 0 if all existed.
    """

    manifest: Manifest
    commit: str
    files: int
    bytes: int


def pull(config: PullConfig) -> PullResult:
    """Download one version of a dataset.

    Raises:
        ConfigError: no such repository, revision, reward or reference, or no permission.
        DataError: the repository has no manifest or lacks a file, or the folder holds something
            else.
        IntegrityError: a file is not the one that the manifest names.
        StorageError: the hub does not answer, or the disk is full.
    """
    root = local_folder("output_dir", config.output_dir)
    bars = progress_bars(shown=config.show_progress)
    with bars, hub_errors(config.repo_id), storage_errors(root):
        repo = Repo.open(config.repo_id, config.revision)
        version = choose_version(repo.manifest_versions(), config.dataset_version, repo.label)
        claim_folder(root)
        with _staging(root) as staging:
            whole = repo.manifest(version, staging)
            wanted = without_parts(whole, config, repo.commit)
            _check_paths(wanted, repo)
            _check_folder(root, wanted)
            _check_held_files(root, wanted)
            missing = [entry for entry in wanted.files() if not _is(root / entry.path, entry)]
            _download(repo, missing, root, staging)
            _publish(root, wanted, staging if wanted is whole else None)
    n_bytes = sum(entry.bytes for entry in missing)
    return PullResult(wanted, repo.commit, files=len(missing), bytes=n_bytes)


@contextmanager
def _staging(root: Path) -> Iterator[Path]:
    """A folder for unverified files; DataError if another process writes to `root`.

    After an interruption or a network error it stays, and the next pull continues its downloads.
    """
    folder = path_within(root, ".pull.tmp")
    handle = lock_folder(root)
    try:
        if handle is not None:
            remove_abandoned(root, "manifest-*.json")
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
    except (ConfigError, DataError, IntegrityError):
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if handle is not None:
            os.close(handle)


def _check_paths(manifest: Manifest, repo: Repo) -> None:
    """Raise IntegrityError if a path lies outside the dataset's folders: a manifest from the hub is
    untrusted input. Raise DataError if the repository lacks a file.
    """
    for entry in manifest.files():
        parts = PurePosixPath(entry.path).parts
        inside = len(parts) > 1 and parts[0] in _FOLDERS
        if not inside or ".." in parts or "\\" in entry.path:
            raise IntegrityError(
                "the files of a dataset lie under groups, rewards, reference and incomplete",
                received=entry.path,
                remedy="do not use this repository",
                file=repo.label,
            )
        if entry.path not in repo.files:
            raise DataError(
                "every file that the manifest names is in the repository",
                received=f"no {entry.path}",
                remedy="push the dataset again",
                file=repo.label,
            )


def _check_folder(root: Path, manifest: Manifest) -> None:
    """Raise DataError if the folder holds a dataset and `manifest` is no later version of it."""
    versions = manifest_versions(root)
    if not versions:
        return
    held = load_manifest(root)
    if not _is_held(root, manifest):
        check_continues(manifest, held, root, "choose another output_dir")


def _check_held_files(root: Path, manifest: Manifest) -> None:
    """Check that no file that a pull writes is in its way.

    Raises:
        IntegrityError: a version in the folder has another file of the same path, a path leaves
            the folder by a link, or something else than a file is in its place.
    """
    held: dict[str, tuple[int, str]] = {}
    for version in manifest_versions(root):
        for entry in load_manifest(root, version).entries():
            held.setdefault(entry.path, (version, entry.sha256))
    for entry in manifest.entries():
        version, sha256 = held.get(entry.path, (0, entry.sha256))
        if sha256 != entry.sha256:
            raise IntegrityError(
                "a file of a dataset never changes: a pull adds files and replaces none",
                received=f"{entry.path} with the SHA-256 {entry.sha256[:16]}…, and version "
                f"{version} in the folder has {sha256[:16]}…",
                remedy="choose another output_dir",
                file=root,
            )
        path = path_within(root, entry.path)
        if os.path.lexists(path):
            with suppress(FileNotFoundError):  # a link to nothing, which the file replaces
                check_regular(path)


def _is_held(root: Path, manifest: Manifest) -> bool:
    """Whether the folder's newest version is `manifest`, or a partial copy with the same parts."""
    held = load_manifest(root)
    if is_partial(held) and is_partial(manifest):  # their lineages may name different commits
        held = held.model_copy(update={"lineage": manifest.lineage})
    return held == manifest


def _download(repo: Repo, missing: Sequence[FileEntry], root: Path, staging: Path) -> None:
    """Download files into `staging` and move them to `root`; files that are wrong are retried once.

    Raises:
        IntegrityError: a file was wrong twice.
    """
    for again in (False, True):
        if missing:
            repo.download([entry.path for entry in missing], staging, again=again)
        missing = [entry for entry in missing if not _moved(entry, root, staging)]
    for entry in missing:
        found = staging / entry.path
        raise IntegrityError(
            f"the file has {entry.bytes} bytes and the SHA-256 {entry.sha256[:16]}…, as the "
            "manifest says",
            received=f"{found.stat().st_size} bytes, {sha256_file(found)[:16]}…, twice"
            if found.is_file()
            else "nothing",
            remedy="run the same command again, or ask the owner of the repository to push again",
            file=f"{repo.label}/{entry.path}",
        )


def _moved(entry: FileEntry, root: Path, staging: Path) -> bool:
    """Move a file from `staging` to `root`; False if it is not the one that `entry` describes."""
    found, final = staging / entry.path, root / entry.path
    if not _is(found, entry):
        return False
    with found.open("rb") as file:
        os.fsync(file.fileno())
    make_folder(final.parent)
    os.replace(found, final)
    fsync_folder(final.parent)
    return True


def _is(path: Path, entry: FileEntry) -> bool:
    """Whether a file exists and has the length and SHA-256 of `entry`."""
    size = path.stat().st_size if path.is_file() else None
    return size == entry.bytes and sha256_file(path) == entry.sha256


def _publish(root: Path, manifest: Manifest, staging: Path | None) -> None:
    """Create the manifest: a copy of the hub's file, or (`staging` is None) a partial copy's own.

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
            "no other process writes to the folder during a pull",
            received=f"another version {manifest.version}",
            remedy="choose another output_dir",
            file=root,
        )
