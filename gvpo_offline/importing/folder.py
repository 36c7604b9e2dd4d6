"""The output folder of an import: whose it is, what an earlier run left there, and cleaning up."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import TracebackType

from gvpo_offline.errors import DataError
from gvpo_offline.store.commit import TaskLog, TaskRecord, verify_file
from gvpo_offline.store.manifest import Manifest, load_manifest, manifest_versions
from gvpo_offline.store.writer import claim_folder, lock_folder

# Stages whose records share the folder with an import's, as `sample` names them.
SAMPLING_STAGES = ("prompts-", "sample-")

# Only files whose names this stage gives are ever removed.
_SHARD = re.compile(r"^\d{5}-[0-9a-f]{12}\.parquet$")
_TEMPORARY = re.compile(r"^\.(\d{5}|\d{5}\.json|manifest-\d{6}\.json)\.[0-9a-f]{32}\.tmp$")


class OutputFolder:
    """A folder that one import at a time works in.

    Entering claims and locks it (the lock goes with the process, however that ends); leaving
    removes it again if it was made here and is empty.

    Args:
        root: the folder.
        wait: whether to wait for another import there to end, instead of refusing.

    Raises:
        DataError: it holds something else, or another import is at work there.
    """

    def __init__(self, root: Path, *, wait: bool = False) -> None:
        self.root = root
        self._wait = wait
        self._made = False
        self._handle: int | None = None

    def __enter__(self) -> OutputFolder:
        self._made = not self.root.exists()
        claim_folder(self.root)
        self._handle = lock_folder(self.root, wait=self._wait)
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
        """The manifest if the folder holds the import `identity`, None if it holds no dataset.

        Raises:
            DataError: it holds another dataset.
            IntegrityError: a file of the dataset is missing or of another length.
        """
        if not manifest_versions(self.root):
            return None
        manifest = load_manifest(self.root)
        if not any(step.config.get("identity") == identity for step in manifest.lineage):
            raise DataError(
                "the output folder is empty, or holds this very import",
                received=f"a dataset of {manifest.n_groups} groups, made from other inputs, "
                "settings or another tokenizer",
                remedy="choose another output_dir, or remove the dataset first",
                file=self.root,
            )
        for entry in manifest.groups:
            verify_file(self.root, entry, content=False)
        for family in manifest.rewards:
            for sidecar in family.files:
                verify_file(self.root, sidecar.file, content=False)
        self._remove_spill()
        return manifest

    def prepare(self, log: TaskLog) -> dict[str, TaskRecord]:
        """Remove what a killed run of the same import left uncommitted.

        Returns:
            The records of its committed tasks, by name.

        Raises:
            DataError: another import was interrupted here; its work is not thrown away unasked.
            IntegrityError: a committed shard was damaged since.
        """
        commits = self.root / "commits"
        stages = [path.name for path in commits.iterdir()] if commits.exists() else []
        # What was sampled is this import's input, not another's work.
        others = sorted(n for n in stages if n != log.stage and not n.startswith(SAMPLING_STAGES))
        if others:
            raise DataError(
                "the output folder is empty, or holds what an interrupted run of this import left",
                received=f"committed work of {', '.join(others)}: other inputs, settings or "
                "another tokenizer",
                remedy="repeat that import, choose another output_dir, or remove the folder",
                file=self.root,
            )
        tasks = sorted(log.folder.glob("*.json")) if log.folder.exists() else []
        found = {task.stem: log.committed(task.stem) for task in tasks}
        records = {task: record for task, record in found.items() if record is not None}
        keep = [entry.path for record in records.values() for entry in record.groups]
        keep += [s.file.path for record in records.values() for s in record.sidecars]
        self._sweep(set(keep))
        return records

    def discard(self, stage: str) -> None:
        """Remove the commit records and shards of `stage`, and the folders left empty."""
        shutil.rmtree(self.root / "commits" / stage, ignore_errors=True)
        self._sweep(set())
        for name in ("commits", "groups", "rewards"):
            _remove_empty(self.root / name)

    def _sweep(self, keep: set[str]) -> None:
        self._remove_spill()
        written = {p for name in ("groups", "rewards") for p in (self.root / name).rglob("*")}
        records = (self.root / "commits").rglob("*")
        for path in sorted([*self.root.iterdir(), *records, *written]):
            shard = path in written and _SHARD.match(path.name)
            if shard and str(path.relative_to(self.root)) in keep:
                continue
            if path.is_file() and (shard or _TEMPORARY.match(path.name)):
                path.unlink()

    def _remove_spill(self) -> None:
        shutil.rmtree(self.root / ".spill", ignore_errors=True)


def _remove_empty(folder: Path) -> None:
    if not folder.is_dir():
        return
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    if not any(folder.iterdir()):
        folder.rmdir()
