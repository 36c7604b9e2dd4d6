"""Where a dataset lies: a folder of this machine, or a URL; and how a URL is read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from gvpo_offline.errors import ConfigError

# Also chained file systems, as fsspec writes them: `zip::s3://…`.
_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z][A-Za-z0-9+.-]*)*://")
_FILE = "file://"


@dataclass
class RemoteSettings:
    """How datasets at a URL are read. Local ones take no notice."""

    cache_dir: str | None = None
    """Folder of the cache, for datasets of any number and processes of any number. Default: the
    environment's GVPO_OFFLINE_CACHE, or ~/.cache/gvpo_offline."""
    cache_gb: float = 50.0
    """What the cache may hold, in gigabytes (10^9 bytes). 0: no cache."""
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)
    """Options of the fsspec file system, such as endpoint_url for s3. Credentials are better left
    to the environment; what stands here is not written to the run's files."""
    timeout: float = 60.0
    """Seconds that a request for at most 8 MB may take before it is made again."""
    attempts: int = 6
    """Times that a request is made, with growing pauses, before the run stops."""

    def __post_init__(self) -> None:
        if not self.cache_gb >= 0:
            raise ConfigError("remote.cache_gb is not negative", received=self.cache_gb)
        for name in ("timeout", "attempts"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"remote.{name} is positive", received=getattr(self, name))


def is_url(path: str | Path) -> bool:
    """Whether a path is a URL that only a remote file system can read; `file://` is not."""
    return isinstance(path, str) and bool(_URL.match(path)) and not path.startswith(_FILE)


def local_path(path: str | Path) -> Path:
    """The path of a local file or folder; `file://` is understood."""
    if isinstance(path, str) and path.startswith(_FILE):
        return Path(unquote(urlsplit(path).path))
    return Path(path)


def local_folder(setting: str, path: str | Path) -> Path:
    """The path of a folder that a command writes into.

    Raises:
        ConfigError: it is a URL.
    """
    if is_url(path):
        raise ConfigError(
            f"{setting} is a local folder: a dataset at a URL is read, never written",
            received=path,
            remedy="copy the dataset to this machine, work on it there, and copy it back; train, "
            "evaluate and validate take the URL as it is",
        )
    return local_path(path)
