"""What a killed process leaves in a dataset's folder, and its removal while nothing else writes.

Two locks say who works there. An import, merge, compaction or pull holds that of the dataset's
folder alone. Any number of processes that sample, score or judge share that of `commits/`. Both
end with their process. What one of them has written and not committed is left over once it ended.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from gvpo_offline.errors import GVPOError
from gvpo_offline.files import make_folder, remove_if_abandoned, storage_errors
from gvpo_offline.store.commit import read_record
from gvpo_offline.store.manifest import load_manifest, manifest_versions

COMMITS = "commits"
PULLED = ".pull.tmp"
SPILL = ".spill"
# The folders of files that a manifest or a commit record names.
FOLDERS = ("groups", "rewards", "reference", "incomplete", "prompts", "samples", "judgements")
_TEMPORARY = re.compile(r"^\.(.+)\.[0-9a-f]{32}\.tmp$")
# Names that a process with the lock of the folder gives: imports, merges, new manifests.
_OF_WRITERS = re.compile(
    r"^(\d{5}|(rewrite|waiting)-\d{5})(\.json)?$|^manifest-\d{6,}\.json$|^import_report\.jsonl$"
)


def is_temporary(path: Path) -> bool:
    """Whether a file has the name of a write that is not finished."""
    return bool(_TEMPORARY.match(path.name))


def temporary_files(root: Path) -> list[Path]:
    """The files of unfinished writes in a dataset's folder, without those of a pull."""
    names = [COMMITS, "batches", *FOLDERS]
    found = [path for name in names for path in (root / name).rglob(".*.tmp")]
    return sorted(path for path in [*found, *root.glob(".*.tmp")] if is_temporary(path))


def commit_records(root: Path) -> list[Path]:
    """The commit records of a dataset's folder."""
    return sorted((root / COMMITS).glob("*/*.json"))


def named_files(root: Path) -> set[str]:
    """The paths that some manifest or commit record of a folder names.

    Raises:
        IntegrityError: one of them is damaged, so that its files are not known.
    """
    named = {
        entry.path for v in manifest_versions(root) for entry in load_manifest(root, v).files()
    }
    for path in commit_records(root):
        named |= {entry.path for entry in read_record(path).entries()}
    return named


def orphans(root: Path) -> list[Path]:
    """The Parquet files of a dataset's folders that neither a manifest nor a record names.

    Raises:
        IntegrityError: as `named_files`.
    """
    files = [
        path
        for name in FOLDERS
        for path in sorted((root / name).rglob("*.parquet"))
        if not path.is_symlink() and path.is_file() and not path.name.startswith(".")
    ]
    if not files:
        return []
    # The newest version names most of them, and the others are read only where that is not enough.
    newest = {e.path for e in load_manifest(root).files()} if manifest_versions(root) else set()
    left = [path for path in files if _name(root, path) not in newest]
    named = named_files(root) if left else set()
    return [path for path in left if _name(root, path) not in named]


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


@contextmanager
def stages_at_work(root: Path) -> Iterator[None]:
    """Share the lock of `commits/` until the block ends; first remove what killed processes left.

    Nothing is removed while another process holds either lock, nor on a file system without locks.
    Orphans stay while a manifest or record is damaged: what it names is not known then.

    Raises:
        StorageError: the folder `commits/` cannot be made.
    """
    folder = root / COMMITS
    made = not folder.exists()
    with storage_errors(folder):
        make_folder(folder)
        handle = os.open(folder, os.O_RDONLY)
    try:
        if _locked(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
            with suppress(OSError):  # the folder may be read-only; the stage itself says so
                _sweep(root)
        _locked(handle, fcntl.LOCK_SH)  # waits while another process sweeps
        yield
    finally:
        if made and _locked(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
            with suppress(OSError):  # something is committed
                folder.rmdir()
        os.close(handle)


@contextmanager
def nobody_at_work(root: Path) -> Iterator[bool]:
    """Hold both locks of a dataset's folder until the block ends.

    Yields:
        Whether both were free. False as well on a file system without locks.
    """
    with ExitStack() as held:
        free = True
        for folder in (root, root / COMMITS):
            if not folder.is_dir():
                continue
            handle = os.open(folder, os.O_RDONLY)
            held.callback(os.close, handle)
            free = free and _locked(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield free


def _sweep(root: Path) -> None:
    """Remove temporary files; with the lock of the folder too, those of writers and orphans."""
    handle = os.open(root, os.O_RDONLY)
    try:
        alone = _locked(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in temporary_files(root):
            if alone or not _OF_WRITERS.match(_TEMPORARY.sub(r"\1", path.name)):
                remove_if_abandoned(path)
        if alone and not (root / PULLED).exists():
            with suppress(GVPOError):
                for path in orphans(root):
                    path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _locked(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how)
    except OSError:  # held by another process, or a file system without locks
        return False
    return True
