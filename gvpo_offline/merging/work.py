"""Lock and clean-up of a dataset's folder while its groups are rewritten."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gvpo_offline.files import lock_folder, remove_abandoned, remove_if_abandoned
from gvpo_offline.store.commit import TaskLog, TaskRecord, read_record
from gvpo_offline.store.manifest import (
    Manifest,
    load_manifest,
    manifest_path,
    manifest_versions,
)
from gvpo_offline.store.within import check_regular, own_files, path_within

# Only files with names of these stages are removed: other stages may be writing sidecars.
_TEMPORARY = re.compile(r"^\.(rewrite|waiting)-\d{5}(\.json)?\.[0-9a-f]{32}\.tmp$")
_SHARD = re.compile(r"^(rewrite|waiting)-\d{5}-[0-9a-f]{12}\.parquet$")


def task_name(part: int) -> str:
    """The name of a part's task, from which the names of its files are made."""
    return f"rewrite-{part:05d}"


def waiting_name(number: int) -> str:
    """The name of the task that copies a file of incomplete groups."""
    return f"waiting-{number:05d}"


@contextmanager
def locked_dataset(root: Path) -> Iterator[Path]:
    """Lock a dataset's folder for this process, and create a folder for spilled rows in it.

    Without file locks on the file system, several processes may enter: each has its own folder of
    spilled rows, and the files of interrupted runs are not removed.

    Yields:
        The folder for spilled rows, which is removed on exit.

    Raises:
        DataError: the folder holds no dataset, or another process writes to it.
    """
    load_manifest(root)
    handle = lock_folder(root)
    spilled = root / ".spill" / uuid.uuid4().hex
    try:
        if handle is not None:
            _sweep(root)
        spilled.mkdir(parents=True)
        yield spilled
    finally:
        shutil.rmtree(spilled, ignore_errors=True)
        with suppress(OSError):  # another process has spilled rows in it
            spilled.parent.rmdir()
        if handle is not None:
            os.close(handle)


def _sweep(root: Path) -> None:
    """Remove temporary files and spilled rows of interrupted runs."""
    remove_abandoned(root, "manifest-*.json")  # also where no version is published again
    for path in own_files(root, ".*.tmp"):
        if _TEMPORARY.match(path.name):
            remove_if_abandoned(path)
    shutil.rmtree(root / ".spill", ignore_errors=True)


def discard(root: Path, log: TaskLog) -> None:
    """Remove the records of `log`, and those of their files that are in no version's manifest."""
    named = {name for v in manifest_versions(root) for name in _named(load_manifest(root, v))}
    for path in sorted(log.folder.glob("*.json")):
        for name in _files(read_record(path)) - named:
            path_within(root, name).unlink(missing_ok=True)
    shutil.rmtree(log.folder, ignore_errors=True)


def remove_old(root: Path, newest: Manifest) -> int:
    """Remove all versions before `newest`, with their commit records and files.

    Files that `newest` uses stay. Shards of interrupted merges and compactions are removed too.
    Files are removed before the manifests that list them, so an interrupted removal can be
    repeated.

    Returns:
        The number of bytes freed.

    Raises:
        IntegrityError: a version names a file that does not lie in the folder. Nothing is removed.
    """
    kept = _named(newest)
    versions = [version for version in manifest_versions(root) if version < newest.version]
    old: dict[str, int] = {}
    for version in versions:
        named = _named(load_manifest(root, version))
        old |= {name: size for name, size in named.items() if name not in kept}
    for path in own_files(root, "*.parquet"):  # of interrupted runs
        name = str(path.relative_to(root))
        if _SHARD.match(path.name) and name not in kept:
            old[name] = path.lstat().st_size
    needed = {place for name in kept for place in _places(root / name)}
    # Every check comes before the first removal.
    removed = {name: path_within(root, name) for name in old}
    removed = {n: path for n, path in removed.items() if _places(path)[0] not in needed}
    for path in removed.values():
        with suppress(FileNotFoundError):
            check_regular(path)
    found = sorted((root / "commits").glob("*/*.json"))
    records = [p for p in found if _files(read_record(p)) & set(removed)]
    for path in [path_within(root, str(p.relative_to(root))) for p in records]:
        path.unlink()
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    freed = 0
    for name, path in removed.items():
        freed += old[name] if path.exists() else 0
        path.unlink(missing_ok=True)
    for version in versions:
        manifest_path(root, version).unlink()
    return freed


def _places(path: Path) -> tuple[str, str]:
    """Where a file lies, and where it leads: two names may be links to one file."""
    return os.path.join(os.path.realpath(path.parent), path.name), os.path.realpath(path)


def _named(manifest: Manifest) -> dict[str, int]:
    """Paths of a version's files, with their sizes in bytes."""
    return {entry.path: entry.bytes for entry in manifest.files()}


def _files(record: TaskRecord) -> set[str]:
    return {entry.path for entry in record.entries()}
