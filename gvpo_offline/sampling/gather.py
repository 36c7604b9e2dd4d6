"""The log of a sampling run as inputs of an import: one input for each sampler.

An input's rows are sorted by prompt and number and do not depend on rounds, so that a run with
failures gives the same bytes as one without.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gvpo_offline.importing.formats.shared.log_format import InputInfo, per_row
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.sources.files import Advance, Source
from gvpo_offline.importing.sources.rows import Record, Row
from gvpo_offline.sampling.log import Sample, SampleLog
from gvpo_offline.sampling.prompts import Prompt, PromptFile
from gvpo_offline.sampling.sampler_logprobs import other_distribution, sequence_logprob
from gvpo_offline.sampling.settings import SamplingSettings

_EARLIER = "an earlier version of the package began this import without them"


class SampledRows(Source):
    """The responses of one sampler as rows, each a prompt and a response.

    Args:
        prompts: the prompts.
        log: the sampler's log, whose tasks are all committed.
        settings: of the sampler.
        logprobs: whether the rows have the responses' log-probs under the sampler. Earlier versions
            made none; an import that one of them began goes on without them.

    Attributes:
        without_logprobs: number of responses without log-prob, by cause.
    """

    def __init__(
        self,
        prompts: PromptFile,
        log: SampleLog,
        settings: SamplingSettings,
        *,
        logprobs: bool = True,
    ) -> None:
        super().__init__(f"samples/{log.name}", log.name, [])
        self._prompts = prompts
        self._log = log
        self._settings = settings
        cause = other_distribution(settings) if logprobs else _EARLIER
        self._cause = cause
        self.without_logprobs: Counter[str] = Counter()
        self._chunks = range(len(prompts.entry.row_groups))
        # The importer sizes shards and buckets by the content, since file sizes depend on rounds.
        # Each response's row includes its prompt.
        digest, self.text_bytes, self.size = hashlib.sha256(), 0, 0
        for chunk in self._chunks:
            beside = {prompt.index: _plain_bytes(prompt) for prompt in prompts.read(chunk)}
            for sample in self._samples(chunk, self._measure):
                ids = None if sample.token_ids is None else sample.token_ids.tolist()
                content = [*sample.key, sample.seed, sample.text, ids, sample.finish_reason]
                content += [] if sample.stop_string is None else [sample.stop_string]
                logprob = self._logprob(sample)
                if isinstance(logprob, str):
                    self.without_logprobs[logprob] += 1
                else:
                    content += [logprob]
                encoded = json.dumps(content).encode()
                digest.update(encoded)
                self.text_bytes += len(encoded) + beside[sample.prompt]
        self._sha256 = digest.hexdigest()

    def _measure(self, n_bytes: int) -> None:
        self.size += n_bytes

    def _logprob(self, sample: Sample) -> float | str:
        """The response's log-prob, in nats, or why it has none."""
        return self._cause or sequence_logprob(sample, self._settings)

    def sha256(self, advance: Advance) -> str:
        """SHA-256 of the responses, independent of rounds."""
        advance(self.size)
        return self._sha256

    def _samples(self, chunk: int, advance: Advance) -> list[Sample]:
        rounds = self._log.rounds(chunk)
        found = self._log.read(rounds, logprobs=self._cause is None)
        advance(sum(record.files[0].bytes for record in rounds))
        return [sample for sample in found.values() if sample.error is None]

    def rows(self, columns: Sequence[str] | None, advance: Advance) -> Iterator[Row]:
        """See `Source.rows`."""
        row = 0
        for chunk in self._chunks:
            prompts = {prompt.index: prompt for prompt in self._prompts.read(chunk)}
            for sample in self._samples(chunk, advance):
                logprob = self._logprob(sample)
                given = None if isinstance(logprob, str) else logprob
                yield row, {"prompt": prompts[sample.prompt], "sample": sample, "logprob": given}
                row += 1


class SampledFormat:
    """Rows of `SampledRows`."""

    columns: Sequence[str] | None = None

    def read(self, rows: Iterable[Row], source: InputInfo) -> Iterator[Fragment]:
        """One fragment per row; see `LogFormat.read`."""
        return per_row(rows, source, _fragment)


def _plain_bytes(prompt: Prompt) -> int:
    """Approximate bytes of a prompt in a row, with its metadata and token ids."""
    texts = (prompt.prompt, prompt.messages, prompt.metadata)
    return sum(len(text) for text in texts if text) + prompt.token_ids.nbytes


def _fragment(record: Record, source: InputInfo) -> Fragment:
    prompt: Any = record["prompt"]
    sample: Sample = record["sample"]
    fragment = Fragment(
        prompt=prompt.prompt,
        messages=prompt.messages,
        prompt_token_ids=prompt.token_ids,
        responses=[sample.text],
        response_token_ids=[sample.token_ids],
        rewards=None,
        samplers=[None],
        truncated=[sample.finish_reason == "length"],
        metadata=prompt.metadata,
        source=prompt.source,
        template_arguments=prompt.template_arguments,
    )
    fragment.set_stop_strings([sample.stop_string])
    if record["logprob"] is not None:
        fragment.sampler_logprobs = [record["logprob"]]
    return fragment
