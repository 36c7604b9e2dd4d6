"""Byte ranges of the files under a URL, with timeouts and retries.

Any thread may read, and several at once. The object survives pickling and forks: each process opens
its own fsspec file system, because the threads that run its event loop do not survive a fork.
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
from gvpo_offline.store.remote.redirects import client_at_one_server

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")

CONNECTIONS = 16
_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 30.0
# Independent of the training seed: ranks with one seed would all retry at the same moment.
_JITTER = random.SystemRandom()
_RETRIED_STATUS = {408, 425, 429}
_FINAL_ERRNO = {errno.EINVAL, errno.EACCES, errno.EPERM}
# Without this botocore retries too, several times within each of our attempts.
_SINGLE_ATTEMPT = {"config_kwargs": {"retries": {"total_max_attempts": 1, "mode": "standard"}}}
_DEFAULT_OPTIONS: dict[str, dict[str, Any]] = {"s3": _SINGLE_ATTEMPT, "s3a": _SINGLE_ATTEMPT}


@dataclass
class Traffic:
    """Counts of one process.

    Attributes:
        requests: requests for file contents, each attempt counted.
        retries: attempts after the first.
        fetched_bytes: bytes of complete response bodies.
        cached_bytes: bytes read from the cache.
        damaged_entries: damaged cache entries that were deleted.
    """

    requests: int = 0
    retries: int = 0
    fetched_bytes: int = 0
    cached_bytes: int = 0
    damaged_entries: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **counts: int) -> None:
        """Add to some of the counts; thread-safe."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)


class RefusedError(StorageError):
    """The server refuses the request, and would refuse it again."""


class _ProcessState:
    """The file system, threads, locks and counts of one process; none of them survives a fork."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self.pid = os.getpid()
        self.fs, self.root = _file_system(url, options)
        self.pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="gvpo-remote")
        self.traffic = Traffic()
        self.locks: dict[str, threading.Lock] = {}
        self.succeeded = False  # some options are only checked by the first request


class RemoteFolder:
    """A folder at a URL.

    Every method that makes a request raises FileNotFoundError if there is no such file, and
    StorageError if the server refuses, or the last attempt fails.

    Args:
        url: of the folder.
        settings: timeout, attempts and the options of the file system.

    Raises:
        ConfigError: no installed file system reads this URL with these options.
    """

    def __init__(self, url: str, settings: RemoteSettings) -> None:
        self.url = _checked(url)
        self._settings = settings
        self._options = dict(settings.storage_options)
        if settings.redirects == "same" and not self.lists:
            self._options.setdefault("get_client", client_at_one_server)
        self._own: _ProcessState | None = _ProcessState(self.url, self._options)

    @property
    def _state(self) -> _ProcessState:
        # After a fork two threads may each create one; one of the two is then discarded.
        if self._own is None or self._own.pid != os.getpid():
            self._own = _ProcessState(self.url, self._options)
        return self._own

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_own": None}

    @property
    def traffic(self) -> Traffic:
        """Counts of this process."""
        return self._state.traffic

    @property
    def lists(self) -> bool:
        """Whether the file system can list a folder; plain http cannot."""
        return not self.url.startswith(("http://", "https://"))

    def lock(self, path: str) -> threading.Lock:
        """A lock per file, so that threads do not fetch the same bytes twice."""
        return self._state.locks.setdefault(path, threading.Lock())

    def url_of(self, path: str) -> str:
        """The URL of a file of the folder; of the folder itself for ``""``."""
        return f"{self.url}/{path}" if path else self.url

    def read(self, path: str, span: Range | None = None) -> bytes:
        """One byte range of a file, or the whole file."""

        def read(state: _ProcessState) -> bytes:
            options = {} if span is None else {"start": span[0], "end": span[1]}
            if not state.fs.async_impl:
                options["cache_type"] = "none"  # type: ignore[assignment] # no read-ahead
            state.traffic.add(requests=1)
            data = bytes(self._call(state, "cat_file", path, **options))
            if span is not None and len(data) > span[1] - span[0]:
                raise StorageError(
                    "the server supports byte ranges",
                    received=f"{len(data)} bytes where {span[1] - span[0]} were requested",
                    remedy="serve the dataset from a server that does, or download it first",
                    file=self.url_of(path),
                )
            if span is not None and len(data) < span[1] - span[0]:
                raise OSError(f"{len(data)} of {span[1] - span[0]} bytes arrived")
            state.traffic.add(fetched_bytes=len(data))
            return data

        return self._retried(path, read)

    def read_ranges(self, path: str, spans: list[Range]) -> list[bytes]:
        """Several byte ranges of a file, requested in parallel."""
        if len(spans) == 1:  # without a thread, so that `map` may call this method
            return [self.read(path, spans[0])]
        return self.map(lambda span: self.read(path, span), spans)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`function` of each item, in parallel; `function` must not call `map` itself."""
        return list(self._state.pool.map(function, items))

    def size(self, path: str, *, recheck: bool = False) -> int | None:
        """Length of a file in bytes; None where the server does not say.

        Args:
            path: of the file.
            recheck: make one attempt, past the file system's own cache of listings.
        """

        def size(state: _ProcessState) -> int | None:
            if recheck:
                state.fs.invalidate_cache()
            found = self._call(state, "info", path).get("size")
            return None if found is None else int(found)

        return self._retried(path, size, attempts=1 if recheck else None)

    def names(self) -> list[str]:
        """Names of the folder's files and subfolders; empty if it does not exist.

        Over http: the links of the folder's index page.
        """

        def names(state: _ProcessState) -> list[str]:
            state.fs.invalidate_cache()
            entries = self._call(state, "ls", "", detail=False)
            return [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries]

        try:
            return self._retried("", names)
        except FileNotFoundError:
            return []

    def _call(self, state: _ProcessState, method: str, path: str, **keywords: Any) -> Any:
        """Call a method of the file system; asynchronous ones are cancelled at the timeout."""
        full = f"{state.root}/{path}" if path or not self.lists else state.root
        if not state.fs.async_impl:
            return getattr(state.fs, method)(full, **keywords)
        from fsspec.asyn import sync

        # Not through the synchronous methods: some file systems define them without a timeout.
        call = getattr(state.fs, f"_{method}")
        return sync(state.fs.loop, call, full, timeout=self._settings.timeout, **keywords)

    def _retried(
        self, path: str, call: Callable[[_ProcessState], Result], attempts: int | None = None
    ) -> Result:
        attempts = attempts or self._settings.attempts
        url = self.url_of(path)
        failure: Exception | None = None
        for attempt in range(attempts):
            state = self._state
            if attempt:
                wait = min(_FIRST_WAIT_SECONDS * 2 ** (attempt - 1), _LONGEST_WAIT_SECONDS)
                logger.info("%s: %s; trying again", url, _described(failure))
                time.sleep(wait * _JITTER.uniform(0.5, 1.0))
                state.traffic.add(retries=1)
            try:
                result = call(state)
            except Exception as error:
                failure = self._cause(error)
                _raise_if_final(failure, url)
                if isinstance(failure, TypeError | ValueError) and not state.succeeded:
                    raise _bad_options(url, failure) from failure
            else:
                state.succeeded = True
                return result
        raise StorageError(
            "a file of the dataset can be read",
            received=f"{_described(failure)}, at the last of {attempts} attempts",
            remedy="run the same command again when network and server work; remote.attempts and "
            "remote.timeout set how often and how long a request is tried",
            file=url,
        ) from failure

    def _cause(self, error: Exception) -> Exception:
        """The error behind fsspec's http `info`, which raises FileNotFoundError for every one."""
        hidden = isinstance(error, FileNotFoundError) and not self.lists
        return error.__cause__ if hidden and isinstance(error.__cause__, Exception) else error


