"""The files under a URL: byte ranges of them, asked for again where the network fails.

Any thread may read, and several at once. The object crosses process borders, forks included: what
fsspec runs in the background does not survive one, so each process makes its own.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gvpo_offline.errors import ConfigError, StorageError
from gvpo_offline.store.location import RemoteSettings
from gvpo_offline.store.remote.ranges import Range

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")

CONNECTIONS = 16
_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 30.0
# Of its own: ranks that were given one seed would all come back at once.
_CHANCE = random.SystemRandom()
_PASSING_STATUS = {408, 425, 429}
_FINAL_ERRNO = {errno.EINVAL, errno.EACCES, errno.EPERM}
# botocore would try again by itself, several times within each of our attempts.
_SINGLE_ATTEMPT = {"config_kwargs": {"retries": {"total_max_attempts": 1, "mode": "standard"}}}
_DEFAULT_OPTIONS: dict[str, dict[str, Any]] = {"s3": _SINGLE_ATTEMPT, "s3a": _SINGLE_ATTEMPT}


@dataclass
class Traffic:
    """What went over the network, and what did not have to, in this process.

    Attributes:
        requests: requests that were made, each attempt counted.
        retries: how many of them were made again.
        fetched_bytes: bytes of their answers, as far as those were whole.
        cached_bytes: bytes that came from the cache instead.
        damaged_entries: entries of the cache that were found damaged and dropped.
    """

    requests: int = 0
    retries: int = 0
    fetched_bytes: int = 0
    cached_bytes: int = 0
    damaged_entries: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **counts: int) -> None:
        """Count; any thread may."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)


class RefusedError(StorageError):
    """A server that says no, and would say it again."""


class _ShortBodyError(OSError):
    """A body that ended early."""


