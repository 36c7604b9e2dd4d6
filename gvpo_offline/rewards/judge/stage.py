"""The stage that sends the requests about a whole dataset to a judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from gvpo_offline.errors import DataError
from gvpo_offline.openai.answer import REASONING, BadAnswerError, choice_of, valid
from gvpo_offline.openai.client import OPERATIONAL, OpenAIClient, ServerSettings
from gvpo_offline.rewards.cases import Message, ScoringInput, ScoringInputReader
from gvpo_offline.rewards.judge.log import Journal, Judgement, JudgementLog, Key
from gvpo_offline.rewards.judge.rubric import AnyJudgeSettings, Rubric
from gvpo_offline.store.commit import TaskRecord
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.workers.progress import advance, portion
from gvpo_offline.workers.rounds import round_name
from gvpo_offline.workers.stage import Task

Items = Callable[[ScoringInput], list[tuple[int, int | None]]]
_TASK_DIGITS = 16
_CAUSES_SHOWN = 3
_NAME_CHARACTERS = 1000  # of the model, as the server calls it


def task_of(dataset: GroupDataset, row_group: int) -> str:
    """Name of the task of a row group: the hash of its file, and its number in the file."""
    file, local = dataset.locate(row_group)
    return f"{dataset.manifest.groups[file].sha256[:_TASK_DIGITS]}.{local:05d}"


class JudgeStage:
    """All requests to one judge, one task per row group; see `Stage`.

    Args:
        dataset: the dataset whose responses are judged.
        reader: reads its groups.
        log: stores the answers.
        settings: settings of the judge.
        items: the requests about a group: indices of the response, or of the pair in the order
            shown.
    """

    unit = "groups"

    def __init__(
        self,
        dataset: GroupDataset,
        reader: ScoringInputReader,
        log: JudgementLog,
        settings: AnyJudgeSettings,
        items: Items,
    ) -> None:
        self.root = log.root
        self.name = log.tasks.stage
        self._reader = reader
        self._log = log
        self._settings = settings
        self._items = items
        self._rubric = Rubric(settings)
        server = ServerSettings(**{name: getattr(settings, name) for name in OPERATIONAL})
        self._client = OpenAIClient(server)
        # Determined once, so that all workers see the same tasks.
        self._rounds: dict[str, tuple[int, str, int]] = {}
        self._tasks = []
        for row_group, size in enumerate(dataset.row_group_sizes.tolist()):
            task = task_of(dataset, row_group)
            rounds = log.rounds(task)
            whole = settings.gaps == "missing" or not (rounds and rounds[-1].counts["failed"])
            done = bool(rounds) and whole
            number = len(rounds) - done
            name = round_name(task, number)
            self._rounds[name] = (row_group, task, number)
            self._tasks.append(Task(name, size))

    def tasks(self) -> Sequence[Task]:
        """The next round of every task; the last round of a task that needs no further one."""
        return self._tasks

    def start(self) -> None:
        """Read the API key of the server."""
        self._client.start()

    def work(self, task: Task) -> TaskRecord:
        """Send the requests that neither earlier rounds nor an interrupted run have answers to.

        Raises:
            ServerError: the server cannot be reached, refuses the key or does not know the model.
                The answers so far are in the journal.
            DataError: the template cannot be rendered for a group.
            StorageError: a file cannot be written.
        """
        row_group, name, number = self._rounds[task.name]
        before = self._log.read(self._log.rounds(name)[:number])
        with self._log.journal(task.name) as journal:
            requests = {
                request.key: request
                for group in self._reader.read(row_group)
                for request in self._requests(group, before, journal)
            }
            open_ = [each for key, each in requests.items() if key not in journal.known]
            with portion(task.size, len(requests)):
                advance(len(requests) - len(open_))
                causes = self._client.send(open_, lambda number: advance())
        failed = {q.key: q.failed(cause) for q, cause in zip(open_, causes, strict=True) if cause}
        return self._log.write(task.name, [(failed | journal.known)[key] for key in requests])

    def _requests(
        self, group: ScoringInput, before: dict[Key, Judgement], journal: Journal
    ) -> list[JudgeRequest]:
        """The requests about a group that have no answer in earlier rounds."""
        requests = []
        for first, second in self._items(group):
            last = before.get((group.group_id, first, second))
            if last is None or last.error is not None:
                messages = self._rubric.messages(group, first, second)
                seed = self._settings.seed if last is None else last.seed + 1
                key = (group.group_id, first, second)
                requests.append(
                    JudgeRequest(key, self._settings, self._rubric, messages, seed, journal)
                )
        return requests

    def gaps(self) -> None:
        """Raise DataError if requests of committed tasks failed; names number and causes."""
        causes: Counter[str] = Counter()
        first: dict[str, Judgement] = {}
        asked = 0
        for _, name, _ in self._rounds.values():
            rounds = self._log.rounds(name)
            asked += sum(record.counts["judgements"] for record in rounds)
            if rounds and rounds[-1].counts["failed"]:
                last = self._log.read(rounds[-1:]).values()
                for each in last:
                    if each.error is not None:
                        causes[each.error] += 1
                        first.setdefault(each.error, each)
        if not causes:
            return
        failed = causes.total()
        shown = "; ".join(f"{n} x {cause}" for cause, n in causes.most_common(_CAUSES_SHOWN))
        examples = [_example(first[cause]) for cause, _ in causes.most_common(_CAUSES_SHOWN)]
        raise DataError(
            "the judge answers every request in the required form",
            received=f"{failed:,} of {asked + failed:,} failed: {shown}",
            remedy="run the same command again: it sends only these requests; where answers do not "
            f"match {self._rubric.form()}, correct template or pattern first",
            file=self.root,
            more=examples,
        )


def _example(failed: Judgement) -> str:
    responses = f"response {failed.first}"
    if failed.second is not None:
        responses = f"responses {failed.first} and {failed.second}"
    return f"group {failed.group_id!r}, {responses}: {failed.error}"


class AnswerStore(Protocol):
    """Keeps the answers of a judge as they arrive."""

    def add(self, judgement: Judgement) -> None:
        """Keep an answer."""


class JudgeRequest:
    """One request, repeated until its answer can be parsed; see `openai.client.ServerRequest`."""

    endpoint = "chat/completions"

    def __init__(
        self,
        key: Key,
        settings: AnyJudgeSettings,
        rubric: Rubric,
        messages: list[Message],
        seed: int,
        journal: AnswerStore,
    ) -> None:
        self.key = key
        self._settings = settings
        self._rubric = rubric
        self._messages = messages
        self._next_seed = seed
        self._journal = journal

    def body(self) -> dict[str, Any]:
        """The request; each attempt has another seed, as the same one may give the same answer."""
        settings = self._settings
        body: dict[str, Any] = {"model": settings.model, "messages": self._messages}
        body["temperature"] = settings.temperature
        body[settings.max_tokens_name] = settings.max_tokens
        if settings.send_seed:
            body["seed"] = self._next_seed
        self._next_seed += 1
        return body | settings.extra_body

    def read(self, answer: Any) -> None:
        """Store an answer that is complete and contains a judgement."""
        choice = choice_of(answer, 0)
        if choice.truncated:
            raise BadAnswerError(f"an answer cut at {self._settings.max_tokens} tokens")
        text = choice.text(beside=REASONING)
        if text is None:
            raise BadAnswerError(choice.refusal or "a text that is null")
        if not text.strip():
            raise BadAnswerError("an empty text")
        value, model = self._rubric.value(text), answer.get("model")
        seed = self._next_seed - 1
        name = None if model is None else valid(str(model)[:_NAME_CHARACTERS])
        self._journal.add(Judgement(*self.key, seed=seed, model=name, text=text, value=value))

    def failed(self, cause: str) -> Judgement:
        """The record of a failed request and its cause."""
        return Judgement(*self.key, seed=self._next_seed - 1, error=cause)