def _checked(url: str) -> str:
    """The URL without a trailing slash; ConfigError if it cannot be the folder of a dataset."""
    rest = url.split("://", 1)[1]
    if "@" in rest.split("/", 1)[0]:
        raise ConfigError(
            "a dataset's URL holds no credentials, since it is written to logs and run files",
            received=url.split("://", 1)[0] + "://…@…",
            remedy="set them in the environment, or in remote.storage_options",
        )
    if "?" in rest or "#" in rest:
        raise ConfigError(
            "a dataset's URL is that of a folder, to which file names are appended",
            received=url.split("?", 1)[0] + "?…" if "?" in rest else url,
            remedy="remove the part from ? or # on; with signed URLs, download the dataset first",
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
            "an installed fsspec file system reads the dataset's URL",
            received=f"{url}: {error}",
            remedy='install it: for s3:// pip install "gvpo-offline[s3]", for gs:// gcsfs',
        ) from error
    except (ValueError, TypeError) as error:
        raise _bad_options(url, error) from error
    return fs, str(root).rstrip("/")


def _raise_if_final(error: Exception, url: str) -> None:
    """Raise if another attempt would fail in the same way."""
    if isinstance(error, StorageError | FileNotFoundError):
        raise error
    status = getattr(error, "status", None) or getattr(
        getattr(error, "response", None), "status_code", None
    )
    if status == 404:
        raise FileNotFoundError(url) from error
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _RETRIED_STATUS
    forbidden = isinstance(error, PermissionError) or getattr(error, "errno", 0) in _FINAL_ERRNO
    if refused or forbidden or "Credential" in type(error).__name__:
        raise RefusedError(
            "the server allows this machine to read the dataset",
            received=_described(error),
            remedy="check the URL and the credentials, in the environment or in "
            "remote.storage_options",
            file=url,
        ) from error


def _bad_options(url: str, error: Exception) -> ConfigError:
    return ConfigError(
        "fsspec knows the URL's protocol and the options in remote.storage_options",
        received=f"{url}: {_described(error)}",
        remedy="correct the URL or the options",
    )


def _described(error: Exception | None) -> str:
    """Type and text of an error; many network errors have no text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
