"""One OpenAI-compatible server: an attempt to have a request answered, and what a failure says."""

from __future__ import annotations

import asyncio
import email.utils
import time
from typing import TYPE_CHECKING, Any, Protocol

from gvpo_offline.errors import DataError, ServerError
from gvpo_offline.limits import ANSWER_NESTING, parse_json
from gvpo_offline.openai.answer import BadAnswerError, valid
from gvpo_offline.openai.outage import KEPT, Outage, UnreachableError, unreachable
from gvpo_offline.openai.received import RedirectedError, TooLargeError, found_in

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

    from gvpo_offline.openai.client import ServerSettings

# No other request can succeed either; what to correct.
_FATAL = {
    401: "set api_key_env to the environment variable that holds a key of this server",
    403: "use a key that may use this model (api_key_env), or another model",
    404: "correct model, or base_url, which usually ends in /v1",
}
_TRANSIENT = (408, 409, 425, 429)
_GATEWAY = (502, 503, 504)  # of a proxy without a server behind it
CONNECT_SECONDS = 15.0
_CAUSE_CHARACTERS = 200
_QUOTED_CHARACTERS = 10_000  # of an error page, in which spaces are then joined


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


class Server:
    """One server during one call: attempts within the limits on concurrency, rate and time.

    Args:
        client: of the package `openai`, with the server's address.
        settings: the limits.
        key: the API key, which messages do not show.
        outage: whether the server answers; kept between calls.

    Attributes:
        in_flight: attempts that were begun and have not ended, those that wait for a slot included.
    """

    def __init__(
        self, client: AsyncOpenAI, settings: ServerSettings, key: str | None, outage: Outage
    ) -> None:
        self.in_flight = 0
        self._client = client
        self._settings = settings
        self._key = key
        self._outage = outage
        self._stopped: ServerError | None = None
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._not_before = 0.0  # time.monotonic() seconds
        self._next_turn = 0.0

    @property
    def url(self) -> str:
        """The server's address."""
        return self._outage.url

    @property
    def away(self) -> bool:
        """Whether the last try found no server."""
        return self._outage.away

    async def back(self) -> None:
        """Return when the server can be reached; tries it from time to time.

        Raises:
            ServerError: it is given up. Calling again tries on.
        """
        await self._outage.turn(self._probe)
        self._stopped = None

    async def attempt(self, request: ServerRequest, *, waits: bool) -> None:
        """Send a request once.

        Args:
            request: stores the answer.
            waits: whether it waits for a server that is away, and tries it; otherwise it fails.

        Raises:
            UnreachableError: no connection was made; says nothing about the request.
            FailedError: the attempt failed.
            ServerError: no request can succeed at this server.
        """
        self.in_flight += 1
        try:
            async with self._slots:
                text = await self._answer(request, waits)
        finally:
            self.in_flight -= 1
        self._outage.answered()
        try:
            request.read(_parsed(text))
        except BadAnswerError as error:
            raise self._failed(str(error)) from error

    async def _answer(self, request: ServerRequest, waits: bool) -> str:
        if self._stopped is not None:
            raise self._stopped
        await self._pace()
        try:
            if not waits and self._outage.away:
                raise UnreachableError("the server is away", final=False)
            await self._outage.turn(self._probe)
            return await self._text(request)
        except ServerError as error:
            self._stopped = error  # no other request is sent
            raise

    async def _pace(self) -> None:
        """Wait until a server that asked for time, and `requests_per_minute`, allow a request."""
        while (wait := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        if self._settings.requests_per_minute is None:
            return
        turn = max(self._next_turn, time.monotonic())
        self._next_turn = turn + 60 / self._settings.requests_per_minute
        await asyncio.sleep(max(0.0, turn - time.monotonic()))

    async def silent(self, request: int, cause: str) -> None:
        """Count an attempt without any answer, see `Outage.silent`."""
        await self._outage.silent(request, cause, self._silence)

    async def _text(self, request: ServerRequest) -> str:
        """The text of an answer.

        Raises:
            UnreachableError: no connection was made.
            ServerError: and none will be; or no request can succeed.
            FailedError: the attempt failed.
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
            async with asyncio.timeout(CONNECT_SECONDS + 1):
                await self._client.get("/models", cast_to=str, options={"timeout": CONNECT_SECONDS})
        except openai.APIStatusError as error:
            return error.status_code
        except Exception as error:
            if isinstance(refused := self._refused(error), ServerError):
                raise refused from error
            if (missed := unreachable(error)) is not None:
                raise missed from error
            return None
        return 200

    def _failed(self, cause: str, *, final: bool = False, silent: bool = False) -> FailedError:
        return FailedError(self._shown(cause), final=final, silent=silent)

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
                received=f"{failure} from {self.url}",
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


class FailedError(Exception):
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
