"""Reads what an OpenAI-compatible server returns: chat completions, completions, batch results.

Samplers, judges and the import of batch files read answers with this module alone. The types of the
`openai` package are no help here: its client fills them without validation, and its validators
refuse servers that leave out fields that nothing here needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from gvpo_offline.errors import DataError
from gvpo_offline.finish_reasons import Ending, ending, stop_string
from gvpo_offline.messages import content_text as joined_text

_STOPPED_AT = ("stop_reason", "matched_stop", "stop_sequence")
REASONING = ("reasoning", "reasoning_content")
BESIDE_TEXT = ("tool_calls", "function_call", *REASONING)
# float32, which stores log-probs, has few lower numbers. In bfloat16, whose unit roundoff is 2^-8,
# the log-prob of a certain token may exceed 0 by that much.
_LOWEST, _ROUNDING = -3.0e38, 1e-2
_IDS = ("token_ids", "response_token_ids")
_TOKEN_ID = re.compile(r"token_id:(\d{1,20})", re.ASCII)


class BadAnswerError(Exception):
    """An answer, or a part of it, that cannot be used; the message, valid Unicode, is the cause."""

    def __init__(self, cause: str) -> None:
        super().__init__(valid(cause))


class AnswerChoice:
    """One choice of a chat completion or a completion. Each part is checked when it is read.

    Args:
        choice: its JSON.
        answer: the JSON that it is part of.

    Attributes:
        prompt_token_ids: the prompt's token ids, unchecked; None where the server gave none.
        finish_reason: as the server gave it.

    Raises:
        BadAnswerError: there is neither a `message` nor a `text`.
    """

    def __init__(self, choice: Any, answer: Any = None) -> None:
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(message, dict):
            if not isinstance(choice, dict) or "text" not in choice:
                raise BadAnswerError(f"a choice without a message or a text: {_shown(choice)}")
            message = {"content": choice["text"]}
        self._choice, self._message = choice, message
        around = answer if isinstance(answer, dict) else {}
        self.prompt_token_ids = choice.get("prompt_token_ids") or around.get("prompt_token_ids")
        self.finish_reason = choice.get("finish_reason")

    @property
    def message(self) -> dict[str, Any]:
        """The message as the server gave it; of a completion, its text as content."""
        return dict(self._message)

    @property
    def refusal(self) -> str | None:
        """Why the model or a filter withheld the response; None if neither did."""
        if self._ending == "failed":
            return f"the finish reason {self.finish_reason!r}"
        refusal = self._message.get("refusal")
        return f"refused ({refusal})" if refusal else None

    @property
    def truncated(self) -> bool:
        """Whether the response was cut at the token limit.

        Raises:
            BadAnswerError: it neither ended by itself nor was cut there, or the server does not
                say how it ended.
        """
        if self._ending not in ("complete", "cut"):
            reason = self.finish_reason
            raise BadAnswerError(f"the finish reason {reason!r}, which is neither an end nor a cut")
        return self._ending == "cut"

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the response, so that the model wrote no end token.

        None where no stop string did, empty text where the server does not name it. vLLM says so
        in `stop_reason`, SGLang in `matched_stop`, text-generation-inference in the finish reason,
        Anthropic's messages in `stop_sequence`.
        """
        stopped_at = next(
            (at for name in _STOPPED_AT if (at := self._choice.get(name)) is not None), None
        )
        found = stop_string(self.finish_reason, stopped_at)
        return None if found is None else valid(found)

    @property
    def stopped_by_string(self) -> bool:
        """Whether a stop string ended the response."""
        return self.stop_string is not None

    @property
    def _ending(self) -> Ending | None:
        """How the response ended; None for a finish reason that is not listed."""
        try:
            return ending(self.finish_reason)
        except DataError:
            return None

    def text(self, *, beside: Collection[str] = ()) -> str | None:
        """The text; None where the server gave null.

        Args:
            beside: fields of the message that may hold more of what the model wrote.

        Raises:
            BadAnswerError: another field holds more, or the text is invalid (`content_text`).
        """
        for name in BESIDE_TEXT:
            if self._message.get(name) and name not in beside:
                hint = ": start the server without a reasoning parser" if name in REASONING else ""
                raise BadAnswerError(f"a message with {name} apart from its text{hint}")
        content = self._message.get("content")
        return None if content is None else content_text(content)

    @property
    def token_ids(self) -> list[int] | None:
        """Token ids: `token_ids` (vLLM, SGLang), `response_token_ids` (chat completions of SGLang
        since August 2026), or log-probs' tokens of the form token_id:123 (vLLM).

        None where the server gave none: tokens that are text do not determine ids.

        Raises:
            BadAnswerError: they are not valid ids.
        """
        ids = next((own for name in _IDS if (own := self._choice.get(name)) is not None), None)
        if ids is None:
            tokens = self._of_tokens("tokens", "token")
            found = [_TOKEN_ID.fullmatch(str(token)) for token in tokens]
            ids = [int(match[1]) for match in found if match]
            if not ids or len(ids) < len(found):
                return None
        if not (isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**31 for i in ids)):
            raise BadAnswerError(f"token ids that are {_shown(ids)}")
        return ids

    @property
    def logprobs(self) -> list[float]:
        """The log-prob of each token, in nats.

        Raises:
            BadAnswerError: there are none, one is missing, or one is not that of a probability.
        """
        values = self._of_tokens("token_logprobs", "logprob")
        if not values or not all(type(value) in (int, float) for value in values):
            raise BadAnswerError("no log-prob for some token")
        wrong = [value for value in values if not _LOWEST <= value <= _ROUNDING]
        if wrong:
            raise BadAnswerError(
                f"a log-prob of {_shown(wrong[0])}, which is not that of a probability"
            )
        return [float(value) for value in values]

    def _of_tokens(self, completions: str, chat: str) -> list[Any]:
        """Values of all tokens, under their name in completions or in chat completions."""
        found = self._choice.get("logprobs") or {}
        try:
            return list(found.get(completions) or [t.get(chat) for t in found.get("content") or ()])
        except (AttributeError, TypeError) as error:
            raise BadAnswerError(f"log-probs of another shape: {_shown(found)}") from error


