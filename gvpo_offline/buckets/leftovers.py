"""What killed writers left of a dataset in a bucket, from listings and sealed files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from gvpo_offline.buckets.objects import Listed, Objects, Upload
from gvpo_offline.errors import GVPOError
from gvpo_offline.store.commit import TaskRecord, parse_record
from gvpo_offline.store.leftovers import COMMITS, FOLDERS
from gvpo_offline.store.manifest import Manifest, parse_manifest, version_of

Kind = Literal["upload", "orphan", "record", "unfinished", "missing", "manifest"]


@dataclass(frozen=True)
class Left:
    """One finding: as `doctor.finding.Finding`, with a path under the URL."""

    kind: Kind
    path: str
    why: str
    removable: bool
    bytes: int = 0
    upload: Upload | None = None


@dataclass
class Contents:
    """What lies under a URL: objects, manifests and records that can be read, and the others."""

    objects: dict[str, Listed]
    manifests: list[Manifest] = field(default_factory=list)
    records: dict[str, TaskRecord] = field(default_factory=dict)
    found: list[Left] = field(default_factory=list)

    @property
    def is_dataset(self) -> bool:
        """Whether it is a dataset, or what was begun of one."""
        return any(version_of(p) or p.split("/")[0] in (COMMITS, *FOLDERS) for p in self.objects)


def contents(objects: Objects) -> Contents:
    """Read the manifests and the commit records under a URL; data files are only listed.

    Raises:
        StorageError: the bucket cannot be read.
    """
    held = Contents(objects.listing())
    for path in sorted(held.objects):
        size = held.objects[path].bytes
        try:
            if version_of(path):
                content = objects.get(path).content
                held.manifests.append(parse_manifest(content, objects.url_of(path)))
            elif path.startswith(f"{COMMITS}/") and path.endswith(".json"):
                content = objects.get(path).content
                held.records[path] = record = parse_record(content, objects.url_of(path), path)
                if wrong := _fault(record, held.objects):
                    del held.records[path]
                    held.found.append(Left("record", path, wrong, removable=True, bytes=size))
        except FileNotFoundError:
            continue  # a writer has deleted it
        except GVPOError as error:
            mends = version_of(path) is None
            why = f"{error.rule}; received {error.received}."
            why += (
                " Its task is done again after the removal" if mends else " Restore it from a copy"
            )
            kind: Kind = "record" if mends else "manifest"
            held.found.append(Left(kind, path, why, removable=mends, bytes=size))
    return held


def left_over(objects: Objects) -> list[Left]:
    """Everything that is left over, cut off or damaged; contents of data files are not read."""
    held = contents(objects)
    return [*held.found, *_uploads(objects), *_missing(held), *_orphans(held), *_unfinished(held)]


def remove(objects: Objects, own: Left) -> None:
    """Delete an object, or abort an upload."""
    if own.upload is not None:
        objects.abort(own.upload)
    else:
        objects.delete(own.path)


def _fault(record: TaskRecord, listed: dict[str, Listed]) -> str:
    for entry in record.entries():
        if entry.path not in listed or listed[entry.path].bytes != entry.bytes:
            return (
                f"it names {entry.path}, which is missing or has another length. Its task is done "
                "again after the removal"
            )
    return ""


def _uploads(objects: Objects) -> Iterator[Left]:
    for own in objects.uploads():
        why = "a multipart upload that was cut off; its parts are stored, and are not listed"
        yield Left("upload", own.path, why, removable=True, upload=own)


def _missing(held: Contents) -> Iterator[Left]:
    entries = {entry.path: entry for own in held.manifests for entry in own.files()}
    for path, entry in sorted(entries.items()):
        size = held.objects[path].bytes if path in held.objects else None
        if size != entry.bytes:
            here = "no such object" if size is None else f"{size:,} bytes"
            why = f"a manifest names {entry.bytes:,} bytes; here: {here}. Restore it from a copy"
            yield Left("missing", path, why, removable=False, bytes=size or 0)


def _orphans(held: Contents) -> Iterator[Left]:
    if any(own.kind in ("manifest", "record") for own in held.found):
        return  # what a damaged one names is not known
    named = {entry.path for own in held.manifests for entry in own.files()}
    named |= {entry.path for own in held.records.values() for entry in own.entries()}
    for path in sorted(held.objects):
        if path.endswith(".parquet") and path.split("/")[0] in FOLDERS and path not in named:
            why = "no manifest and no commit record names it"
            yield Left("orphan", path, why, removable=True, bytes=held.objects[path].bytes)


def _unfinished(held: Contents) -> Iterator[Left]:
    named = {entry.path for own in held.manifests for entry in own.files()}
    stages: dict[str, int] = {}
    for path, record in held.records.items():
        sampled = record.stage.startswith(("prompts-", "sample-"))
        paths = [e.path for e in record.entries() if e.path.split("/")[0] in _PUBLISHED]
        if not held.manifests if sampled else any(own not in named for own in paths):
            stage = path.rpartition("/")[0]
            stages[stage] = stages.get(stage, 0) + 1
    for stage, count in sorted(stages.items()):
        why = (
            f"{count:,} committed tasks that no version has yet; the same command goes on from them"
        )
        yield Left("unfinished", stage, why, removable=False)


_PUBLISHED = ("groups", "rewards", "reference", "incomplete")
