"""Settings of commands that write to a bucket."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from gvpo_offline.ranges import check_ranges
from gvpo_offline.store.location import RemoteSettings

_DEFAULT_SPOOL = "~/.cache/gvpo_offline/spool"


@dataclass
class BucketSettings:
    """How a dataset at an s3:// URL is written; without effect on local folders."""

    remote: RemoteSettings = field(default_factory=RemoteSettings)
    """Options of the file system, timeout and attempts of requests to a bucket."""
    spool_dir: str | None = None
    """Folder of working copies of datasets in buckets. Default: the environment variable
    GVPO_OFFLINE_SPOOL, or ~/.cache/gvpo_offline/spool. Ray workers need one that all machines
    share."""
    spool_gb: float = 500.0
    """Bytes (in units of 10^9) that are downloaded for a working copy at most. A larger dataset is
    refused before anything is downloaded. What the command writes comes on top."""
    keep_spool: bool = False
    """Keep the working copy after the upload, so that the next command on this machine downloads
    only what it lacks."""
    lease_seconds: float = 120.0
    """Seconds after which another writer may take over the lease of a writer that was killed. The
    lease is renewed three times within them."""

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def folder(self) -> Path:
        """The folder of all working copies."""
        found = self.spool_dir or os.environ.get("GVPO_OFFLINE_SPOOL") or _DEFAULT_SPOOL
        return Path(found).expanduser().resolve()
