"""Settings of `gvpo-offline doctor`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gvpo_offline.errors import ConfigError
from gvpo_offline.ranges import check_ranges
from gvpo_offline.settings import required
from gvpo_offline.store.location import RemoteSettings


@dataclass
class DoctorConfig:
    """List what is left over, cut off or damaged in the folder of a dataset or a run."""

    path: str = ""
    """The folder of a dataset, its s3:// URL, or the folder of a run (output_dir). It can
    also be given without the flag: `gvpo-offline doctor data`."""
    remove: bool = False
    """Remove what nothing needs: temporary files, orphans, checkpoints that were cut off, and
    commit records that cannot be used; in a bucket also multipart uploads that were cut off.
    Refused while a process works in the folder, or a writer holds the lease of the bucket's
    dataset."""
    format: Literal["text", "json"] = "text"
    """How findings are printed: lines for people, or one JSON object."""

    remote: RemoteSettings = field(default_factory=RemoteSettings)
    """Options of the file system, timeout and attempts of requests to a bucket."""
    lease_seconds: float = 120.0
    """Seconds after which another writer may take over the lease of a removal that was killed."""

    def __post_init__(self) -> None:
        required("path", self.path)
        check_ranges(self)
        if self.format not in ("text", "json"):
            raise ConfigError("format is text or json", received=self.format)
