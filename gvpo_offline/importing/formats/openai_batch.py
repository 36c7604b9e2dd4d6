"""Batch APIs (OpenAI's and compatible ones, such as vLLM's `run-batch`): the result file, joined by
`custom_id` with the request file (`requests`) and, optionally, a file of rewards (`rewards`).

Choices of one request, and of requests with the same prompt, are a group; the model is the sampler.
The inputs are result files and, if the API writes failures to separate files, error files. A
request that failed or has no result counts as a failed response. The request file is held in
memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gvpo_offline import conversations, values
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.group import Int32Array
from gvpo_offline.importing.formats.shared.log_format import InputInfo
from gvpo_offline.importing.formats.shared.parts import part_weights
from gvpo_offline.importing.formats.shared.trainer_logs import (
    RowLocation,
    TrainerFormat,
    add_parts,
    one_response,
)
from gvpo_offline.importing.fragment import Fragment, with_location
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.inputs import find_sources
from gvpo_offline.importing.sources.rows import Record, Row
from gvpo_offline.openai.answer import AnswerChoice, BadAnswerError, choices_of, result_body
from gvpo_offline.openai.shapes import (
    answer_errors,
    choice_content,
    output_reply,
    request_arguments,
    request_prompt,
    response_ending,
    was_cut,
)
from gvpo_offline.values import token_ids

_ID = "custom_id"


def open_format(config: ImportConfig) -> OpenAIBatchFormat:
    """The format; the keys of `reward_weights` are columns of the file of rewards."""
    if config.requests is None:
        raise ConfigError(
            "the result file of a batch has no prompts, so the request file is needed",
            received="no requests",
            remedy="set requests to the file that was sent",
        )
    return OpenAIBatchFormat(config, config.requests)


@dataclass
class _Request:
    """A request, its row in the request file, and whether a result was read for it."""

    place: RowLocation
    arguments: str | None
    prompt: conversations.Prompt
    prompt_ids: Int32Array | None
    answered: bool = False


class OpenAIBatchFormat(TrainerFormat):
    """Reads the lines of a batch's result and error files."""

    def __init__(self, config: ImportConfig, requests: str) -> None:
        super().__init__(config, required=(_ID, "response"), has_parts=True)
        self._files = {"requests": requests}
        if config.rewards is not None:
            self._files["rewards"] = config.rewards
        elif config.reward_weights:
            part_weights(config, {})
        self._requests: dict[str, _Request] = {}
        self._rewards: dict[str, Record] = {}
        self._weights: Mapping[str, float] = {}

    def dependencies(self, source: InputInfo) -> Mapping[str, str]:
        """The SHA-256 of the request file and the file of rewards."""
        return {
            name: " ".join(s.sha256(lambda _: None) for s in find_sources(pattern))
            for name, pattern in self._files.items()
        }

    def read(self, rows: Iterable[Row], source: InputInfo) -> Iterator[Fragment]:
        """The fragments of each line; see `LogFormat.read`."""
        if not self._requests:
            self._requests = {
                key: _request(record, place)
                for key, record, place in _rows_by_id(self._files["requests"])
            }
            if "rewards" in self._files:
                self._read_rewards(self._files["rewards"])
        yield from super().read(rows, source)

    def _read_rewards(self, pattern: str) -> None:
        names: dict[str, float] = {}
        for key, record, _ in _rows_by_id(pattern):
            self._rewards[key] = {n: v for n, v in record.items() if n != _ID}
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
        key = values.identifier(record[_ID])
        request = self._requests.get(key)
        if request is None or request.answered:
            raise DataError(
                "each result belongs to a request, and each request has one result",
                received=f"{'a second' if request else 'no request for the'} result of {key!r}",
                remedy="set requests to the files that were sent, and name each result file once",
            )
        request.answered = True
        try:
            body = result_body(record) or {}
        except BadAnswerError as error:
            self.record_failure(place, f"request {key}: {error}")
            return
        with answer_errors("a response's body has choices, or output"):
            choices = [body] if "output" in body else choices_of(body)
        for index, choice in enumerate(choices):
            if "output" in body:
                ended, word = response_ending(body)
                if ended == "failed":
                    self.record_failure(place, f"request {key}: the status {word!r}")
                    continue
                fragment = _response(body, request)
            else:
                with answer_errors("a choice has a message or a text"):
                    read = AnswerChoice(choice, body)
                if read.refusal:
                    self.record_failure(place, f"request {key}: {read.refusal}")
                    continue
                fragment = _choice(read, request)
            fragment.samplers = [values.sampler(body.get("model"))]
            fragment.response_ids = [key if len(choices) == 1 else f"{key}#{index}"]
            self._score(fragment, key, index, len(choices))
            yield fragment

    def _score(self, fragment: Fragment, key: str, index: int, n: int) -> None:
        if "rewards" not in self._files:
            fragment.rewards = None
            return
        row = self._rewards.get(key, {})
        parts = {
            name: self.part(_of_choice(row.get(name), index, n), name) for name in self._weights
        }
        fragment.rewards = [add_parts(parts, self._weights)]
        fragment.components = {name: [value] for name, value in parts.items()}


def _rows_by_id(pattern: str) -> Iterator[tuple[str, Record, RowLocation]]:
    """The rows of all files that match `pattern`: custom_id, row and location.

    Raises:
        DataError: a custom_id is missing or occurs twice.
    """
    seen: set[str] = set()
    for source in find_sources(pattern):
        for row, record in source.rows(None, lambda _: None):
            place = RowLocation(source.label, row, "")
            try:
                key = values.identifier(record.get(_ID))
                if key in seen:
                    raise DataError("each custom_id occurs once", received=repr(key))
            except DataError as error:
                raise with_location(error, file=source.label, row=row) from None
            seen.add(key)
            yield key, record, place


def _request(record: Record, place: RowLocation) -> _Request:
    try:
        if not isinstance(record.get("body"), dict):
            raise DataError("a request has a body", received=", ".join(record))
        body = record["body"]
        return _Request(place, request_arguments(body), *request_prompt(body))
    except DataError as error:
        raise with_location(error, file=place.label, row=place.row) from None


def _response(body: Mapping[str, Any], request: _Request) -> Fragment:
    return one_response(
        prompt=request.prompt,
        arguments=request.arguments,
        text=output_reply(body["output"]),
        truncated=was_cut(body),
        reward=None,
    )


def _choice(choice: AnswerChoice, request: _Request) -> Fragment:
    sent = choice.prompt_token_ids
    text, ids = choice_content(choice)
    return one_response(
        prompt=request.prompt,
        arguments=request.arguments,
        prompt_ids=request.prompt_ids if sent is None else token_ids(sent, "prompt_token_ids"),
        ids=ids,
        text=text,
        truncated=values.truncated(choice.finish_reason),
        stop_string=choice.stop_string,
        reward=None,
    )


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
