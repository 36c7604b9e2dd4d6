"""Settings of `gvpo-offline doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gvpo_offline.errors import ConfigError
from gvpo_offline.settings import required


@dataclass
class DoctorConfig:
    """List what is left over, cut off or damaged in the folder of a dataset or a run."""

    path: str = ""
    """The folder of a dataset, or of a run (output_dir). It can also be given without the flag:
    `gvpo-offline doctor data`."""
    remove: bool = False
    """Remove what nothing needs: temporary files, orphans, checkpoints that were cut off, and
    commit records that cannot be used. Refused while a process works in the folder."""
    format: Literal["text", "json"] = "text"
    """How findings are printed: lines for people, or one JSON object."""

    def __post_init__(self) -> None:
        required("path", self.path)
        if self.format not in ("text", "json"):
            raise ConfigError("format is text or json", received=self.format)
