"""An OpenAI-compatible server: asked many times at once, patiently, and never trusted.

Whatever goes wrong with a question ends in one of three ways: it is asked again after a while, it
is given up with the cause, or, where no question can be answered, the run stops.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from gvpo_offline.errors import ConfigError
from gvpo_offline.openai.answer import BadAnswerError

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

_REFUSED = (401, 403, 404)
_PASSING = (408, 409, 425, 429)
_FIRST_WAIT = 0.5  # seconds
_CAUSE_CHARACTERS = 200


class ServerSettings(Protocol):
    """Which server, and how patiently it is asked; none of it changes an answer.

    Attributes:
        base_url: its address, as in http://localhost:8000/v1.
        api_key_env: name of the environment variable that holds the key, or None.
        concurrency: questions under way at a time.
        max_attempts: times that a question is asked before it is given up.
        request_timeout: seconds that one attempt may take as a whole.
        max_wait: seconds between two attempts, at most; a server that asks for more is given it.
    """

    @property
    def base_url(self) -> str: ...
    @property
    def api_key_env(self) -> str | None: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def max_attempts(self) -> int: ...
    @property
    def request_timeout(self) -> float: ...
    @property
    def max_wait(self) -> float: ...


class Question(Protocol):
    """What is asked until it is answered; it keeps its answers itself."""

    @property
    def chat(self) -> bool:
        """Whether it goes to chat completions; otherwise to completions."""

    def body(self) -> dict[str, Any]:
        """The JSON of the next request: of all that is still open."""

    def read(self, answer: Any) -> None:
        """Take what the JSON of an answer gives.

        Raises:
            BadAnswerError: something is still open; says why.
            ConfigError: no further answer can be any better.
        """


class Server:
    """Asks through the `openai` package. Picklable before `start`."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._key: str | None = None

    def start(self) -> None:
        """Find the package and the key.

        Raises:
            ConfigError: one of them is not there.
        """
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "asking a server needs the package openai",
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

    def ask(self, questions: Sequence[Question]) -> list[str | None]:
        """Why each was not answered; None where it was.

        Raises:
            ConfigError: the server refuses the key or does not know the model.
        """
        return asyncio.run(self._all(questions))

    async def _all(self, questions: Sequence[Question]) -> list[str | None]:
        from openai import AsyncOpenAI

        async with AsyncOpenAI(
            base_url=self._settings.base_url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=self._settings.request_timeout,
        ) as client:
            conversation = _Conversation(client, self._settings, self._key)
            return list(await asyncio.gather(*map(conversation.patiently, questions)))


class _Conversation:
    """The requests of one call: how many at a time, and when not before."""

    def __init__(self, client: AsyncOpenAI, settings: ServerSettings, key: str | None) -> None:
        self._client = client
        self._settings = settings
        self._key = key
        self._turns = asyncio.Semaphore(settings.concurrency)
        self._not_before = 0.0

    async def patiently(self, question: Question) -> str | None:
        """The last cause of failure, after as many attempts as the settings grant."""
        cause = None
        for attempt in range(1, self._settings.max_attempts + 1):
            try:
                await self._once(question)
                return None
            except _FailedError as failure:
                cause = str(failure)
                if failure.final:
                    break
            if attempt < self._settings.max_attempts:
                longest = min(self._settings.max_wait, _FIRST_WAIT * 2 ** (attempt - 1))
                await asyncio.sleep(random.uniform(longest / 2, longest))
        return cause

    async def _once(self, question: Question) -> None:
        import openai

        async with self._turns:
            while (wait := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            try:
                # The client's own limit is for each read: a server that drips bytes outlives it.
                async with asyncio.timeout(self._settings.request_timeout):
                    text = await self._post(question)
            except openai.APIStatusError as error:
                raise self._status(error) from error
            except (TimeoutError, openai.APITimeoutError) as error:
                seconds = self._settings.request_timeout
                raise _FailedError(f"no answer within {seconds:g} s") from error
            except openai.APIConnectionError as error:
                cause = error.__cause__ or error
                raise self._failed(f"connection: {type(cause).__name__}: {cause}") from error
        try:
            question.read(_parsed(text))
        except BadAnswerError as error:
            raise self._failed(str(error)) from error

    async def _post(self, question: Question) -> str:
        body = question.body()
        api = self._client.chat if question.chat else self._client
        # `create` names what it requires; the rest goes through as it is.
        named = {name: body.pop(name) for name in ("model", "messages", "prompt") if name in body}
        create: Any = api.completions.with_raw_response.create
        text: str = (await create(**named, extra_body=body)).text
        return text

    def _failed(self, cause: str, *, final: bool = False) -> _FailedError:
        # A server may quote the key that it was sent.
        cause = cause.replace(self._key, "***") if self._key else cause
        return _FailedError(" ".join(cause.split())[:_CAUSE_CHARACTERS], final=final)

    def _status(self, error: APIStatusError) -> Exception:
        status = error.status_code
        failure = self._failed(f"HTTP {status}: {error.message}")
        if status in _REFUSED:
            return ConfigError(
                "the server takes the key and knows the model and the address",
                received=f"{failure} from {self._settings.base_url}",
                remedy="correct api_key_env, model or base_url; what is committed stays",
            )
        if status not in _PASSING and status < 500:
            failure.final = True
            return failure
        asked = retry_after(error.response.headers)
        if asked > self._settings.request_timeout:
            return self._failed(f"{failure} (to be asked again in {asked:g} s)", final=True)
        if asked:
            self._not_before = max(self._not_before, time.monotonic() + asked)
        return failure


class _FailedError(Exception):
    """An attempt that failed; `final` if another one is of no use."""

    def __init__(self, cause: str, *, final: bool = False) -> None:
        super().__init__(cause)
        self.final = final


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadAnswerError(f"an answer that is no JSON: {error}") from error


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
    except ValueError:
        return 0.0
