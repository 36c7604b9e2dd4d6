"""What formats of batch APIs share: results are joined by an id with the requests, which hold the
prompts (`requests`), and, optionally, with a file of rewards (`rewards`).

Answers to one request, and to requests with the same prompt, are a group; the model is the sampler.
A request that failed or has no result counts as a failed response. Requests and rewards are held in
memory.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gvpo_offline import conversations, values
from gvpo_offline.errors import DataError
from gvpo_offline.group import Int32Array
from gvpo_offline.importing.formats.shared.log_format import InputInfo
from gvpo_offline.importing.formats.shared.parts import part_weights
from gvpo_offline.importing.formats.shared.trainer_logs import (
    RowLocation,
    TrainerFormat,
    add_parts,
)
from gvpo_offline.importing.fragment import Fragment, with_location
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.inputs import find_sources
from gvpo_offline.importing.sources.rows import Record, Row

__all__ = ["BatchFormat", "Sent"]


@dataclass(frozen=True)
class Sent:
    """What a request sent.

    Attributes:
        prompt: as `conversations.prompt` returns it.
        arguments: arguments of the chat template, as `conversations.template_arguments` returns
            them.
        prompt_ids: (P,) int32 if the prompt was sent so, else None.
        model: the model's name, or None.
    """

    prompt: conversations.Prompt
    arguments: str | None = None
    prompt_ids: Int32Array | None = None
    model: str | None = None


@dataclass
class _Request:
    """A request, its row in the request file, and whether a result was read for it."""

    place: RowLocation
    sent: Sent
    answered: bool = False


class BatchFormat(TrainerFormat):
    """Reads the lines of a batch's result files.

    Args:
        config: the import's settings; the keys of `reward_weights` are columns of the file of
            rewards.
        required: the columns that each result must have.
        requests: file or glob of the requests; None where each result holds its request.
    """

    def __init__(
        self, config: ImportConfig, *, required: Sequence[str], requests: str | None
    ) -> None:
        super().__init__(config, required=required, has_parts=True)
        self._limits = config.limits
        self._files = {} if requests is None else {"requests": requests}
        if config.rewards is not None:
            self._files["rewards"] = config.rewards
        elif config.reward_weights:
            part_weights(config, {})
        self._requests: dict[str, _Request] = {}
        self._rewards: dict[str, Record] = {}
        self._weights: Mapping[str, float] = {}
        self._opened = False

    id_columns: Sequence[str] = ("custom_id",)
    """Columns that may hold the id, in a result, a request or a row of rewards."""

    def key(self, record: Record) -> str:
        """The id of a result, a request or a row of rewards.

        Raises:
            DataError: there is none.
        """
        name = next((n for n in self.id_columns if record.get(n) is not None), self.id_columns[0])
        return values.identifier(record.get(name))

    @abstractmethod
    def sent(self, record: Record) -> Sent:
        """What a row of the request file sent.

        Raises:
            DataError: the row is no request, or holds more than text and tools.
        """

    @abstractmethod
    def answers(self, record: Record, sent: Sent) -> Sequence[Fragment | str]:
        """The answers of a result: fragments of one response, or causes of a failure.

        Raises:
            DataError: the row is no result, or holds more than text, reasoning and tool calls.
        """

    def dependencies(self, source: InputInfo) -> Mapping[str, str]:
        """The SHA-256 of the request file and the file of rewards."""
        return {
            name: " ".join(
                s.sha256(lambda _: None) for s in find_sources(pattern, limits=self._limits)
            )
            for name, pattern in self._files.items()
        }

    def read(self, rows: Iterable[Row], source: InputInfo) -> Iterator[Fragment]:
        """The fragments of each line; see `LogFormat.read`."""
        if not self._opened:
            self._opened = True
            if "requests" in self._files:
                self._requests = {
                    key: _Request(place, self._sent(record, place))
                    for key, record, place in self._rows_by_id(self._files["requests"])
                }
            if "rewards" in self._files:
                self._read_rewards(self._files["rewards"])
        yield from super().read(rows, source)

    def _sent(self, record: Record, place: RowLocation) -> Sent:
        try:
            return self.sent(record)
        except DataError as error:
            raise with_location(error, file=place.label, row=place.row) from None

    def _read_rewards(self, pattern: str) -> None:
        names: dict[str, float] = {}
        for key, record, _ in self._rows_by_id(pattern):
            self._rewards[key] = {n: v for n, v in record.items() if n not in self.id_columns}
            names.update(dict.fromkeys(self._rewards[key], 1.0))
        self._weights = part_weights(self.config, names)

    def finish(self) -> Mapping[str, int]:
        """See `DropsResponses.finish`; requests without a result count as failed."""
        for key, request in self._requests.items():
            if not request.answered:
                self.record_failure(request.place, f"request {key} has no result")
        return super().finish()

    def parse(self, record: Record, place: RowLocation) -> Iterable[Fragment]:
        """See `TrainerFormat.parse`."""
        key, sent = self._request_of(record)
        answers = self.answers(record, sent)
        for index, answer in enumerate(answers):
            if isinstance(answer, str):
                named = "" if key is None else f"request {key}: "
                self.record_failure(place, f"{named}{answer}")
                continue
            if key is not None:
                answer.response_ids = [key if len(answers) == 1 else f"{key}#{index}"]
            self._score(answer, key, index, len(answers))
            yield answer

    def _request_of(self, record: Record) -> tuple[str | None, Sent]:
        if "requests" not in self._files:
            named = any(record.get(name) is not None for name in self.id_columns)
            key = self.key(record) if named or "rewards" in self._files else None
            return key, self.sent(record)
        key = self.key(record)
        request = self._requests.get(key)
        if request is None or request.answered:
            raise DataError(
                "each result belongs to a request, and each request has one result",
                received=f"{'a second' if request else 'no request for the'} result of {key!r}",
                remedy="set requests to the files that were sent, and name each result file once",
            )
        request.answered = True
        return key, request.sent

    def _score(self, fragment: Fragment, key: str | None, index: int, n: int) -> None:
        if "rewards" not in self._files:
            fragment.rewards = None
            return
        row = self._rewards.get(key or "", {})
        parts = {
            name: self.part(_of_choice(row.get(name), index, n), name) for name in self._weights
        }
        fragment.rewards = [add_parts(parts, self._weights)]
        fragment.components = {name: [value] for name, value in parts.items()}

    def _rows_by_id(self, pattern: str) -> Iterator[tuple[str, Record, RowLocation]]:
        """The rows of all files that match `pattern`: id, row and location.

        Raises:
            DataError: an id is missing or occurs twice.
        """
        seen: set[str] = set()
        for source in find_sources(pattern, limits=self._limits):
            for row, record in source.rows(None, lambda _: None):
                place = RowLocation(source.label, row, "")
                for one in _of_a_call(record):
                    try:
                        key = self.key(one)
                        if key in seen:
                            raise DataError(
                                f"each {self.id_columns[0]} occurs once", received=repr(key)
                            )
                    except DataError as error:
                        raise with_location(error, file=source.label, row=row) from None
                    seen.add(key)
                    yield key, one, place


def _of_a_call(record: Record) -> Sequence[Record]:
    """The requests of a row: it may be the body of the API call that sent all of them."""
    requests = record.get("requests")
    return values.structs(requests, "requests") if isinstance(requests, list) else [record]


def _of_choice(value: Any, index: int, n: int) -> Any:
    """The entry of choice `index` of n in a value of a reward column."""
    if n == 1 and not isinstance(value, list):
        return value
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == n):
        raise DataError(
            "a reward is a number, or a list with one number per choice",
            received=f"{value!r} for {n} choices",
        )
    return value[index]