class _Live:
    """What one process needs to make requests."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self.pid = os.getpid()
        self.fs, self.root = _file_system(url, options)
        self.pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="gvpo-remote")
        self.traffic = Traffic()
        self.reached = False  # some options are only looked at with the first request
        self.locks: dict[str, threading.Lock] = {}


class RemoteFolder:
    """A folder at a URL.

    Args:
        url: of the folder.
        settings: patience and the options of the file system.

    Raises:
        ConfigError: no file system reads this URL, or not with these options.
    """

    def __init__(self, url: str, settings: RemoteSettings) -> None:
        self.url = _checked(url)
        self._settings = settings
        self._process: _Live | None = _Live(self.url, settings.storage_options)

    @property
    def _live(self) -> _Live:
        # Two threads may both make one after a fork; one of the two is then forgotten.
        if self._process is None or self._process.pid != os.getpid():
            self._process = _Live(self.url, self._settings.storage_options)
        return self._process

    @property
    def traffic(self) -> Traffic:
        """Counts of this process."""
        return self._live.traffic

    @property
    def lists(self) -> bool:
        """Whether the file system can say which files there are."""
        return not self.url.startswith(("http://", "https://"))

    def lock(self, path: str) -> threading.Lock:
        """A lock of a file, for threads that would otherwise fetch the same."""
        return self._live.locks.setdefault(path, threading.Lock())

    def url_of(self, path: str) -> str:
        """The URL of a file of the folder."""
        return f"{self.url}/{path}"

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file.

        Raises:
            FileNotFoundError: there is no such file.
            StorageError: it cannot be read, for good or after all attempts.
        """
        return self._patiently(path, lambda live: self._range(live, path, start, stop))

    def read_whole(self, path: str) -> bytes:
        """A small file whole; as `read`."""

        def read(live: _Live) -> bytes:
            data = self._cat(live, path)
            live.traffic.add(fetched_bytes=len(data))
            return data

        return self._patiently(path, read)

    def size(self, path: str) -> int | None:
        """Length of a file in bytes, or None where the server does not say; as `read`."""
        return self._patiently(path, lambda live: self._size(live, path))

    def size_at_once(self, path: str) -> int | None:
        """As `size`, asked once; None where there is no answer either."""
        try:
            self._live.fs.invalidate_cache()
            return self._size(self._live, path)
        except Exception:
            return None

    def _size(self, live: _Live, path: str) -> int | None:
        try:
            found = self._run(live, "info", f"{live.root}/{path}").get("size")
        except FileNotFoundError as error:
            # fsspec's http says so whatever went wrong.
            cause = error.__cause__
            if self.lists or cause is None or isinstance(cause, FileNotFoundError):
                raise
            raise cause from None
        return None if found is None else int(found)

    def names(self) -> list[str]:
        """Names of the files and folders right under the URL; none where it does not exist.

        Of http the links of the folder's index page, if it has one.
        """

        def names(live: _Live) -> list[str]:
            live.fs.invalidate_cache()
            folder = live.root if self.lists else f"{live.root}/"
            entries = self._run(live, "ls", folder, detail=False)
            return [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries]

        try:
            return self._patiently("", names)
        except FileNotFoundError:
            return []

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`function` of each item, several at once; `function` itself must not call `map`."""
        return list(self._live.pool.map(function, items))

    def read_ranges(self, path: str, ranges: list[Range]) -> list[bytes]:
        """Several ranges of a file at once; as `read`."""
        if len(ranges) == 1:
            return [self.read(path, *ranges[0])]
        return self.map(lambda span: self.read(path, *span), ranges)

    def _range(self, live: _Live, path: str, start: int, stop: int) -> bytes:
        data = self._cat(live, path, start=start, end=stop)
        if len(data) > stop - start:
            raise StorageError(
                "the server gives byte ranges of a file",
                received=f"{len(data)} bytes where {stop - start} were asked for",
                remedy="serve the dataset from one that does, or download it first",
                file=self.url_of(path),
            )
        if len(data) < stop - start:
            raise _ShortBodyError(f"{len(data)} of {stop - start} bytes arrived")
        live.traffic.add(fetched_bytes=len(data))
        return data

    def _cat(self, live: _Live, path: str, **limits: int) -> bytes:
        if not live.fs.async_impl:
            limits["cache_type"] = "none"  # type: ignore[assignment] # no read-ahead of its own
        live.traffic.add(requests=1)
        return bytes(self._run(live, "cat_file", f"{live.root}/{path}", **limits))

    def _run(self, live: _Live, method: str, *args: Any, **keywords: Any) -> Any:
        """Call a method of the file system; one that is asynchronous is cut off at the timeout."""
        if not live.fs.async_impl:
            return getattr(live.fs, method)(*args, **keywords)
        from fsspec.asyn import sync

        call = getattr(live.fs, f"_{method}")
        return sync(live.fs.loop, call, *args, timeout=self._settings.timeout, **keywords)

    def _patiently(self, path: str, call: Callable[[_Live], Result]) -> Result:
        url = self.url_of(path) if path else self.url
        failure: Exception | None = None
        for attempt in range(self._settings.attempts):
            live = self._live
            if attempt:
                wait = min(_FIRST_WAIT_SECONDS * 2 ** (attempt - 1), _LONGEST_WAIT_SECONDS)
                logger.info("%s: %s; asking again", url, _said(failure))
                time.sleep(wait * _CHANCE.uniform(0.5, 1.0))
                live.traffic.add(retries=1)
            try:
                result = call(live)
            except Exception as error:
                _raise_if_final(error, url)
                if isinstance(error, TypeError | ValueError) and not live.reached:
                    raise _bad_options(url, error) from error
                failure = error
            else:
                live.reached = True
                return result
        raise StorageError(
            "a file of the dataset can be read",
            received=f"{_said(failure)}, at the last of {self._settings.attempts} attempts",
            remedy="run the same command again when the network and the server are well; "
            "remote.attempts and remote.timeout decide how patient a run is",
            file=url,
        ) from failure

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None}


def _checked(url: str) -> str:
    """The URL without its last slash, if it can be the folder of a dataset."""
    rest = url.split("://", 1)[1]
    if "@" in rest.split("/", 1)[0]:
        raise ConfigError(
            "a dataset's URL holds no credentials, since it is written to logs and caches",
            received=url.split("://", 1)[0] + "://…@…",
            remedy="set them in the environment, or in remote.storage_options",
        )
    if "?" in rest or "#" in rest:
        raise ConfigError(
            "a dataset's URL is that of a folder, to which the names of files are added",
            received=url.split("?", 1)[0] + "?…" if "?" in rest else url,
            remedy="leave out what follows ? and #; for signed URLs download the dataset first",
        )
    return url.rstrip("/")


def _file_system(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the folder's path within it."""
    import fsspec

    defaults = _DEFAULT_OPTIONS.get(url.split("://", 1)[0], {})
    try:
        fs, root = fsspec.core.url_to_fs(url, **{**defaults, **options})
    except ImportError as error:
        raise ConfigError(
            "a dataset's URL is one that an installed file system of fsspec reads",
            received=f"{url}: {error}",
            remedy='install it: for s3:// pip install "gvpo-offline[s3]", for gs:// gcsfs',
        ) from error
    except (ValueError, TypeError) as error:
        raise _bad_options(url, error) from error
    return fs, str(root).rstrip("/")


def _raise_if_final(error: Exception, url: str) -> None:
    """Raise what no further attempt would mend."""
    if isinstance(error, StorageError | FileNotFoundError):
        raise error
    status = getattr(error, "status", None) or getattr(
        getattr(error, "response", None), "status_code", None
    )
    if status == 404:
        raise FileNotFoundError(url) from error
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_STATUS
    forbidden = isinstance(error, PermissionError) or getattr(error, "errno", 0) in _FINAL_ERRNO
    if refused or forbidden or "Credential" in type(error).__name__:
        raise RefusedError(
            "the server lets this machine read the dataset",
            received=_said(error),
            remedy="check the URL and the credentials, in the environment or in "
            "remote.storage_options",
            file=url,
        ) from error


def _bad_options(url: str, error: Exception) -> ConfigError:
    return ConfigError(
        "fsspec knows the URL's protocol and the options in remote.storage_options",
        received=f"{url}: {_said(error)}",
        remedy="correct the URL or the options",
    )


def _said(error: Exception | None) -> str:
    """An error in a few words; many of the network's have no text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
