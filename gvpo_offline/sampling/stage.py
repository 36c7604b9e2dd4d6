"""One sampler over all prompts, as a stage that an engine runs task by task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gvpo_offline.hashing import mix_key, text_key
from gvpo_offline.sampling.log import Sample, SampleLog, task_name
from gvpo_offline.sampling.prompts import Prompt, PromptFile
from gvpo_offline.store.commit import TaskRecord
from gvpo_offline.workers.stage import Task

_SEED_BITS = 31  # what every server takes


@dataclass(frozen=True, slots=True, eq=False)
class SampleRequest:
    """A response to be drawn: to which prompt, which of its responses, from which seed."""

    prompt: Prompt
    number: int
    seed: int

    def failed(self, cause: str) -> Sample:
        """The record that there is no such response, and why."""
        return Sample(self.prompt.index, self.number, self.seed, error=cause)


@dataclass(frozen=True)
class SamplerInfo:
    """What a sampler is, beyond its settings.

    Attributes:
        context_length: tokens of prompt and response that it takes, or None if it is not known.
        identity: what else the responses depend on; recorded in the manifest.
    """

    context_length: int | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)


class Sampler(Protocol):
    """Who responds. Picklable before `start`."""

    def facts(self) -> SamplerInfo:
        """What it is, found out without starting it.

        Raises:
            ConfigError: there is no such model.
        """

    def start(self) -> None:
        """Get ready: load the model, open the client.

        Raises:
            ConfigError: there is no such model, key or package.
        """

    def sample(self, wanted: Sequence[SampleRequest]) -> list[Sample]:
        """A response to each, or the cause of its failure; in any order.

        Raises:
            GVPOError: nothing that is asked of this sampler can succeed.
        """


class SampleStage:
    """All responses of one sampler; see `Stage`.

    Args:
        prompts: what is asked.
        sampler: who is asked.
        log: where the answers go.
        responses: how many to each prompt.
        seed: the sampler's seed.
    """

    unit = "responses"

    def __init__(
        self, prompts: PromptFile, sampler: Sampler, log: SampleLog, responses: int, seed: int
    ) -> None:
        self.root = log.root
        self.name = log.tasks.stage
        self.log = log
        self._prompts = prompts
        self._sampler = sampler
        self._responses = responses
        self._seed = seed
        # Decided once, so that an engine's processes agree on what there is to do.
        self._tasks = [self._task(chunk) for chunk in range(len(prompts.entry.row_groups))]

    def _task(self, chunk: int) -> Task:
        rounds = self.log.rounds(chunk)
        failed = rounds[-1].counts["failed"] if rounds else 0
        total = self._prompts.entry.row_groups[chunk] * self._responses
        if rounds and not failed:
            return Task(task_name(chunk, len(rounds) - 1), total)
        return Task(task_name(chunk, len(rounds)), failed or total)

    def tasks(self) -> Sequence[Task]:
        """The next round of every task; of one without gaps, its last."""
        return self._tasks

    def start(self) -> None:
        """Have the sampler get ready."""
        self._sampler.start()

    def work(self, task: Task) -> TaskRecord:
        """Ask for what the rounds before did not give.

        Raises:
            GVPOError: as `Sampler.sample`.
            StorageError: no room.
        """
        chunk, _, round_ = task.name.partition("-")
        before = self.log.rounds(int(chunk))[: int(round_ or 0)]
        return self.log.write(task.name, self._sampler.sample(self._missing(int(chunk), before)))

    @property
    def asked(self) -> bool:
        """Whether every task has had its first round."""
        chunks = range(len(self._tasks))
        return all(self.log.tasks.peek(task_name(chunk, 0)) for chunk in chunks)

    def gaps(self) -> Iterator[tuple[SampleRequest, str]]:
        """What no committed round gave, in order, each with the cause."""
        for chunk in range(len(self._tasks)):
            rounds = self.log.rounds(chunk)
            if rounds and not rounds[-1].counts["failed"]:
                continue
            have = self.log.read(rounds)
            for wanted in self._missing(chunk, rounds):
                sample = have.get((wanted.prompt.index, wanted.number))
                yield wanted, (sample.error if sample else None) or "not asked for yet"

    def _missing(self, chunk: int, rounds: Sequence[TaskRecord]) -> list[SampleRequest]:
        have = self.log.read(rounds)
        return [
            SampleRequest(prompt, number, self._seed_of(prompt, number))
            for prompt in self._prompts.read(chunk)
            for number in range(self._responses)
            if not _given(have.get((prompt.index, number)))
        ]

    def _seed_of(self, prompt: Prompt, number: int) -> int:
        key = mix_key(self._seed, text_key(self.log.name), text_key(prompt.key), number)
        return int(key) >> (64 - _SEED_BITS)


def _given(sample: Sample | None) -> bool:
    return sample is not None and sample.error is None
