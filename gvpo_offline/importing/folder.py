"""The output folder of an import: its lock, the work of an earlier run, and its removal."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from types import TracebackType

from gvpo_offline.errors import DataError
from gvpo_offline.files import lock_folder, remove_abandoned, remove_if_abandoned
from gvpo_offline.store.commit import TaskLog, TaskRecord, verify_file
from gvpo_offline.store.import_versions import import_versions
from gvpo_offline.store.manifest import (
    Manifest,
    load_manifest,
    manifest_versions,
)
from gvpo_offline.store.within import path_within
from gvpo_offline.store.writer import IMPORT_REPORT, claim_folder
from gvpo_offline.version import IMPORT_VERSION

# Prefixes of the stages of `sample`, whose commit records are in the same folder.
SAMPLING_STAGES = ("prompts-", "sample-")

# The folders of an import's shards.
_WRITTEN = ("groups", "rewards", "incomplete")
# Only files with names that an import gives are ever removed.
_SHARD = re.compile(r"^\d{5}-[0-9a-f]{12}\.parquet$")
_TEMPORARY = re.compile(
    r"^\.(\d{5}|\d{5}\.json|manifest-\d{6}\.json|import_report\.jsonl)\.[0-9a-f]{32}\.tmp$"
)


class OutputFolder:
    """The output folder of an import, locked for one process.

    On entry the folder is created if needed and locked; the operating system releases the lock when
    the process ends. On exit the folder is removed if it was created here and is empty.

    Args:
        root: the folder.
        wait: wait until another import into the folder ends, instead of raising an error.
        shared: share the lock with other processes of one import (`shard`).

    Raises:
        DataError: the folder holds other files, or another import into it is running.
    """

    def __init__(self, root: Path, *, wait: bool = False, shared: bool = False) -> None:
        self.root = root
        self.shared = shared
        self._wait = wait
        self._made = False
        self._handle: int | None = None

    def __enter__(self) -> OutputFolder:
        self._made = not self.root.exists()
        claim_folder(self.root)
        self._handle = lock_folder(self.root, wait=self._wait, shared=self.shared)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._made and not any(self.root.iterdir()):
            self.root.rmdir()
        if self._handle is not None:
            os.close(self._handle)

    def finished(self, identity: str) -> Manifest | None:
        """The manifest if the folder holds the result of import `identity`, None if no dataset.

        Raises:
            DataError: the folder holds another dataset.
            IntegrityError: a file of the dataset is missing or has another length.
        """
        if not manifest_versions(self.root):
            return None
        manifest = load_manifest(self.root)
        if not any(step.config.get("identity") == identity for step in manifest.lineage):
            self._refuse_earlier(import_versions(manifest))
            raise DataError(
                "the output folder is empty, or holds this import",
                received=f"a dataset of {manifest.n_groups} groups, imported from other inputs or "
                "with other settings or another tokenizer",
                remedy="choose another output_dir, or remove the dataset first",
                file=self.root,
            )
        for entry in manifest.groups:
            verify_file(self.root, entry, content=False)
        for family in manifest.rewards:
            for sidecar in family.files:
                verify_file(self.root, sidecar.file, content=False)
        for waiting in manifest.incomplete.files if manifest.incomplete else ():
            verify_file(self.root, waiting, content=False)
        self.remove_spill()
        remove_abandoned(self.root, "manifest-*.json")
        return manifest

    def _refuse_earlier(self, versions: Collection[int]) -> None:
        earlier = min(versions, default=IMPORT_VERSION)
        if earlier < IMPORT_VERSION:
            raise DataError(
                "the output folder is empty, or holds an import by this version of the package",
                received=f"an import of import version {earlier}, which gives other token ids than "
                f"version {IMPORT_VERSION}",
                remedy="use the dataset as it is (training warns once), or import into another "
                "output_dir",
                file=self.root,
            )

    def prepare(self, log: TaskLog, *, spilled: bool = False) -> dict[str, TaskRecord]:
        """Remove the uncommitted files of an interrupted run of the same import.

        Where the lock is shared nothing is removed: it may belong to another process.

        Args:
            log: of the import.
            spilled: keep the spilled rows, which the import goes on from.

        Returns:
            The records of the tasks that the run committed, by name.

        Raises:
            DataError: the folder holds committed work of another import, which is never deleted
                automatically.
            IntegrityError: a committed shard has been damaged since.
        """
        commits = self.root / "commits"
        stages = [path.name for path in commits.iterdir()] if commits.exists() else []
        # Records of `sample` are the input of this import, not work of another import.
        others = sorted(n for n in stages if n != log.stage and not n.startswith(SAMPLING_STAGES))
        if others:
            raise DataError(
                "the output folder is empty, or holds work of an interrupted run of this import",
                received=f"committed work of {', '.join(others)}, which has other inputs, settings "
                "or another tokenizer, or is of an earlier import version",
                remedy="run that import again, choose another output_dir, or remove the folder",
                file=self.root,
            )
        if self.shared:
            return {}
        tasks = sorted(log.folder.glob("*.json")) if log.folder.exists() else []
        found = {task.stem: log.committed(task.stem) for task in tasks}
        records = {task: record for task, record in found.items() if record is not None}
        keep = {entry.path for record in records.values() for entry in record.entries()}
        self._sweep(keep, spilled=spilled)
        return records

    def discard(self, stage: str) -> None:
        """Remove the commit records and shards of `stage`, and the folders left empty."""
        shutil.rmtree(self.root / "commits" / stage, ignore_errors=True)
        self._sweep(set())
        (self.root / IMPORT_REPORT).unlink(missing_ok=True)
        for name in ("commits", *_WRITTEN):
            _remove_empty(self.root / name)

    def _sweep(self, keep: set[str], *, spilled: bool = False) -> None:
        if not spilled:
            self.remove_spill()
        written = {p for name in _WRITTEN for p in (self.root / name).rglob("*")}
        records = (self.root / "commits").rglob("*")
        for path in sorted([*self.root.iterdir(), *records, *written]):
            shard = path in written and _SHARD.match(path.name)
            if shard and str(path.relative_to(self.root)) in keep:
                continue
            if path.is_file() and (shard or _TEMPORARY.match(path.name)):
                found = path_within(self.root, str(path.relative_to(self.root)))
                if shard:
                    found.unlink()
                else:
                    remove_if_abandoned(found)

    def remove_spill(self) -> None:
        """Remove the spilled rows."""
        shutil.rmtree(self.root / ".spill", ignore_errors=True)


def _remove_empty(folder: Path) -> None:
    if not folder.is_dir() or folder.is_symlink():
        return
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    if not any(folder.iterdir()):
        folder.rmdir()
