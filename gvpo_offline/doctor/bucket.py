"""Diagnosis of a dataset in a bucket, and the removal of what nothing needs."""

from __future__ import annotations

from pathlib import Path

from gvpo_offline.buckets.lease import Lease, lease_owner
from gvpo_offline.buckets.leftovers import Left, contents, left_over, remove
from gvpo_offline.buckets.objects import Objects
from gvpo_offline.doctor.finding import Diagnosis, Finding
from gvpo_offline.doctor.settings import DoctorConfig
from gvpo_offline.errors import DataError


def diagnose_bucket(config: DoctorConfig) -> Diagnosis:
    """Look at a dataset at an s3:// URL, and with `remove` remove what is left over.

    The removal holds the lease, so that no writer has begun what is removed.

    Raises:
        ConfigError: the URL is not one of S3, or its store ignores conditional puts.
        DataError: there is no dataset; or, with `remove`, a writer holds the lease.
        StorageError: the bucket cannot be read or written.
    """
    objects = Objects(config.path, config.remote)
    if not contents(objects).is_dataset and not objects.uploads():
        raise DataError(
            "the doctor looks at a dataset, in a folder or at an s3:// URL",
            received="a URL under which there is none",
            remedy="name the URL of a dataset; runs are in local folders",
            file=objects.url,
        )
    if not config.remove:
        return _diagnosis(objects, left_over(objects), busy=lease_owner(objects) is not None)
    removed: list[Left] = []
    with Lease(objects, config.lease_seconds) as lease:
        while doomed := [own for own in left_over(objects) if own.removable]:
            for own in doomed:
                lease.check()
                remove(objects, own)
            removed += doomed
            # Without a broken record, the files that it named may be orphans: look again.
            if not any(own.kind == "record" for own in doomed):
                break
        return _diagnosis(objects, left_over(objects), removed=removed)


def _diagnosis(
    objects: Objects, found: list[Left], *, busy: bool = False, removed: list[Left] | None = None
) -> Diagnosis:
    root = Path(objects.bucket) / objects.prefix

    def plain(own: Left) -> Finding:
        return Finding(own.kind, root / own.path, own.why, own.removable, own.bytes)

    return Diagnosis(
        root, "dataset", busy, [*map(plain, found)], [*map(plain, removed or [])], objects.url
    )
