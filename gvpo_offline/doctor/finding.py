"""What the doctor finds: one record per file or folder."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal[
    "temporary",
    "upload",
    "spill",
    "orphan",
    "record",
    "unfinished",
    "missing",
    "manifest",
    "checkpoint",
]
Of = Literal["dataset", "run"]


@dataclass(frozen=True)
class Finding:
    """A file or folder that is left over, cut off or damaged.

    Attributes:
        kind: temporary: a write that did not end. upload: a multipart upload to a bucket that did
            not end. spill: rows or downloads of a command that did
            not end. orphan: a file that no manifest and no commit record names. record: a commit
            record that cannot be used. unfinished: committed work of a stage that published
            nothing yet. missing: a file that a manifest names is not there, or has another length.
            manifest: one that cannot be read. checkpoint: one that was cut off or is damaged.
        path: the file or folder.
        why: what is wrong with it, or what it is, in words.
        removable: whether nothing needs it.
        bytes: its length, or that of a folder's files.
    """

    kind: Kind
    path: Path
    why: str
    removable: bool
    bytes: int = 0

    @classmethod
    def of(cls, kind: Kind, path: Path, why: str, *, removable: bool) -> Finding:
        """A finding, with the length of what lies at `path`."""
        return cls(kind, path, why, removable, _length(path))


@dataclass(frozen=True)
class Diagnosis:
    """The findings in one folder.

    Attributes:
        root: the folder.
        of: what it holds.
        busy: whether a process works in it.
        findings: in a fixed order.
        removed: what `remove` has removed.
        url: of a dataset in a bucket, whose `root` is bucket and prefix; "": a folder.
    """

    root: Path
    of: Of
    busy: bool
    findings: list[Finding]
    removed: list[Finding] = field(default_factory=list)
    url: str = ""

    @property
    def removable(self) -> list[Finding]:
        """The findings that `remove` would remove."""
        return [own for own in self.findings if own.removable]

    @property
    def damaged(self) -> bool:
        """Whether something is damaged or missing that no removal mends."""
        return any(not own.removable and own.kind != "unfinished" for own in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """As plain data, with paths relative to the folder."""
        return {
            "path": self.url or str(self.root),
            "of": self.of,
            "busy": self.busy,
            "findings": [self._plain(own) for own in self.findings],
            "removed": [self._plain(own) for own in self.removed],
        }

    def _plain(self, own: Finding) -> dict[str, Any]:
        return {
            "kind": own.kind,
            "path": os.path.relpath(own.path, self.root),
            "why": own.why,
            "removable": own.removable,
            "bytes": own.bytes,
        }


def remove(path: Path) -> None:
    """Remove a file, a link or a folder; nothing if it is gone.

    Raises:
        OSError: it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _length(path: Path) -> int:
    paths = [path]
    if path.is_dir() and not path.is_symlink():
        paths = [inner for inner in path.rglob("*") if not inner.is_dir()]
    return sum(own.lstat().st_size for own in paths if own.is_symlink() or own.exists())
