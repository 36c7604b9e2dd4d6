"""Several servers of the same model: which one a request goes to, and what happens if one is lost.

A request goes to the server with the fewest requests in flight. A server that cannot be reached is
left out and tried again from time to time; its requests go to the others. With one server, requests
wait for it instead. The run stops when no server is left.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gvpo_offline.errors import ServerError
from gvpo_offline.openai.outage import FIRST_WAIT, KEPT, POLL, UnreachableError
from gvpo_offline.openai.server import FailedError, Server, ServerRequest

if TYPE_CHECKING:
    from gvpo_offline.openai.client import ServerSettings

logger = logging.getLogger(__name__)


class Replicas:
    """The servers during one call.

    Args:
        servers: at least one.
        settings: the limits.
    """

    def __init__(self, servers: Sequence[Server], settings: ServerSettings) -> None:
        self._servers = servers
        self._settings = settings
        self._lost: dict[Server, ServerError] = {}
        self._returns: dict[Server, asyncio.Task[None]] = {}

    def close(self) -> None:
        """Stop trying servers that are away."""
        for task in self._returns.values():
            task.cancel()

    async def with_retries(self, request: ServerRequest) -> str | None:
        """The cause of the last failure after `max_attempts` attempts; None on success.

        Raises:
            ServerError: no server is left.
        """
        cause, attempt = None, 1
        while attempt <= self._settings.max_attempts:
            server = await self._next()
            try:
                await server.attempt(request, waits=len(self._servers) == 1)
                return None
            except UnreachableError:
                continue  # it says nothing about the request; `Outage` ends it
            except ServerError as error:
                self._leave_out(server, error)
                continue
            except FailedError as failure:
                cause = str(failure)
                if failure.final:
                    break
                if failure.silent:
                    await self._silent(server, request, cause)
            if attempt < self._settings.max_attempts:
                longest = min(self._settings.max_wait, FIRST_WAIT * 2 ** (attempt - 1))
                await asyncio.sleep(random.uniform(longest / 2, longest))
            attempt += 1
        return cause

    async def _silent(self, server: Server, request: ServerRequest, cause: str) -> None:
        try:
            await server.silent(id(request), cause)
        except ServerError as error:
            self._leave_out(server, error)

    async def _next(self) -> Server:
        """The server for an attempt; with several, waits until one can be reached."""
        if len(self._servers) == 1:
            return self._servers[0]
        while True:
            if len(self._lost) == len(self._servers):
                raise self._none_left()
            for server in self._servers:
                if server.away and server not in self._returns:
                    self._returns[server] = asyncio.create_task(self._return(server))
            there = [own for own in self._servers if not own.away and own not in self._lost]
            if there:
                return min(there, key=lambda own: own.in_flight)
            await asyncio.sleep(POLL)

    async def _return(self, server: Server) -> None:
        """Try a server that is away until it is back."""
        while server.away:
            try:
                await server.back()
            except ServerError as error:
                self._note(server, error)
        if self._lost.pop(server, None) is not None:
            logger.warning("the server at %s answers again, and gets requests", server.url)
        del self._returns[server]

    def _leave_out(self, server: Server, error: ServerError) -> None:
        """Send no more requests to a server; the error itself if it is the only one."""
        if len(self._servers) == 1:
            raise error
        self._note(server, error)

    def _note(self, server: Server, error: ServerError) -> None:
        if server not in self._lost:
            left = len(self._servers) - len(self._lost) - 1
            logger.warning(
                "the server at %s is left out (%s); servers left: %d",
                server.url,
                error.received,
                left,
            )
        self._lost[server] = error

    def _none_left(self) -> ServerError:
        causes = (f"{own.url}: {error.received}" for own, error in self._lost.items())
        return ServerError(
            f"one of the {len(self._servers)} servers answers requests",
            received="; ".join(causes),
            remedy=f"start one of them, or correct base_url and replicas; {KEPT}",
        )
