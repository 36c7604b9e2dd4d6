"""The lock of a run's folder: one training or search at a time writes to it. Loads no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from gvpo_offline.files import lock_folder, make_folder, storage_errors

_held: dict[str, int] = {}  # folders that this process has locked, and how often


@contextlib.contextmanager
def run_lock(folder: Path, together: Callable[[Callable[[], None]], object]) -> Iterator[None]:
    """A context in which this run alone may write to its folder; created if it does not exist.

    The main process holds the lock. The system frees it when that process ends, however it ends.
    On a file system without locks, two runs are not kept apart. An inner context for the same
    folder does nothing.

    Args:
        folder: of the run.
        together: calls a function on the main process and raises its error on every rank;
            `collectives.broadcast_from_rank0`.

    Raises:
        DataError: another run holds the lock.
        StorageError: the folder cannot be written.
    """
    handles: list[int] = []
    key = str(folder.resolve())

    def lock() -> None:
        if key not in _held:
            with storage_errors(folder):
                make_folder(folder)
            handle = lock_folder(folder, what="one training or search at a time runs in a folder")
            handles.extend([] if handle is None else [handle])
        _held[key] = _held.get(key, 0) + 1

    together(lock)
    try:
        yield
    finally:
        if key in _held:
            _held[key] -= 1
            if not _held[key]:
                del _held[key]
        for handle in handles:
            os.close(handle)
