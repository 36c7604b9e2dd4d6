"""A client of OpenAI-compatible servers that sends many requests concurrently.

An attempt that fails is repeated after a wait, or recorded with its cause, or, where every request
would fail, ends the run. The `openai` package does the HTTP. Its own retries are switched off: they
know neither answers that are unusable, nor a wait that holds all requests, nor a deadline for an
attempt as a whole.
"""

from __future__ import annotations

import asyncio
import email.utils
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

from gvpo_offline.errors import ConfigError, DataError, ServerError
from gvpo_offline.limits import ANSWER_BYTES, ANSWER_NESTING, parse_json
from gvpo_offline.openai.address import check_address
from gvpo_offline.openai.answer import BadAnswerError, valid
from gvpo_offline.openai.outage import FIRST_WAIT, KEPT, Outage, UnreachableError, unreachable
from gvpo_offline.openai.received import (
    RedirectedError,
    TooLargeError,
    bounded_client,
    found_in,
)
from gvpo_offline.ranges import check_ranges

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

# No other request can succeed either; what to correct.
_FATAL = {
    401: "set api_key_env to the environment variable that holds a key of this server",
    403: "use a key that may use this model (api_key_env), or another model",
    404: "correct model, or base_url, which usually ends in /v1",
}
_TRANSIENT = (408, 409, 425, 429)
_GATEWAY = (502, 503, 504)  # of a proxy without a server behind it
_CONNECT_SECONDS = 15.0
_CAUSE_CHARACTERS = 200
_QUOTED_CHARACTERS = 10_000  # of an error page, in which spaces are then joined
_POSITIVE = (
    *("concurrency", "max_attempts", "request_timeout", "max_wait", "max_outage"),
    "max_answer_bytes",
)


@dataclass(kw_only=True)
class ServerSettings:
    """The server and the limits on requests to it; none of them changes an answer."""

    base_url: str
    """The server's address, as in http://localhost:8000/v1."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key. The key itself is never written."""
    concurrency: int = 32
    """Maximum number of requests in flight."""
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
        check_address(self.base_url)
        check_ranges(self)


OPERATIONAL = frozenset(field.name for field in fields(ServerSettings))


class ServerRequest(Protocol):
    """A request that is sent until it is answered; it stores the answer itself."""

    @property
    def endpoint(self) -> str:
        """chat/completions or completions."""

    def body(self) -> dict[str, Any]:
        """The JSON of the next attempt, which asks for what is still missing."""

    def read(self, answer: Any) -> None:
        """Store what an answer's JSON gives.

        Raises:
            BadAnswerError: something is still missing; the message is the cause.
            ConfigError: no further attempt can succeed.
        """


class OpenAIClient:
    """Sends requests with the `openai` package. Picklable before `start`."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._key: str | None = None
        self._outage = Outage(settings)

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
            ServerError: the server cannot be reached, rejects the key or does not know the model.
                Requests that were answered before have stored their answers.
        """
        self._outage.begin()
        return asyncio.run(self._send_all(requests, ended))

    async def _send_all(
        self, requests: Sequence[ServerRequest], ended: Callable[[int], None]
    ) -> list[str | None]:
        from openai import AsyncOpenAI, Timeout

        seconds = self._settings.request_timeout
        async with AsyncOpenAI(
            base_url=self._settings.base_url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=(timeout := Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS))),
            http_client=bounded_client(timeout, self._settings.max_answer_bytes),
        ) as client:
            runner = _RequestRunner(client, self._settings, self._key, self._outage)

            async def one(number: int, request: ServerRequest) -> str | None:
                cause = await runner.with_retries(request)
                ended(number)
                return cause

            return list(await asyncio.gather(*(one(*own) for own in enumerate(requests))))


