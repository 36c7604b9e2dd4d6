"""An OpenAI-compatible server: asked many times at once, patiently, and never trusted.

Whatever goes wrong with a request ends in one of three ways: it is made again after a while, its
responses are recorded as failed with the cause, or, where no request can succeed, the run stops.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gvpo_offline.collect.sample.answers import (
    BadAnswerError,
    is_chat,
    read_answer,
    request_body,
)
from gvpo_offline.collect.sample.config import OpenAISettings
from gvpo_offline.collect.sample.log import Sample
from gvpo_offline.collect.sample.stage import Facts, Wanted
from gvpo_offline.errors import ConfigError

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

_REFUSED = (401, 403, 404)
_PASSING = (408, 409, 425, 429)
_FIRST_WAIT = 0.5  # seconds
_CAUSE_CHARACTERS = 200


class ServerSampler:
    """Asks a server through the `openai` package; see `Sampler`."""

    def __init__(self, settings: OpenAISettings) -> None:
        self._settings = settings
        self._key: str | None = None

    def facts(self) -> Facts:
        """The context, as the settings say."""
        return Facts(self._settings.context_length)

    def start(self) -> None:
        """Find the package and the key.

        Raises:
            ConfigError: one of them is not there.
        """
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "kind: openai needs the package openai",
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

    def sample(self, wanted: Sequence[Wanted]) -> list[Sample]:
        """All of them, or the causes of their failures.

        Raises:
            ConfigError: the server refuses the key or does not know the model.
        """
        return asyncio.run(self._all(wanted))

    async def _all(self, wanted: Sequence[Wanted]) -> list[Sample]:
        from openai import AsyncOpenAI

        settings = self._settings
        by_prompt: dict[int, list[Wanted]] = {}
        for each in wanted:
            by_prompt.setdefault(each.prompt.index, []).append(each)
        n = settings.n_per_request
        asked = [own[i : i + n] for own in by_prompt.values() for i in range(0, len(own), n)]
        async with AsyncOpenAI(
            base_url=settings.base_url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=settings.request_timeout,
        ) as client:
            conversation = _Conversation(client, settings, self._key)
            found = await asyncio.gather(*map(conversation.patiently, asked))
        return [sample for samples in found for sample in samples]


class _Conversation:
    """The requests of one task: how many at a time, and when not before."""

    def __init__(self, client: AsyncOpenAI, settings: OpenAISettings, key: str | None) -> None:
        self._client = client
        self._settings = settings
        self._key = key
        self._turns = asyncio.Semaphore(settings.concurrency)
        self._not_before = 0.0

    async def patiently(self, wanted: Sequence[Wanted]) -> list[Sample]:
        """A sample for each, after as many attempts as the settings grant."""
        done: list[Sample] = []
        left = {each.number: each for each in wanted}
        causes: dict[int, str] = {}
        for attempt in range(1, self._settings.max_attempts + 1):
            try:
                samples = await self._once(list(left.values()))
            except _FailedError as failure:
                causes |= dict.fromkeys(left, str(failure))
                if failure.final:
                    break
            else:
                for sample in samples:
                    if sample.error is None:
                        done.append(sample)
                        del left[sample.number]
                    else:
                        causes[sample.number] = sample.error
            if not left:
                break
            if attempt < self._settings.max_attempts:
                longest = min(self._settings.max_wait, _FIRST_WAIT * 2 ** (attempt - 1))
                await asyncio.sleep(random.uniform(longest / 2, longest))
        return done + [each.failed(causes[number]) for number, each in left.items()]

    async def _once(self, wanted: Sequence[Wanted]) -> list[Sample]:
        import openai

        async with self._turns:
            while (wait := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            try:
                # The client's own limit is for each read: a server that drips bytes outlives it.
                async with asyncio.timeout(self._settings.request_timeout):
                    return read_answer(self._settings, await self._post(wanted), wanted)
            except openai.APIStatusError as error:
                raise self._status(error) from error
            except TimeoutError as error:
                seconds = self._settings.request_timeout
                raise _FailedError(f"no answer within {seconds:g} s") from error
            except openai.APITimeoutError as error:
                seconds = self._settings.request_timeout
                raise _FailedError(f"no answer within {seconds:g} s") from error
            except openai.APIConnectionError as error:
                cause = error.__cause__ or error
                raise self._failed(f"connection: {type(cause).__name__}: {cause}") from error
            except (ValueError, RecursionError) as error:
                if isinstance(error, ConfigError):
                    raise
                raise self._failed(f"an answer that is no JSON: {error}") from error
            except BadAnswerError as error:
                raise self._failed(str(error)) from error

    async def _post(self, wanted: Sequence[Wanted]) -> Any:
        body = request_body(self._settings, wanted)
        api = self._client.chat if is_chat(self._settings, wanted[0].prompt) else self._client
        # `create` names what it requires; the rest goes through as it is.
        named = {name: body.pop(name) for name in ("model", "messages", "prompt") if name in body}
        create: Any = api.completions.with_raw_response.create
        raw = await create(**named, extra_body=body)
        return json.loads(raw.text)

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
    """A request that failed; `final` if making it again is of no use."""

    def __init__(self, cause: str, *, final: bool = False) -> None:
        super().__init__(cause)
        self.final = final


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
