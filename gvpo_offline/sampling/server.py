"""Responses of an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gvpo_offline.openai.answer import BadAnswerError
from gvpo_offline.openai.client import Server
from gvpo_offline.sampling.answers import is_chat, read_answer, request_body
from gvpo_offline.sampling.log import Sample
from gvpo_offline.sampling.settings import OpenAISettings
from gvpo_offline.sampling.stage import SampleRequest, SamplerInfo


class ServerSampler:
    """Asks a server for what is wanted; see `Sampler`."""

    def __init__(self, settings: OpenAISettings) -> None:
        self._settings = settings
        self._server = Server(settings)

    def facts(self) -> SamplerInfo:
        """The context, as the settings say."""
        return SamplerInfo(self._settings.context_length)

    def start(self) -> None:
        """Find the package and the key.

        Raises:
            ConfigError: one of them is not there.
        """
        self._server.start()

    def sample(self, wanted: Sequence[SampleRequest]) -> list[Sample]:
        """All of them, or the causes of their failures.

        Raises:
            ConfigError: the server refuses the key or does not know the model.
        """
        by_prompt: dict[int, list[SampleRequest]] = {}
        for each in wanted:
            by_prompt.setdefault(each.prompt.index, []).append(each)
        n = self._settings.n_per_request
        draws = [
            _CompletionsRequest(self._settings, own[i : i + n])
            for own in by_prompt.values()
            for i in range(0, len(own), n)
        ]
        causes = self._server.ask(draws)
        return [
            sample
            for draw, cause in zip(draws, causes, strict=True)
            for sample in draw.samples(cause)
        ]


class _CompletionsRequest:
    """Some responses to one prompt; see `server.client.Question`."""

    def __init__(self, settings: OpenAISettings, wanted: Sequence[SampleRequest]) -> None:
        self._settings = settings
        self._left = {each.number: each for each in wanted}
        self._done: list[Sample] = []
        self.chat = is_chat(settings, wanted[0].prompt)

    def body(self) -> dict[str, Any]:
        """The request for those that are still open."""
        return request_body(self._settings, list(self._left.values()))

    def read(self, answer: Any) -> None:
        """Take the responses that are good."""
        causes = []
        for sample in read_answer(self._settings, answer, list(self._left.values())):
            if sample.error is None:
                self._done.append(sample)
                del self._left[sample.number]
            else:
                causes.append(sample.error)
        if causes:
            raise BadAnswerError(causes[0])

    def samples(self, cause: str | None) -> list[Sample]:
        """All of them; those that are still open failed for `cause`."""
        return self._done + [each.failed(cause or "") for each in self._left.values()]
