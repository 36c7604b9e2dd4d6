"""Diagnosis of a folder, and the removal of what nothing needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gvpo_offline.doctor.dataset import dataset_findings, is_dataset
from gvpo_offline.doctor.finding import Diagnosis, Finding, Of, remove
from gvpo_offline.doctor.run import is_run_folder, run_findings
from gvpo_offline.doctor.settings import DoctorConfig
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.files import lock_folder, storage_errors
from gvpo_offline.store.leftovers import nobody_at_work
from gvpo_offline.store.location import is_url, local_folder


def diagnose(config: DoctorConfig) -> Diagnosis:
    """Look at a folder or a dataset in a bucket; with `remove` remove what is left over.

    Files that a manifest, a commit record that can be used, a complete checkpoint or a running
    process needs are never removed.

    Raises:
        DataError: the folder holds neither a dataset nor a run; or, with `remove`, a process works
            in it.
        StorageError: a file cannot be read or removed.
    """
    if is_url(config.path):
        from gvpo_offline.doctor.bucket import diagnose_bucket

        return diagnose_bucket(config)
    root = local_folder("path", config.path)
    kind = _kind(root)
    with storage_errors(root):
        if config.remove:
            with _locks(root, kind) as free:
                return _removed(root, kind, free=free)
        # Looking at large checkpoints takes long: the locks are not held, so that commands start.
        with _locks(root, kind) as free:
            busy = not free
        return Diagnosis(root, kind, busy, _findings(root, kind))


def _removed(root: Path, kind: Of, *, free: bool) -> Diagnosis:
    """Remove what is removable, under the locks of the folder."""
    removed: list[Finding] = []
    while doomed := [own for own in _findings(root, kind) if own.removable]:
        if not free:
            raise DataError(
                "nothing is removed while a process works in the folder",
                received="another process that holds its lock, or a file system without locks",
                remedy="wait until it ends; without locks, remove the listed files yourself",
                file=root,
            )
        for own in doomed:
            with storage_errors(own.path):
                remove(own.path)
        removed += doomed
        # Without a broken record, the files that it named may be orphans: look again.
        if not any(own.kind == "record" for own in doomed):
            break
    return Diagnosis(root, kind, not free, _findings(root, kind), removed)


def _findings(root: Path, kind: Of) -> list[Finding]:
    return dataset_findings(root) if kind == "dataset" else run_findings(root)


def _kind(root: Path) -> Of:
    if is_dataset(root):
        return "dataset"
    if is_run_folder(root):
        return "run"
    raise DataError(
        "the doctor looks at the folder of a dataset or of a run (output_dir)",
        received="a folder that holds neither" if root.is_dir() else "no such folder",
        remedy="name a folder that `gvpo-offline import` or `gvpo-offline train` has written",
        file=root,
    )


@contextmanager
def _locks(root: Path, kind: Of) -> Iterator[bool]:
    """Hold the locks of a folder; yields whether they were free."""
    if kind == "dataset":
        with nobody_at_work(root) as free:
            yield free
        return
    try:
        handle = lock_folder(root)
    except (ConfigError, DataError):
        yield False
        return
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)
