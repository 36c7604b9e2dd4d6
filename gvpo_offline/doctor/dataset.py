"""What is left over in the folder of a dataset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gvpo_offline.doctor.finding import Finding
from gvpo_offline.errors import GVPOError
from gvpo_offline.files import is_held
from gvpo_offline.store.commit import TaskRecord, read_record
from gvpo_offline.store.leftovers import (
    PULLED,
    SPILL,
    commit_records,
    orphans,
    temporary_files,
)
from gvpo_offline.store.manifest import (
    Manifest,
    load_manifest,
    manifest_path,
    manifest_versions,
)

# Their records are the input of an import into the same folder.
_SAMPLING = ("prompts-", "sample-")
_PUBLISHED = ("groups/", "rewards/", "reference/", "incomplete/")


def is_dataset(root: Path) -> bool:
    """Whether a folder holds a dataset, or what was begun of one."""
    return bool(manifest_versions(root)) or any((root / n).is_dir() for n in ("commits", PULLED))


def dataset_findings(root: Path) -> list[Finding]:
    """Everything that is left over, cut off or damaged; contents of data files are not read."""
    manifests, damaged = _manifests(root)
    records, broken = _records(root)
    found = [*damaged, *_missing(root, manifests), *broken]
    found += [
        Finding.of("temporary", path, "of a write that was cut off", removable=True)
        for path in temporary_files(root)
        if not is_held(path)
    ]
    for name, why in ((SPILL, "rows"), (PULLED, "downloads, with which `pull` goes on")):
        if (root / name).is_dir():
            found.append(
                Finding.of(
                    "spill", root / name, f"of a command that was cut off: {why}", removable=True
                )
            )
    # What a damaged manifest or record names is not known.
    if not damaged and not broken:
        why = "no manifest and no commit record names it"
        found += [Finding.of("orphan", path, why, removable=True) for path in orphans(root)]
    return [*found, *_unfinished(root, manifests, records)]


def _manifests(root: Path) -> tuple[list[Manifest], list[Finding]]:
    found, damaged = [], []
    for version in manifest_versions(root):
        try:
            found.append(load_manifest(root, version))
        except (GVPOError, OSError) as error:
            path = manifest_path(root, version)
            why = f"{_first(error)} Restore it from a copy"
            damaged.append(Finding.of("manifest", path, why, removable=False))
    return found, damaged


def _missing(root: Path, manifests: list[Manifest]) -> Iterator[Finding]:
    entries = {entry.path: entry for own in manifests for entry in own.files()}
    for name, entry in sorted(entries.items()):
        path = root / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry.bytes:
            held = "no such file" if size is None else f"{size:,} bytes"
            why = f"a manifest names {entry.bytes:,} bytes; here: {held}. Restore it from a copy"
            yield Finding("missing", path, why, removable=False, bytes=size or 0)


def _records(root: Path) -> tuple[dict[Path, TaskRecord], list[Finding]]:
    good, broken = {}, []
    for path in commit_records(root):
        try:
            record = read_record(path)
            why = _fault(root, record)
        except GVPOError as error:
            why = f"{error.rule}; received {error.received}."
        except OSError as error:
            why = _first(error)
        if why:
            again = f"{why} Its task is done again after the removal"
            broken.append(Finding.of("record", path, again, removable=True))
        else:
            good[path] = record
    return good, broken


def _fault(root: Path, record: TaskRecord) -> str:
    """Why a record that can be read cannot be used; "" if it can."""
    for entry in record.entries():
        file = root / entry.path
        if not file.is_file() or file.stat().st_size != entry.bytes:
            return f"it names {entry.path}, which is missing or has another length."
    return ""


def _unfinished(
    root: Path, manifests: list[Manifest], records: dict[Path, TaskRecord]
) -> Iterator[Finding]:
    named = {entry.path for own in manifests for entry in own.files()}
    stages: dict[Path, int] = {}
    for path, record in records.items():
        paths = [entry.path for entry in record.entries()]
        sampled = record.stage.startswith(_SAMPLING)
        open_ = (
            not manifests
            if sampled
            else any(own.startswith(_PUBLISHED) and own not in named for own in paths)
        )
        if open_:
            stages[path.parent] = stages.get(path.parent, 0) + 1
    for folder, count in sorted(stages.items()):
        why = (
            f"{count:,} committed tasks that no version has yet; the same command goes on from them"
        )
        yield Finding.of("unfinished", folder, why, removable=False)


def _first(error: Exception) -> str:
    text = error.lines()[0] if isinstance(error, GVPOError) else str(error)
    return text if text.endswith(".") else f"{text}."