class _RequestRunner:
    """Runs the requests of one call within the limits on concurrency and time."""

    def __init__(
        self, client: AsyncOpenAI, settings: ServerSettings, key: str | None, outage: Outage
    ) -> None:
        self._client = client
        self._settings = settings
        self._key = key
        self._outage = outage
        self._stopped: ServerError | None = None
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._not_before = 0.0  # time.monotonic() seconds

    async def with_retries(self, request: ServerRequest) -> str | None:
        """The cause of the last failure after `max_attempts` attempts; None on success."""
        cause, attempt = None, 1
        while attempt <= self._settings.max_attempts:
            try:
                await self._attempt(request)
                return None
            except UnreachableError:
                continue  # it says nothing about the request; `Outage` ends it
            except _FailedError as failure:
                cause = str(failure)
                if failure.final:
                    break
                if failure.silent:
                    await self._outage.silent(id(request), cause, self._silence)
            if attempt < self._settings.max_attempts:
                longest = min(self._settings.max_wait, FIRST_WAIT * 2 ** (attempt - 1))
                await asyncio.sleep(random.uniform(longest / 2, longest))
            attempt += 1
        return cause

    async def _attempt(self, request: ServerRequest) -> None:
        async with self._slots:
            if self._stopped is not None:
                raise self._stopped
            while (wait := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            try:
                await self._outage.turn(self._probe)
                text = await self._text(request)
            except ServerError as error:
                self._stopped = error  # no other request is sent
                raise
        self._outage.answered()
        try:
            request.read(_parsed(text))
        except BadAnswerError as error:
            raise self._failed(str(error)) from error

    async def _text(self, request: ServerRequest) -> str:
        """The text of an answer.

        Raises:
            UnreachableError: no connection was made.
            ServerError: and none will be; or no request can succeed.
            _FailedError: the attempt failed.
        """
        import openai

        body = request.body()
        try:
            # The client's own timeout is per read: a server that drips bytes outlasts it.
            async with asyncio.timeout(self._settings.request_timeout):
                # As text: the client's JSON parser depends on the content type.
                return await self._client.post(f"/{request.endpoint}", body=body, cast_to=str)
        except openai.APIStatusError as error:
            raise self._status_error(error) from error
        except Exception as error:  # the two packages raise others too for what a server sends
            if (failure := self._refused(error)) is not None:
                raise failure from error
            if (missed := unreachable(error)) is not None:
                self._outage.missed(missed)
                raise missed from error
            self._outage.connected()
            if isinstance(error, TimeoutError | openai.APITimeoutError):
                cause = f"no answer within {self._settings.request_timeout:g} s"
            else:
                below = error.__cause__ or error
                cause = f"connection: {type(below).__name__}: {below}"
            raise self._failed(cause, silent=True) from error

    def _refused(self, error: BaseException) -> Exception | None:
        """The failure behind an exception if `received` refused the answer; None if it did not."""
        if (redirect := found_in(error, RedirectedError)) is not None:
            return ServerError(
                "the server answers at its own address: a redirect to another host, port or scheme "
                "is not followed",
                received=self._shown(str(redirect)),
                remedy=f"set base_url to the address that answers, if you trust it; {KEPT}",
            )
        if (large := found_in(error, TooLargeError)) is not None:
            self._outage.answered()
            return self._failed(str(large))
        return None

    async def _silence(self) -> str | None:
        """Why there is no server; None if it answers a question after its models."""
        found = await self._probe(True)
        return None if found is None else str(found)

    async def _probe(self, needs_answer: bool) -> UnreachableError | None:
        """Why there is no server; None if there is one."""
        try:
            status = await self._status()
        except UnreachableError as missed:
            return missed
        if status in _GATEWAY:
            return UnreachableError(f"HTTP {status}", final=False)
        if status is None and needs_answer:
            return UnreachableError("a connection without an answer", final=False)
        return None

    async def _status(self) -> int | None:
        """The status with which the server answers a question after its models; None: no answer.

        Raises:
            UnreachableError: no connection was made.
        """
        import openai

        try:
            # The client's own timeout is per read, as in `_text`.
            async with asyncio.timeout(_CONNECT_SECONDS + 1):
                await self._client.get(
                    "/models", cast_to=str, options={"timeout": _CONNECT_SECONDS}
                )
        except openai.APIStatusError as error:
            return error.status_code
        except Exception as error:
            if isinstance(refused := self._refused(error), ServerError):
                raise refused from error
            if (missed := unreachable(error)) is not None:
                raise missed from error
            return None
        return 200

    def _failed(self, cause: str, *, final: bool = False, silent: bool = False) -> _FailedError:
        return _FailedError(self._shown(cause), final=final, silent=silent)

    def _shown(self, cause: str) -> str:
        # A server may quote the key that it was sent.
        cause = cause.replace(self._key, "***") if self._key else cause
        return valid(" ".join(cause[:_QUOTED_CHARACTERS].split())[:_CAUSE_CHARACTERS])

    def _status_error(self, error: APIStatusError) -> Exception:
        status = error.status_code
        failure = self._failed(f"HTTP {status}: {_message(error)}", silent=status in _GATEWAY)
        self._outage.connected()
        if not failure.silent:
            self._outage.answered()
        if status in _FATAL:
            return ServerError(
                "the server accepts the key and knows the model and the address",
                received=f"{failure} from {self._settings.base_url}",
                remedy=f"{_FATAL[status]}; finished answers and committed tasks are kept",
            )
        if status not in _TRANSIENT and status < 500:
            failure.final = True
            return failure
        seconds = retry_after(error.response.headers)
        if seconds > self._settings.request_timeout:
            return self._failed(f"{failure} (Retry-After: {seconds:g} s)", final=True)
        if seconds:
            self._not_before = max(self._not_before, time.monotonic() + seconds)
        return failure


class _FailedError(Exception):
    """An attempt that failed.

    Attributes:
        final: whether another attempt cannot succeed.
        silent: whether no server answered it.
    """

    def __init__(self, cause: str, *, final: bool = False, silent: bool = False) -> None:
        super().__init__(cause)
        self.final = final
        self.silent = silent


def _message(error: APIStatusError) -> str:
    """The message of an error, with the text of a page that is not JSON."""
    message, body = error.message, error.body
    return f"{message} - {body}" if isinstance(body, str) and body not in message else message


def _parsed(text: str) -> Any:
    try:
        return parse_json(text, nesting=ANSWER_NESTING, setting=None)
    except DataError as error:
        raise BadAnswerError(f"an answer that breaks a limit: {error.rule}") from error
    except ValueError as error:
        raise BadAnswerError(f"an answer that is not JSON: {error}") from error


def retry_after(headers: Any) -> float:
    """Seconds that a server asks to wait (RFC 9110, section 10.2.3); 0 if it does not say."""
    try:
        if milliseconds := headers.get("retry-after-ms"):
            return max(0.0, float(milliseconds) / 1000)
        text = headers.get("retry-after") or "0"
        if date := email.utils.parsedate_tz(text):
            return max(0.0, email.utils.mktime_tz(date) - time.time())
        seconds = float(text)
        return max(0.0, seconds) if seconds == seconds else 0.0
    except (ValueError, OverflowError):  # a date of a year that no clock has
        return 0.0
