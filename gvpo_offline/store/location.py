"""Locations of datasets: local paths and URLs, and the settings for reading URLs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from gvpo_offline.errors import ConfigError
from gvpo_offline.ranges import check_ranges

# Chained fsspec file systems as well: `zip::s3://…`.
_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z][A-Za-z0-9+.-]*)*://")
_FILE = "file://"
# Local folders that stand for URLs while a command writes to them; see `buckets`.
_WORKING_COPIES: dict[str, Path] = {}


@dataclass
class RemoteSettings:
    """How datasets at a URL are read; without effect on local ones."""

    cache_dir: str | None = None
    """Folder of the cache, shared by all datasets and processes. Default: the environment variable
    GVPO_OFFLINE_CACHE, or ~/.cache/gvpo_offline."""
    cache_gb: float = 50.0
    """Size limit of the cache in gigabytes (10^9 bytes). 0: no cache."""
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)
    """Options of the fsspec file system, such as endpoint_url for s3. Values are not written to the
    run's files; credentials are better set in the environment."""
    timeout: float = 60.0
    """Timeout in seconds of a request for at most 8 MB; the request is then retried."""
    attempts: int = 6
    """Attempts per request, with growing pauses, before the run stops."""
    redirects: Literal["same", "any"] = "same"
    """Redirects of http servers to follow. same: to the same host, port and scheme; another one is
    an error. any: everywhere, as a server of signed URLs needs it; headers of storage_options, save
    Authorization, then go to every server."""

    def __post_init__(self) -> None:
        if not self.cache_gb >= 0:
            raise ConfigError("remote.cache_gb is not negative", received=self.cache_gb)
        for name in ("timeout", "attempts"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"remote.{name} is positive", received=getattr(self, name))
        check_ranges(self, "remote.")


def is_url(path: str | Path) -> bool:
    """Whether a path is a URL of a remote file system.

    `file://` is not, nor is a URL while this process has a working copy of it.
    """
    if not isinstance(path, str) or not _URL.match(path) or path.startswith(_FILE):
        return False
    return path.rstrip("/") not in _WORKING_COPIES


@contextmanager
def standing_for(url: str, folder: Path) -> Iterator[None]:
    """Let `local_path` give `folder` for `url` until the block ends, in this process."""
    name = url.rstrip("/")
    before = _WORKING_COPIES.get(name)
    _WORKING_COPIES[name] = folder
    try:
        yield
    finally:
        del _WORKING_COPIES[name]
        if before is not None:
            _WORKING_COPIES[name] = before


def local_path(path: str | Path) -> Path:
    """The path of a local file or folder: of a path, a `file://` URL, or a working copy's URL."""
    if isinstance(path, str) and path.rstrip("/") in _WORKING_COPIES:
        return _WORKING_COPIES[path.rstrip("/")]
    if isinstance(path, str) and path.startswith(_FILE):
        return Path(unquote(urlsplit(path).path))
    return Path(path)


def local_folder(setting: str, path: str | Path) -> Path:
    """The path of a local folder that a command writes to.

    Raises:
        ConfigError: it is a URL.
    """
    if is_url(path):
        raise ConfigError(
            f"{setting} is a local folder: a dataset at a URL is read, never written to directly",
            received=path,
            remedy="for s3://, use the command line or `gvpo_offline.buckets.copy.working_copy`; "
            "else copy the dataset to this machine, work on it there, and copy it back; train, "
            "evaluate and validate take the URL as it is",
        )
    return local_path(path)
