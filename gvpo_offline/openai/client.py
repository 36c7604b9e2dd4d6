"""A client of OpenAI-compatible servers that sends many requests concurrently.

An attempt that fails is repeated after a wait, or recorded with its cause, or, where every request
would fail, ends the run. The `openai` package does the HTTP. Its own retries are switched off: they
know neither answers that are unusable, nor a wait that holds all requests, nor a deadline for an
attempt as a whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, fields

from gvpo_offline.errors import ConfigError
from gvpo_offline.limits import ANSWER_BYTES
from gvpo_offline.openai.address import check_address
from gvpo_offline.openai.outage import Outage
from gvpo_offline.openai.received import bounded_client
from gvpo_offline.openai.replicas import Replicas
from gvpo_offline.openai.server import CONNECT_SECONDS, Server, ServerRequest
from gvpo_offline.ranges import check_ranges

_POSITIVE = (
    *("concurrency", "max_attempts", "request_timeout", "max_wait", "max_outage"),
    "max_answer_bytes",
)


@dataclass(kw_only=True)
class ServerSettings:
    """The server and the limits on requests to it; none of them changes an answer."""

    base_url: str
    """The server's address, as in http://localhost:8000/v1."""
    replicas: list[str] = field(default_factory=list)
    """Addresses of further servers of the same model. Requests go to all of them; one that cannot
    be reached is left out until it answers again, and its requests go to the others."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key. The key itself is never written."""
    concurrency: int = 32
    """Maximum number of requests in flight, to each server."""
    requests_per_minute: float | None = None
    """Most requests a minute, to each server and from each worker process. Default: no limit."""
    max_attempts: int = 6
    """Attempts before a request is recorded as failed."""
    request_timeout: float = 600.0
    """Seconds that one attempt may take as a whole."""
    max_wait: float = 60.0
    """Maximum seconds between two attempts, unless the server asks for more (Retry-After)."""
    max_outage: float = 120.0
    """Seconds that a server which has answered may be unreachable, as while it restarts, before the
    run stops. A server that has never answered is given up after 5 tries, about 8 s."""
    max_answer_bytes: int = ANSWER_BYTES
    """Most bytes of an answer, decompressed; a longer one is not read to its end and has failed."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is positive", received=getattr(self, name))
        for url in self.urls:
            check_address(url)
        if len(set(self.urls)) < len(self.urls):
            raise ConfigError(
                "every address is named once, as base_url or in replicas",
                received=", ".join(self.urls),
                remedy="remove the second one",
            )
        check_ranges(self)

    @property
    def urls(self) -> list[str]:
        """The addresses of all servers."""
        return [self.base_url, *self.replicas]


OPERATIONAL = frozenset(own.name for own in fields(ServerSettings))


class OpenAIClient:
    """Sends requests with the `openai` package. Picklable before `start`."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._key: str | None = None
        self._outages = [Outage(settings, url) for url in settings.urls]

    def start(self) -> None:
        """Check the package and read the key.

        Raises:
            ConfigError: one of them is missing.
        """
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "requests to a server need the package openai",
                received=str(error),
                remedy="pip install 'gvpo-offline[server]'",
            ) from error
        name = self._settings.api_key_env
        self._key = os.environ.get(name) if name else None
        if name and not self._key:
            raise ConfigError(
                "the environment variable that api_key_env names holds the key",
                received=f"{name}, which is not set",
                remedy=f"export {name}=…",
            )

    def send(
        self,
        requests: Sequence[ServerRequest],
        ended: Callable[[int], None] = lambda number: None,
    ) -> list[str | None]:
        """The cause of failure of each request; None where it was answered.

        Args:
            requests: the requests.
            ended: called with the number of a request that was answered, or failed for good.

        Raises:
            ServerError: no server can be reached, accepts the key and knows the model.
                Requests that were answered before have stored their answers.
        """
        for outage in self._outages:
            outage.begin()
        try:
            return asyncio.run(self._send_all(requests, ended))
        except asyncio.CancelledError as error:
            # Nothing but an interrupt cancels all requests. While a connection is being made, the
            # HTTP library's own cancellation hides it from asyncio.run.
            raise KeyboardInterrupt from error

    async def _send_all(
        self, requests: Sequence[ServerRequest], ended: Callable[[int], None]
    ) -> list[str | None]:
        async with contextlib.AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(self._server(own)) for own in self._outages]
            replicas = Replicas(servers, self._settings)
            stack.callback(replicas.close)

            async def one(number: int, request: ServerRequest) -> str | None:
                cause = await replicas.with_retries(request)
                ended(number)
                return cause

            return list(await asyncio.gather(*(one(*own) for own in enumerate(requests))))

    @contextlib.asynccontextmanager
    async def _server(self, outage: Outage) -> AsyncIterator[Server]:
        from openai import AsyncOpenAI, Timeout

        seconds = self._settings.request_timeout
        async with AsyncOpenAI(
            base_url=outage.url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=(timeout := Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))),
            http_client=bounded_client(timeout, self._settings.max_answer_bytes),
        ) as client:
            yield Server(client, self._settings, self._key, outage)
