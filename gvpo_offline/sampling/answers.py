"""What OpenAI-compatible servers are asked, and what counts as an answer.

Shared by requests that are answered now and by those of batch files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gvpo_offline.errors import ConfigError
from gvpo_offline.openai.answer import (
    CUT,
    BadAnswerError,
    choices_of,
    finish_of,
    text_of,
)
from gvpo_offline.sampling.log import Sample
from gvpo_offline.sampling.prompts import Prompt
from gvpo_offline.sampling.settings import RequestSettings
from gvpo_offline.sampling.stage import SampleRequest

_REASONING = ("reasoning_content", "reasoning")
# Settings of ours that are no fields of OpenAI's API, and their values that need no mention.
_EXTRAS: dict[str, Any] = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def is_chat(settings: RequestSettings, prompt: Prompt) -> bool:
    """Whether the prompt goes to chat completions.

    Raises:
        ConfigError: it is text, and the settings say chat.
    """
    if settings.api == "chat" and prompt.messages is None:
        raise ConfigError(
            "chat completions take chat messages",
            received=f"a prompt that is text ({prompt.source}, row {prompt.row}) with api: chat",
            remedy="set as_chat: true to make it the user's message, or api: completions",
        )
    return prompt.messages is not None and settings.api != "completions"


def request_body(settings: RequestSettings, wanted: Sequence[SampleRequest]) -> dict[str, Any]:
    """The JSON of one request for some responses to one prompt; its seed is the first one's.

    Raises:
        ConfigError: as `is_chat`.
    """
    prompt, chat = wanted[0].prompt, is_chat(settings, wanted[0].prompt)
    body: dict[str, Any] = {"model": settings.model}
    if chat:
        body["messages"] = json.loads(prompt.messages or "")
    elif settings.return_token_ids or prompt.messages is not None:
        # The very tokens: a server would put a beginning token before rendered text once more.
        body["prompt"] = prompt.token_ids.tolist()
    else:
        body["prompt"] = prompt.prompt
    body["temperature"] = settings.temperature
    body["top_p"] = settings.top_p
    body[settings.max_tokens_name] = settings.max_new_tokens
    if settings.send_seed:
        body["seed"] = wanted[0].seed
    if settings.stop:
        body["stop"] = settings.stop
    if len(wanted) > 1:
        body["n"] = len(wanted)
    if settings.logprobs:
        body["logprobs"] = True if chat else 1
    if settings.return_token_ids:
        body["return_token_ids"] = True
    extras = {name: getattr(settings, name) for name in _EXTRAS}
    body |= {name: value for name, value in extras.items() if value != _EXTRAS[name]}
    return body | settings.extra_body


def read_answer(
    settings: RequestSettings, answer: Any, wanted: Sequence[SampleRequest]
) -> list[Sample]:
    """One sample for each response that was asked for, good or failed.

    Args:
        settings: what was asked.
        answer: the JSON of the answer.
        wanted: as `request_body` was given.

    Raises:
        BadAnswerError: it is no answer at all.
        ConfigError: the server's tokens are not the dataset's, or it gives none.
    """
    by_number = choices_of(answer)
    samples = []
    for position, each in enumerate(wanted):
        try:
            if position not in by_number:
                raise BadAnswerError(f"{len(by_number)} choices where {len(wanted)} were asked for")
            samples.append(_sample(settings, answer, by_number[position], each))
        except BadAnswerError as error:
            samples.append(each.failed(str(error)))
    return samples


def _sample(
    settings: RequestSettings,
    answer: Mapping[str, Any],
    choice: Mapping[str, Any],
    wanted: SampleRequest,
) -> Sample:
    finish = finish_of(choice)
    text = _text(choice)
    ids = None
    if settings.return_token_ids:
        ids = _token_ids(answer, choice, wanted.prompt)
    elif not text:
        raise BadAnswerError("an empty text")
    return Sample(
        prompt=wanted.prompt.index,
        number=wanted.number,
        seed=wanted.seed,
        text=text,
        token_ids=ids,
        token_logprobs=_logprobs(choice, ids) if settings.logprobs else None,
        finish_reason=CUT if finish == CUT else "stop",
    )


def _text(choice: Mapping[str, Any]) -> str:
    message = choice.get("message")
    if isinstance(message, dict) and any(message.get(name) for name in _REASONING):
        raise BadAnswerError(
            "reasoning apart from the text, which is then not what was sampled: start the "
            "server without a reasoning parser"
        )
    return text_of(choice)


def _token_ids(answer: Mapping[str, Any], choice: Mapping[str, Any], prompt: Prompt) -> Any:
    ids = choice.get("token_ids")
    if ids is None:
        raise ConfigError(
            "with return_token_ids the server gives token_ids with each choice, as vLLM does",
            received=f"a choice of {', '.join(choice)}",
            remedy="set return_token_ids: false",
        )
    if not (isinstance(ids, list) and ids and all(type(i) is int and 0 <= i < 2**31 for i in ids)):
        raise BadAnswerError(f"token ids that are {json.dumps(ids)[:40]}")
    asked = answer.get("prompt_token_ids") or choice.get("prompt_token_ids")
    if asked is not None and asked != prompt.token_ids.tolist():
        raise ConfigError(
            "with return_token_ids the server's tokenizer and template are the dataset's",
            received=f"other token ids for the prompt of {prompt.source}, row {prompt.row}: "
            f"{len(asked)}, not {len(prompt.token_ids)}",
            remedy="set tokenizer_name_or_path and chat_template to the server's, or api: "
            "completions, which sends the ids",
        )
    return np.array(ids, np.int32)


def _logprobs(choice: Mapping[str, Any], ids: Any) -> Any:
    found = choice.get("logprobs") or {}
    values = found.get("token_logprobs")
    if values is None:
        values = [entry.get("logprob") for entry in found.get("content") or ()]
    if not values or not all(isinstance(value, int | float) for value in values):
        raise BadAnswerError("no log-prob for some token")
    if ids is not None and len(values) != len(ids):
        raise BadAnswerError(f"{len(values)} log-probs for {len(ids)} tokens")
    return np.array(values, np.float32)