def choices_of(answer: Any) -> list[Any]:
    """The JSON of an answer's choices; at least one.

    Raises:
        BadAnswerError: there are none.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices:
        raise BadAnswerError(f"an answer without choices: {_shown(answer)}")
    return choices


def choice_of(answer: Any, number: int) -> AnswerChoice:
    """The choice whose `index` is `number`; choices without one are numbered in order.

    Raises:
        BadAnswerError: there is none, or it is no choice.
    """
    choices = choices_of(answer)
    for position, choice in enumerate(choices):
        if isinstance(choice, dict) and _index(choice, position) == number:
            return AnswerChoice(choice, answer)
    raise BadAnswerError(f"{len(choices)} choices, none of them number {number}")


def _index(choice: Mapping[str, Any], position: int) -> int | None:
    """The index of a choice, or its position; None: an index of another type."""
    index = choice.get("index", position)
    if index is None:
        return position
    return index if type(index) is int else None


def valid(text: str) -> str:
    """A text that Arrow and JSON can store: a lone surrogate as an escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def content_text(content: Any) -> str:
    """A message's content, text or a list of text parts, as text.

    Raises:
        BadAnswerError: it is neither, or not valid Unicode.
    """
    try:
        text = joined_text(content)
    except DataError as error:
        raise BadAnswerError(f"neither text nor a list of text parts: {_shown(content)}") from error
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadAnswerError(f"a text that is not valid Unicode ({error.reason})") from error
    return text


def result_body(result: Any) -> Any:
    """The answer in a line of a batch's result or error file.

    Raises:
        BadAnswerError: the request failed; with the status and the server's message.
    """
    if not isinstance(result, dict):
        raise BadAnswerError(f"status None, a result that is no record: {_shown(result)}")
    response = result.get("response")
    response = response if isinstance(response, dict) else {}
    status, body = response.get("status_code"), response.get("body")
    if status == 200 and not result.get("error"):
        return body
    problem = result.get("error") or body
    while isinstance(problem, dict):
        problem = problem.get("error") or problem.get("message") or str(problem)
    raise BadAnswerError(f"status {status}, {problem}")


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:120]
