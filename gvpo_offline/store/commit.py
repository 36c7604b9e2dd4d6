"""Atomic files, and commit records that make each task count once.

A file is written under a temporary name, synced to disk, hashed, and renamed to a name with its
hash. A task then creates its commit record, never overwriting one: of two attempts at one task the
first wins, and the second uses the winner's files. Readers never see a partly written file.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from gvpo_offline.errors import ConfigError, DataError, IntegrityError, StorageError
from gvpo_offline.files import (
    fsync_folder,
    make_folder,
    owned_file,
    storage_errors,
    temporary_name,
)
from gvpo_offline.hashing import sha256_file
from gvpo_offline.store.manifest import (
    BaseFile,
    FileEntry,
    Sidecar,
    damaged,
    missing,
    read_twice,
)
from gvpo_offline.store.sealed import parse_json, sealed_text, unsealed
from gvpo_offline.store.within import (
    check_entries,
    check_regular,
    path_within,
    read_regular,
)
from gvpo_offline.system_errors import raise_translated

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}
_HASH_DIGITS = 12
_DELETE = "delete it: its task will be done again"


class TaskRecord(BaseModel):
    """The files and counts that one committed task added to a dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str = Field(description="The folder of the record under `commits/`.")
    task: str = Field(description="The record's file name, without its ending.")
    groups: list[BaseFile] = []
    sidecars: list[Sidecar] = []
    files: list[FileEntry] = Field(default=[], description="Files of any other kind.")
    counts: dict[str, int] = Field(default={}, description="What else the task counted.")
    details: dict[str, Any] = Field(default={}, description="Counts by name, as the stage needs.")

    def entries(self) -> list[FileEntry]:
        """Every file of the task."""
        return [*self.groups, *(sidecar.file for sidecar in self.sidecars), *self.files]


class SealedRecord(BaseModel):
    """The content of a commit record's file: the record and its hash."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(description="SHA-256 of `record` as canonical JSON.")
    record: TaskRecord


@contextmanager
def undo_on_bad_input(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo` if the block raises DataError or ConfigError, then raise the error again.

    For a stage whose committed work is useless once its data or settings turn out to be invalid.
    After any other error (a full disk, an interrupt) the committed work stays, and the same command
    continues from it.
    """
    try:
        yield
    except (DataError, ConfigError):
        undo()
        raise


def write_hashed(
    folder: Path, stem: str, suffix: str, write: Callable[[Path], None]
) -> tuple[Path, str]:
    """Let `write` fill a temporary file, then rename it to `stem-<hash><suffix>`.

    Returns:
        The path, and the SHA-256 of the content.

    Raises:
        StorageError: the disk is full; the temporary file is removed.
    """
    temporary = temporary_name(folder, stem)
    try:
        with storage_errors(folder / f"{stem}{suffix}"):
            make_folder(folder)
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            digest = sha256_file(temporary)
            final = folder / f"{stem}-{digest[:_HASH_DIGITS]}{suffix}"
            os.rename(temporary, final)
            fsync_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)
    return final, digest


def create_only(path: Path, content: str) -> bool:
    """Create `path` with `content` unless it exists. True if this call created it.

    It is a hard link to a complete temporary file, so that `path` never has partial content.

    Raises:
        StorageError: the disk is full, or the file system has no hard links.
    """
    with storage_errors(path):
        make_folder(path.parent)
        with owned_file(path) as (file, temporary):
            file.write(content.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                raise StorageError(
                    "a commit needs a file system with hard links",
                    received=os.strerror(error.errno or 0),
                    remedy="put the folder on another file system",
                    file=path,
                ) from error
            fsync_folder(path.parent)
            return True


def verify_file(root: Path, entry: FileEntry, *, content: bool = True) -> None:
    """Check a file's presence, size and (with `content`) SHA-256 against its entry.

    Raises:
        IntegrityError: the file is missing, shortened or altered, or no regular file. After a
            mismatch the file is read a second time, so that a transient read error does not end a
            run.
    """
    verify_at(root / entry.path, entry, content=content)


def verify_at(path: Path, entry: FileEntry, *, content: bool = True) -> None:
    """As `verify_file`, of a file at `path`."""
    try:
        entry.check_size(check_regular(path).st_size, path)
    except FileNotFoundError as error:
        raise missing(path) from error

    def check() -> None:
        try:
            found = sha256_file(path)
        except OSError as error:
            raise_translated(error, path)
            raise damaged("the file can be read", error, path) from error
        entry.check_sha256(found, path)

    if content:
        read_twice(check)


class TaskLog:
    """The commit records of one stage: `commits/<stage>/<task>.json` under a dataset's root."""

    def __init__(self, root: Path, stage: str) -> None:
        self.root = root
        self.stage = stage
        self.folder = root / "commits" / stage

    def exists(self, task: str) -> bool:
        """Whether a task is committed; its files are not checked."""
        return os.path.lexists(self._path(task))

    def _path(self, task: str) -> Path:
        return path_within(self.root, f"commits/{self.stage}/{task}.json")

    def committed(self, task: str) -> TaskRecord | None:
        """The record of a committed task, its files verified; None if it is not committed.

        Raises:
            IntegrityError: the record or one of its files is damaged.
        """
        record = self.peek(task)
        if record is None:
            return None
        for entry in record.entries():
            verify_file(self.root, entry)
        return record

    def peek(self, task: str) -> TaskRecord | None:
        """As `committed`, without verifying the task's files.

        Raises:
            IntegrityError: the record is damaged.
        """
        path = self._path(task)
        return read_record(path) if os.path.lexists(path) else None

    def commit(self, record: TaskRecord) -> TaskRecord:
        """Commit `record`; returns the committed record, which may be that of another attempt."""
        path = self._path(record.task)
        if create_only(path, sealed_text("record", record)):
            return record
        winner = self.committed(record.task)
        assert winner is not None  # creating the record just failed because it exists
        return winner


def read_record(path: Path) -> TaskRecord:
    """A commit record; its files are not checked.

    Raises:
        IntegrityError: it is damaged, is the record of another task or stage, or names a file
            outside the dataset.
    """
    with storage_errors(path):
        content = read_regular(path)
    return parse_record(content, path, path)


def parse_record(content: bytes, path: Path | str, place: Path | str) -> TaskRecord:
    """The commit record with some content; errors as `read_record`.

    Args:
        content: of its file.
        path: path or URL of the file, for errors.
        place: a path that ends as `commits/<stage>/<task>.json`.
    """
    rule = "a commit record follows schemas/commit.schema.json"
    stage, task = Path(place).parent.name, Path(place).stem
    sealed = parse_json(content, path, rule, _DELETE)
    record = unsealed(TaskRecord, "record", sealed, path, rule, _DELETE)
    check_entries(record.entries(), path)
    if (record.stage, record.task) != (stage, task):
        raise IntegrityError(
            f"the record of task {task} of stage {stage} lies at this path",
            received=f"a record of task {record.task} of stage {record.stage}",
            remedy=_DELETE,
            file=path,
        )
    return record
