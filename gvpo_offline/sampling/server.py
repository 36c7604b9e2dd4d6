"""The sampler of `kind: openai`: an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gvpo_offline.errors import ServerError
from gvpo_offline.openai.answer import BadAnswerError
from gvpo_offline.openai.client import OpenAIClient
from gvpo_offline.sampling.answers import endpoint, read_answer, request_body
from gvpo_offline.sampling.log import Sample
from gvpo_offline.sampling.settings import OpenAISettings
from gvpo_offline.sampling.stage import SampleRequest, SamplerInfo, StoppedSamplingError
from gvpo_offline.workers.progress import advance


class ServerSampler:
    """Samples from a server; see `Sampler`."""

    def __init__(self, settings: OpenAISettings) -> None:
        self._settings = settings
        self._client = OpenAIClient(settings)

    def info(self) -> SamplerInfo:
        """The context length that the settings give."""
        return SamplerInfo(self._settings.context_length)

    def check(self) -> None:
        """Check the package and the key, as `start` does."""
        OpenAIClient(self._settings).start()

    def start(self) -> None:
        """Check the package and the key.

        Raises:
            ConfigError: one of them is missing.
        """
        self._client.start()

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """A response to each request, or the cause of its failure.

        Raises:
            StoppedSamplingError: the server cannot be reached, rejects the key or does not know the
                model.
        """
        by_prompt: dict[int, list[SampleRequest]] = {}
        for request in requests:
            by_prompt.setdefault(request.prompt.index, []).append(request)
        n = self._settings.n_per_request
        calls = [
            _CompletionsRequest(self._settings, own[i : i + n])
            for own in by_prompt.values()
            for i in range(0, len(own), n)
        ]
        sizes = [call.n_responses for call in calls]
        try:
            causes = self._client.send(calls, lambda number: advance(sizes[number]))
        except ServerError as error:
            cause = f"{error.rule}; received {error.received}"
            samples = [sample for call in calls for sample in call.samples(cause)]
            raise StoppedSamplingError(samples, error) from error
        return [
            sample
            for call, cause in zip(calls, causes, strict=True)
            for sample in call.samples(cause)
        ]


class _CompletionsRequest:
    """One HTTP request for some responses to one prompt; see `server.client.ServerRequest`."""

    def __init__(self, settings: OpenAISettings, requests: Sequence[SampleRequest]) -> None:
        self._settings = settings
        self._open = {request.number: request for request in requests}
        self._done: list[Sample] = []
        self.n_responses = len(requests)
        self.endpoint = endpoint(settings, requests[0].prompt)

    def body(self) -> dict[str, Any]:
        """The JSON that asks for the responses still missing."""
        return request_body(self._settings, list(self._open.values()))

    def read(self, answer: Any) -> None:
        """Keep the valid responses; the next attempt asks for the others."""
        causes = []
        for sample in read_answer(self._settings, answer, list(self._open.values())):
            if sample.error is None:
                self._done.append(sample)
                del self._open[sample.number]
            else:
                causes.append(sample.error)
        if causes:
            raise BadAnswerError(causes[0])

    def samples(self, cause: str | None) -> list[Sample]:
        """A sample for each response; those still missing failed with `cause`."""
        return self._done + [request.failed(cause or "") for request in self._open.values()]
