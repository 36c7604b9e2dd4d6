"""Batch APIs (OpenAI's and compatible ones, such as vLLM's `run-batch`): the result file, joined by
`custom_id` with the request file (`requests`) and, optionally, a file of rewards (`rewards`).

The inputs are result files and, if the API writes failures to separate files, error files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_offline import values
from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.importing.formats.shared.batches import BatchFormat, Sent
from gvpo_offline.importing.formats.shared.trainer_logs import one_response
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record
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


def open_format(config: ImportConfig) -> OpenAIBatchFormat:
    """The format; the keys of `reward_weights` are columns of the file of rewards."""
    if config.requests is None:
        raise ConfigError(
            "the result file of a batch has no prompts, so the request file is needed",
            received="no requests",
            remedy="set requests to the file that was sent",
        )
    return OpenAIBatchFormat(config, config.requests)


class OpenAIBatchFormat(BatchFormat):
    """Reads the lines of a batch's result and error files."""

    def __init__(self, config: ImportConfig, requests: str) -> None:
        super().__init__(config, required=("custom_id", "response"), requests=requests)

    def sent(self, record: Record) -> Sent:
        """See `BatchFormat.sent`."""
        body = record.get("body")
        if not isinstance(body, dict):
            raise DataError("a request has a body", received=", ".join(record))
        prompt, ids = request_prompt(body)
        return Sent(prompt, request_arguments(body), ids)

    def answers(self, record: Record, sent: Sent) -> Sequence[Fragment | str]:
        """See `BatchFormat.answers`."""
        try:
            body = result_body(record) or {}
        except BadAnswerError as error:
            return [str(error)]
        with answer_errors("a response's body has choices, or output"):
            has_items = isinstance(body, dict) and "output" in body
            choices = [body] if has_items else choices_of(body)
        return [_answer(choice, body, sent) for choice in choices]


def _answer(choice: Any, body: Mapping[str, Any], sent: Sent) -> Fragment | str:
    if "output" in body:
        ended, word = response_ending(body)
        if ended == "failed":
            return f"the status {word!r}"
        fragment = one_response(
            prompt=sent.prompt,
            arguments=sent.arguments,
            text=output_reply(body["output"]),
            truncated=was_cut(body),
            reward=None,
        )
    else:
        with answer_errors("a choice has a message or a text"):
            read = AnswerChoice(choice, body)
        if read.refusal:
            return read.refusal
        fragment = _choice(read, sent)
    fragment.samplers = [values.sampler(body.get("model"))]
    return fragment


def _choice(choice: AnswerChoice, sent: Sent) -> Fragment:
    given = choice.prompt_token_ids
    text, ids = choice_content(choice)
    return one_response(
        prompt=sent.prompt,
        arguments=sent.arguments,
        prompt_ids=sent.prompt_ids if given is None else token_ids(given, "prompt_token_ids"),
        ids=ids,
        text=text,
        truncated=values.truncated(choice.finish_reason),
        stop_string=choice.stop_string,
        reward=None,
    )
