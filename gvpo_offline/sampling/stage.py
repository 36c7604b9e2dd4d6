"""One sampler on all prompts, as a stage that workers run task by task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gvpo_offline.errors import GVPOError
from gvpo_offline.hashing import mix_key, text_key
from gvpo_offline.sampling.log import Sample, SampleLog, task_name
from gvpo_offline.sampling.prompts import Prompt, PromptFile
from gvpo_offline.store.commit import TaskRecord
from gvpo_offline.workers.stage import Task

_SEED_BITS = 31  # the range that all servers accept


@dataclass(frozen=True, slots=True, eq=False)
class SampleRequest:
    """A response to sample.

    Attributes:
        prompt: the prompt.
        number: the response's number among those of this sampler to the prompt.
        seed: of its draws.
    """

    prompt: Prompt
    number: int
    seed: int

    def failed(self, cause: str) -> Sample:
        """The sample that records a failure and its cause."""
        return Sample(self.prompt.index, self.number, self.seed, error=cause)


@dataclass(frozen=True)
class SamplerInfo:
    """What a sampler is besides its settings.

    Attributes:
        context_length: maximum number of tokens of prompt and response together; None if unknown.
        identity: what the responses depend on besides the settings; recorded in the manifest.
    """

    context_length: int | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)


class StoppedSamplingError(Exception):
    """A sampler had to stop, and has some of the responses.

    Attributes:
        samples: one for each request; failures for those without a response.
        error: why it stopped; no request can succeed now.
    """

    def __init__(self, samples: list[Sample], error: GVPOError) -> None:
        super().__init__(str(error))
        self.samples = samples
        self.error = error


class Sampler(Protocol):
    """Responds to prompts. Picklable before `start`."""

    def info(self) -> SamplerInfo:
        """Context length and identity, without starting the sampler.

        Raises:
            ConfigError: there is no such model.
        """

    def check(self) -> None:
        """Check at little cost what `start` needs, without starting the sampler.

        Raises:
            ConfigError: files, the key or the package are missing.
        """

    def start(self) -> None:
        """Load the model, or check the client.

        Raises:
            ConfigError: the model, the key or the package is missing.
        """

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """A response to each request, or the cause of its failure; in any order.

        Raises:
            GVPOError: no request to this sampler can succeed.
            StoppedSamplingError: the same, after some responses.
        """


class SampleStage:
    """All responses of one sampler; see `Stage`.

    Args:
        prompts: the prompts.
        sampler: the sampler.
        log: its log.
        responses: number of responses to each prompt.
        seed: the sampler's seed.
        own_prompts: the sampler's prompts, made of the dataset's; None: they are the dataset's.
    """

    unit = "responses"

    def __init__(
        self,
        prompts: PromptFile,
        sampler: Sampler,
        log: SampleLog,
        responses: int,
        seed: int,
        own_prompts: Callable[[Sequence[Prompt]], list[Prompt]] | None = None,
    ) -> None:
        self.root = log.root
        self.name = log.tasks.stage
        self.log = log
        self._prompts = prompts
        self._sampler = sampler
        self._responses = responses
        self._seed = seed
        self._own_prompts = own_prompts
        # Determined once, so that all workers see the same tasks.
        self._tasks = [self._task(chunk) for chunk in range(len(prompts.entry.row_groups))]

    def _task(self, chunk: int) -> Task:
        rounds = self.log.rounds(chunk)
        failed = rounds[-1].counts["failed"] if rounds else 0
        total = self._prompts.entry.row_groups[chunk] * self._responses
        if rounds and not failed:
            return Task(task_name(chunk, len(rounds) - 1), total)
        return Task(task_name(chunk, len(rounds)), failed or total)

    def tasks(self) -> Sequence[Task]:
        """The next round of each task; the last round of a task without failures."""
        return self._tasks

    def start(self) -> None:
        """Start the sampler."""
        self._sampler.start()

    def work(self, task: Task) -> TaskRecord:
        """Request the responses that failed in all rounds before.

        Raises:
            GVPOError: as `Sampler.sample`; the responses of a sampler that stopped are committed.
            StorageError: no room.
        """
        chunk, _, round_ = task.name.partition("-")
        before = self.log.rounds(int(chunk))[: int(round_ or 0)]
        try:
            samples = self._sampler.sample(self._missing(int(chunk), before))
        except StoppedSamplingError as stopped:
            if any(sample.error is None for sample in stopped.samples):
                # A round with failures: the next run requests those alone.
                self.log.tasks.commit(self.log.write(task.name, stopped.samples))
            raise stopped.error from stopped.error.__cause__
        return self.log.write(task.name, samples)

    @property
    def asked(self) -> bool:
        """Whether each task has had its first round."""
        chunks = range(len(self._tasks))
        return all(self.log.tasks.peek(task_name(chunk, 0)) for chunk in chunks)

    def gaps(self) -> Iterator[tuple[SampleRequest, str]]:
        """The responses that no committed round has, in order, each with the cause."""
        for chunk in range(len(self._tasks)):
            rounds = self.log.rounds(chunk)
            if rounds and not rounds[-1].counts["failed"]:
                continue
            have = self.log.read(rounds)
            for request in self._missing(chunk, rounds):
                sample = have.get((request.prompt.index, request.number))
                yield request, (sample.error if sample else None) or "not requested yet"

    def _missing(self, chunk: int, rounds: Sequence[TaskRecord]) -> list[SampleRequest]:
        have = self.log.read(rounds)
        prompts = self._prompts.read(chunk)
        return [
            SampleRequest(prompt, number, self._seed_of(prompt, number))
            for prompt in (self._own_prompts(prompts) if self._own_prompts else prompts)
            for number in range(self._responses)
            if not _succeeded(have.get((prompt.index, number)))
        ]

    def _seed_of(self, prompt: Prompt, number: int) -> int:
        key = mix_key(self._seed, text_key(self.log.name), text_key(prompt.key), number)
        return int(key) >> (64 - _SEED_BITS)


def _succeeded(sample: Sample | None) -> bool:
    return sample is not None and sample.error is None
