"""Settings of `ls`."""

from __future__ import annotations

from dataclasses import dataclass, field

from gvpo_offline.errors import ConfigError
from gvpo_offline.settings import required


@dataclass
class ListConfig:
    """What datasets hold."""

    dataset: list[str] | str = field(default_factory=list)
    """Folders or URLs of datasets; `gvpo-offline ls data more` says the same. Several get a line
    each."""
    dataset_version: int | None = None
    """An older version of the dataset; null: the newest."""
    content: bool = False
    """Also read the summary columns of every group: responses per sampler, mean rewards, sizes and
    lengths. Without it, manifests are all that is read, however large the dataset."""
    json: bool = False
    """One JSON object per dataset and line, for programs."""

    def __post_init__(self) -> None:
        self.dataset = [self.dataset] if isinstance(self.dataset, str) else list(self.dataset)
        required("dataset", self.dataset)
        if self.dataset_version is not None and len(self.dataset) > 1:
            raise ConfigError(
                "dataset_version is a version of one dataset", received=", ".join(self.dataset)
            )
