"""Bodies of requests to OpenAI-compatible servers, and the samples in their answers.

Requests over HTTP and requests in batch files share both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from gvpo_offline.errors import ConfigError
from gvpo_offline.group import Int32Array
from gvpo_offline.messages import CONTINUE, with_text_arguments
from gvpo_offline.openai.answer import AnswerChoice, BadAnswerError, choice_of, choices_of
from gvpo_offline.sampling.log import Sample
from gvpo_offline.sampling.prompts import Prompt
from gvpo_offline.sampling.settings import RequestSettings
from gvpo_offline.sampling.stage import SampleRequest

# Settings that OpenAI's API does not have, and their neutral values, which are not sent.
_EXTRAS: dict[str, Any] = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
_CHAT = "chat/completions"
# The longest tokens of published vocabularies are runs of some hundred characters, mostly spaces.
_LONGEST_TOKEN = 1024  # characters


def endpoint(settings: RequestSettings, prompt: Prompt) -> str:
    """The endpoint that a prompt is sent to: chat/completions or completions.

    Raises:
        ConfigError: the prompt is text, and the settings say chat.
    """
    if settings.api == "chat" and prompt.messages is None:
        raise ConfigError(
            "chat completions take chat messages",
            received=f"a text prompt ({prompt.source}, row {prompt.row}) with api: chat",
            remedy="set as_chat: true to make it the user's message, or api: completions",
        )
    return "completions" if prompt.messages is None or settings.api == "completions" else _CHAT


def request_body(settings: RequestSettings, requests: Sequence[SampleRequest]) -> dict[str, Any]:
    """The JSON of one HTTP request for responses to one prompt, with the seed of the first.

    Raises:
        ConfigError: as `endpoint`.
    """
    prompt = requests[0].prompt
    chat = endpoint(settings, prompt) == _CHAT
    body: dict[str, Any] = {"model": settings.model}
    if chat:
        body |= _chat(prompt)
    elif settings.return_token_ids or prompt.messages is not None:
        # Token ids, since a server would add a second beginning token to rendered text.
        body["prompt"] = prompt.token_ids.tolist()
    else:
        body["prompt"] = prompt.prompt
    body["temperature"] = settings.temperature
    body["top_p"] = settings.top_p
    body[settings.max_tokens_name] = settings.max_new_tokens
    if settings.send_seed:
        body["seed"] = requests[0].seed
    if settings.stop:
        body["stop"] = settings.stop
    if len(requests) > 1:
        body["n"] = len(requests)
    if settings.logprobs:
        body["logprobs"] = True if chat else 1
    if settings.return_token_ids:
        body["return_token_ids"] = True
    extras = {name: getattr(settings, name) for name in _EXTRAS}
    body |= {name: value for name, value in extras.items() if value != _EXTRAS[name]}
    return body | settings.extra_body


def _chat(prompt: Prompt) -> dict[str, Any]:
    """The fields of a chat completion's request that make its prompt."""
    messages = json.loads(prompt.messages or "")
    body: dict[str, Any] = {"messages": with_text_arguments(messages)}
    arguments = json.loads(prompt.template_arguments) if prompt.template_arguments else {}
    continued = arguments.pop(CONTINUE, messages[-1]["role"] == "assistant")
    if continued:  # else servers close the last message and open another one
        body |= {CONTINUE: True, "add_generation_prompt": False}
    if tools := arguments.pop("tools", None):
        body["tools"] = tools
    if arguments:
        body["chat_template_kwargs"] = arguments
    return body


def read_answer(
    settings: RequestSettings, answer: Any, requests: Sequence[SampleRequest]
) -> list[Sample]:
    """One sample for each requested response: the response, or the cause of its failure.

    Args:
        settings: of the sampler.
        answer: the JSON of the answer.
        requests: as `request_body` was given.

    Raises:
        BadAnswerError: the answer has no choices.
        ConfigError: the server's tokens are not the dataset's, or it returns none.
    """
    choices_of(answer)
    samples = []
    for number, request in enumerate(requests):
        try:
            samples.append(_sample(settings, choice_of(answer, number), request))
        except BadAnswerError as error:
            samples.append(request.failed(str(error)))
    return samples


def _sample(settings: RequestSettings, choice: AnswerChoice, request: SampleRequest) -> Sample:
    truncated = choice.truncated
    text = choice.text()
    if text is None:
        raise BadAnswerError(choice.refusal or "a text that is null")
    if len(text) > _LONGEST_TOKEN * settings.max_new_tokens:
        raise BadAnswerError(
            f"a text of {len(text):,} characters for at most {settings.max_new_tokens:,} tokens"
        )
    ids = _token_ids(choice, request.prompt) if settings.return_token_ids else None
    if ids is None and not text:
        raise BadAnswerError("an empty text")
    logprobs = choice.logprobs if settings.logprobs else None
    if ids is not None and logprobs is not None and len(logprobs) != len(ids):
        raise BadAnswerError(f"{len(logprobs)} log-probs for {len(ids)} tokens")
    return Sample(
        prompt=request.prompt.index,
        number=request.number,
        seed=request.seed,
        text=text,
        token_ids=ids,
        token_logprobs=None if logprobs is None else np.array(logprobs, np.float32),
        finish_reason="length" if truncated else "stop",
        stop_string=choice.stop_string,
    )


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value)


def _token_ids(choice: AnswerChoice, prompt: Prompt) -> Int32Array:
    ids = choice.token_ids
    if ids is None:
        raise ConfigError(
            "with return_token_ids the server returns token ids with each choice, as vLLM and "
            "SGLang do",
            received="a choice without token_ids or response_token_ids",
            remedy="set return_token_ids: false",
        )
    if not ids:
        raise BadAnswerError("an empty list of token ids")
    sent = choice.prompt_token_ids
    if sent is not None and not _is_ids(sent):
        raise BadAnswerError(f"prompt_token_ids that are {str(sent)[:80]}")
    if sent is not None and sent != prompt.token_ids.tolist():
        raise ConfigError(
            "with return_token_ids the server's tokenizer and template are the dataset's",
            received=f"other token ids for the prompt of {prompt.source}, row {prompt.row} "
            f"(the dataset has {len(prompt.token_ids)})",
            remedy="set tokenizer_name_or_path and chat_template to the server's, or api: "
            "completions, which sends the ids",
        )
    return np.array(ids, np.int32)
