"""The lease of a dataset in a bucket: one writer at a time; see the docstring of the room."""

from __future__ import annotations

import getpass
import json
import logging
import os
import socket
import threading
import time
import uuid
from types import TracebackType
from typing import Any

from gvpo_offline.buckets.objects import ConditionFailed, Got, Objects, without_conditions
from gvpo_offline.errors import DataError, GVPOError

LEASE = ".lease.json"
"""The lease's object, beside the manifests."""
_MARGIN_SECONDS = 2.0  # Date and Last-Modified are whole seconds
_RULE = "one writer at a time writes to a dataset in a bucket"
logger = logging.getLogger(__name__)


class Lease:
    """The lease of a dataset, held from `__enter__` to `__exit__` and renewed by a thread.

    Args:
        objects: of the dataset's URL.
        seconds: how long the lease holds after its last renewal.
        holder: id of what only the owner can hold on its machine (the lock of a working copy); a
            lease with the same id was left by a dead process, and is taken over at once. "": none.

    Raises:
        DataError: another writer holds it.
        ConfigError: the store ignores conditions.
        StorageError: the bucket cannot be read or written.
    """

    def __init__(self, objects: Objects, seconds: float, holder: str = "") -> None:
        self._objects = objects
        self._seconds = seconds
        self._holder = holder
        self._token = uuid.uuid4().hex
        self._count = 0
        self._etag = ""
        self._renewed = 0.0
        self._lost = False
        self._lock = threading.Lock()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="gvpo-lease", daemon=True)

    def __enter__(self) -> Lease:
        self._etag = self._acquired()
        self._test_conditions()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ends.set()
        self._thread.join()
        if self._lost:
            return
        try:
            self._objects.put(LEASE, self._body(released=True), IfMatch=self._etag)
        except (ConditionFailed, GVPOError) as failure:
            logger.warning(
                "%s: the lease could not be released, and ends by itself after %g seconds (%s)",
                self._objects.url_of(LEASE),
                self._seconds,
                type(failure).__name__,
            )

    def check(self) -> None:
        """Renew the lease, so that it holds for its whole time from now on.

        Raises:
            DataError: another writer has taken it over.
        """
        with self._lock:
            self._renew()

    def _acquired(self) -> str:
        for _ in range(10):  # another writer may change the object between a put and a read
            self._renewed = time.monotonic()
            try:
                return self._objects.put(LEASE, self._body(), IfNoneMatch="*")
            except ConditionFailed:
                pass
            try:
                found = self._objects.get(LEASE)
            except FileNotFoundError:
                continue
            other = _parsed(found)
            if not self._is_free(other, found.age):
                raise self._held(other, found.age)
            if not other.get("released"):
                logger.warning(
                    "%s: taking over the lease of %s, which was not released",
                    self._objects.url_of(LEASE),
                    _owner(other),
                )
            try:
                return self._objects.put(LEASE, self._body(), IfMatch=found.etag)
            except ConditionFailed:
                continue
        raise self._held({}, 0.0)

    def _is_free(self, other: dict[str, Any], age: float) -> bool:
        if other.get("released"):
            return True
        if self._holder and other.get("holder") == self._holder:
            return True
        return age > self._lasts(other) + _MARGIN_SECONDS

    def _lasts(self, other: dict[str, Any]) -> float:
        seconds = other.get("seconds")
        return float(seconds) if isinstance(seconds, int | float) else self._seconds

    def _held(self, other: dict[str, Any], age: float) -> DataError:
        left = max(self._lasts(other) + _MARGIN_SECONDS - age, 0)
        return DataError(
            _RULE,
            received=f"a lease of {_owner(other)}, renewed {max(age, 0):.0f} seconds ago",
            remedy=f"wait until that command ends; if it was killed, its lease ends in {left:.0f} "
            "seconds, and the same command then takes it over",
            file=self._objects.url_of(LEASE),
        )

    def _test_conditions(self) -> None:
        """ConfigError if the store accepts a put whose condition does not hold."""
        for condition in ({"IfNoneMatch": "*"}, {"IfMatch": '"0123456789abcdef0123456789abcdef"'}):
            try:
                self._objects.put(LEASE, b'{"released": true}', **condition)
            except ConditionFailed:
                continue
            raise without_conditions(self._objects.url)

    def _keep(self) -> None:
        while not self._ends.wait(self._seconds / 3):
            try:
                with self._lock:
                    self._renew()
            except DataError as error:
                logger.error("%s", error)
                return
            except GVPOError as error:  # the next attempt may succeed before the lease ends
                logger.warning("the lease could not be renewed: %s", error)

    def _renew(self) -> None:
        if not self._lost:
            begun = time.monotonic()
            self._count += 1
            try:
                self._etag = self._objects.put(LEASE, self._body(), IfMatch=self._etag)
                self._renewed = begun
                return
            except ConditionFailed:
                self._lost = True
        raise DataError(
            "a writer commits to a bucket while it holds the lease",
            received="a lease that another writer has taken over, since it was not renewed in time",
            remedy="run the same command again when the other one has ended; committed tasks are "
            "kept. lease_seconds sets how long a lease holds without a renewal",
            file=self._objects.url_of(LEASE),
        )

    def _body(self, *, released: bool = False) -> bytes:
        content = {
            "owner": _whoami(),
            "pid": os.getpid(),
            "token": self._token,
            "holder": self._holder,
            "seconds": self._seconds,
            "count": self._count,  # no two writes of a lease have the same bytes
            "released": released,
        }
        return json.dumps(content).encode()


def lease_owner(objects: Objects) -> str | None:
    """Who holds the lease of a dataset; None if nobody does."""
    try:
        found = objects.get(LEASE)
    except FileNotFoundError:
        return None
    other = _parsed(found)
    seconds = other.get("seconds")
    lasts = float(seconds) if isinstance(seconds, int | float) else 0.0
    free = other.get("released") or found.age > lasts + _MARGIN_SECONDS
    return None if free else _owner(other)


def _parsed(found: Got) -> dict[str, Any]:
    try:
        content = json.loads(found.content)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _owner(other: dict[str, Any]) -> str:
    owner = other.get("owner")
    return f"{owner}, process {other.get('pid')}" if owner else "an unknown owner"


def _whoami() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        user = f"user {os.getuid()}"
    return f"{user}@{socket.gethostname()}"
