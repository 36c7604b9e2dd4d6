"""Servers that cannot be reached: when requests wait for them, and when a run gives up.

A connection that is refused says nothing about the request that it was opened for. Such a failure
therefore is not an attempt of the request. All requests wait, one of them tries the server again
from time to time, and after a few tries, or some time, the run stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING

from gvpo_offline.errors import ServerError

if TYPE_CHECKING:
    from gvpo_offline.openai.client import ServerSettings

# Tries of a server that has never answered, about 8 s with the waits between them.
TRIES = 5
FIRST_WAIT = 0.5  # seconds
POLL = 0.05  # seconds between two looks whether the server is back
# Requests in a row without any answer, after which it is asked whether there is a server at all.
SUSPICIOUS_FAILURES, SUSPICIOUS_REQUESTS = 10, 3
_UNREACHABLE = ("ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol")
KEPT = (
    "then run the same command again: answers and tasks that are finished are kept, and only the "
    "rest is requested"
)


class UnreachableError(Exception):
    """No connection to the server: the message is the cause.

    Attributes:
        final: whether waiting cannot help, as for an unknown host or a certificate.
    """

    def __init__(self, cause: str, *, final: bool) -> None:
        super().__init__(cause)
        self.final = final


def unreachable(error: BaseException) -> UnreachableError | None:
    """What an exception of the HTTP library says if no connection was made; None if one was."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    # By name: the module of the HTTP library differs between versions of the package openai.
    if not any(type(each).__name__ in _UNREACHABLE for each in chain):
        return None
    last = chain[-1]
    if any(isinstance(each, ssl.SSLError) for each in chain):
        return UnreachableError(f"TLS: {last}", final=True)
    for each in chain:
        if isinstance(each, socket.gaierror):
            # EAI_AGAIN is a name server that does not answer, which may pass.
            return UnreachableError(f"DNS: {each}", final=each.errno != socket.EAI_AGAIN)
    if type(chain[0]).__name__ == "APITimeoutError":
        return UnreachableError("no connection within the time limit", final=False)
    return UnreachableError(f"{type(last).__name__}: {last}", final=False)


class Outage:
    """Whether a server answers, over all requests of a process. Picklable between calls.

    A server that has never answered is given up after a few tries, at once where its name is not
    known or its certificate is refused. A server that has answered, and may be restarting, is given
    up after `max_outage` seconds.

    Args:
        settings: the limits.
        url: the server's address.
    """

    def __init__(self, settings: ServerSettings, url: str) -> None:
        self.url = url
        self._settings = settings
        self._answered = False
        self._since: float | None = None  # time.monotonic() of the first failed try in a row
        self._tries = 0
        self._next = 0.0
        self._probing = False
        self._no_answer = False
        self._silent: Counter[int] = Counter()

    @property
    def away(self) -> bool:
        """Whether the last try found no server."""
        return self._since is not None

    def begin(self) -> None:
        """Begin a call: no request of an earlier one is trying the server still."""
        self._probing = False
        self._silent.clear()

    # ---- no connection ----

    async def turn(self, probe: Callable[[bool], Awaitable[UnreachableError | None]]) -> None:
        """Wait until requests may be sent: while the server cannot be reached, one of those that
        wait tries it again from time to time.

        Args:
            probe: asks the server for anything; the cause if there is none. Its argument says
                whether a connection without an answer is one.

        Raises:
            ServerError: the run gives up.
        """
        while self._since is not None:
            if self._probing:
                await asyncio.sleep(min(POLL, self._settings.max_wait))
                continue
            with self._asking():
                await asyncio.sleep(max(0.0, self._next - time.monotonic()))
                cause = await probe(self._no_answer)
            if cause is None:
                self._end()
            else:
                self._missed(cause)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """One request tries the server; if that ends in an error, another one may."""
        self._probing = True
        try:
            yield
        finally:
            self._probing = False

    def answered(self) -> None:
        """The server answered a request, in whatever way."""
        self._answered = True
        self._silent.clear()
        self._end()

    def connected(self) -> None:
        """A connection was made, without an answer."""
        if not self._no_answer:
            self._end()

    def _end(self) -> None:
        self._since, self._tries, self._no_answer = None, 0, False

    def missed(self, cause: UnreachableError) -> None:
        """A request found no connection. Requests that were sent at the same time are one try.

        Raises:
            ServerError: the run gives up.
        """
        if self._since is None:
            self._missed(cause)

    def _missed(self, cause: UnreachableError) -> None:
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        self._tries += 1
        longest = min(self._settings.max_wait, FIRST_WAIT * 2 ** min(self._tries - 1, 16))
        self._next = now + random.uniform(longest / 2, longest)
        lasted = now - self._since
        if self._answered:
            if lasted < self._settings.max_outage:
                return
            how = f"after it had answered, {self._tries} tries in {lasted:.0f} s failed"
            remedy = "restart the server, or raise max_outage where it needs longer"
        else:
            if self._tries < TRIES and not cause.final:
                return
            how = "1 try" if self._tries == 1 else f"{self._tries} tries in {lasted:.0f} s"
            how = f"{how} without an answer"
            remedy = "start the server, or correct base_url"
        raise self._given_up(f"{cause}; {how}", remedy)

    # ---- a connection, but no answer ----

    async def silent(
        self, request: int, cause: str, probe: Callable[[], Awaitable[str | None]]
    ) -> None:
        """Count an attempt that was sent and not answered: cut, too slow, or answered by a gateway
        without a server behind it. After some in a row the server is asked whether it is there.

        Args:
            request: identifies the request.
            cause: of its failure.
            probe: asks the server for anything; why there is none, or None if it answers.
        """
        self._silent[request] += 1
        enough = self._silent.total() >= SUSPICIOUS_FAILURES
        if self._since is not None or not (enough and len(self._silent) >= SUSPICIOUS_REQUESTS):
            return
        self._since, self._no_answer = time.monotonic(), True
        with self._asking():
            alive = await probe() is None
        if alive:
            self.answered()
        else:  # not the fault of single requests
            self._silent.clear()
            self._missed(UnreachableError(cause, final=False))

    def _given_up(self, received: str, remedy: str) -> ServerError:
        return ServerError(
            f"the server at {self.url} answers requests",
            received=received,
            remedy=f"{remedy}; {KEPT}",
        )
