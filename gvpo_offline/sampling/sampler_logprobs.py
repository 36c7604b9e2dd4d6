"""The log-prob of a sampled response under its sampler: the dataset's `sampler_seq_logprobs`.

It is log mu(y | x), the sum over the response's tokens, in nats, of their log-probs under the
distribution that they were drawn from: after a repetition penalty, temperature, top_k, top_p and
min_p, under the sampler's own system prompt, and with the end token where the model wrote one.
Those are the tokens that the loss counts. A response that greedy decoding gave has log-prob 0: the
sampler gives it with certainty.

Where the logged numbers are of another distribution or of other tokens, there is no value, and a
cause.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gvpo_offline.sampling.log import Sample
from gvpo_offline.sampling.settings import (
    RequestSettings,
    SamplingSettings,
    TransformersSettings,
    VllmSettings,
)

# Settings of a distribution that is the model's own, and the values that mean so.
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "temperature": (1,),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
}
# Not sent at these values, so that the server's own defaults apply (a vLLM server takes them from
# the model's generation_config.json).
_SERVER_DEFAULTS = ("top_k", "min_p", "repetition_penalty")
# Fields of a request that change no probability, and those that do unless they have this value.
_HARMLESS = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "priority", "request_id", "seed"),
        *("stop", "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens"),
        *("spaces_between_special_tokens", "max_tokens", "max_completion_tokens"),
        *("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools"),
        *("add_special_tokens", "return_tokens_as_token_ids", "return_token_ids"),
        "prompt_logprobs",
    }
)
_NEUTRAL_FIELDS: dict[str, tuple[Any, ...]] = {
    **_NEUTRAL,
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_tokens"), (0,)),
    "length_penalty": (1,),
    **dict.fromkeys(("logit_bias", "bad_words", "allowed_token_ids"), ({}, [])),
    "ignore_eos": (False,),
    "top_logprobs": (0, 1, 2, 3, 4, 5),
    "logprobs": (True, 0, 1, 2, 3, 4, 5),
}
# What servers write for the log-prob of a very unlikely token (OpenAI, vLLM).
_UNLIKELY = -9999.0
# A log-prob of 0 may be this much above it: the rounding of a log-softmax in bfloat16, which errs
# by 2^-9 of a value of order 1.
_ROUNDING = 2.0**-8


def other_distribution(settings: SamplingSettings) -> str | None:
    """Why a sampler's token log-probs are not those of the distribution it draws from.

    Returns:
        The cause, with the remedy where there is one; None if they are.
    """
    if isinstance(settings, TransformersSettings):
        return None
    if isinstance(settings, VllmSettings):
        return _of_vllm(settings)
    assert isinstance(settings, RequestSettings)
    return _of_server(settings)


def sequence_logprob(sample: Sample, settings: SamplingSettings) -> float | str:
    """The log-prob of a response under its sampler, or why there is none.

    Args:
        sample: the response, with its tokens' log-probs.
        settings: of its sampler, whose log-probs are those of the distribution that it draws from.

    Returns:
        Nats; a text that says the cause.
    """
    if sample.token_ids is None:
        return "the sampler's tokenizer is not the dataset's"
    if settings.temperature == 0:
        return 0.0
    values = sample.token_logprobs
    if values is None or len(values) != len(sample.token_ids):
        return "no log-prob of each token was logged"
    if not (np.isfinite(values).all() and (values > _UNLIKELY).all()):
        return f"a token's log-prob is {values.min():g}, which servers write for very unlikely ones"
    if values.max() > _ROUNDING:
        return "a token's log-prob is above 0: the server reports logits, or something else"
    return float(values.sum(dtype=np.float64))


def lines_about_gaps(gaps: Mapping[str, Mapping[str, int]]) -> Iterable[str]:
    """Lines for the user: which samplers' responses have no log-prob, and why.

    Args:
        gaps: number of responses by cause, by sampler.
    """
    for name, causes in gaps.items():
        for cause, n in causes.items():
            yield f"sampler {name}: {n:,} responses without sampler log-prob: {cause}"
    if gaps:
        yield (
            "sampler_seq_logprobs is empty in every group with such a response; only topr and "
            "importance weights need it"
        )


def _changed(settings: SamplingSettings) -> list[str]:
    """The settings with which the distribution is not the model's own, as `name: value`."""
    values = {name: getattr(settings, name) for name in _NEUTRAL}
    return [f"{name}: {v:g}" for name, v in values.items() if v not in _NEUTRAL[name]]


def _of_vllm(settings: VllmSettings) -> str | None:
    mode = settings.engine.get("logprobs_mode", "processed_logprobs")
    if mode == "processed_logprobs":
        return None
    changed = _changed(settings)
    if mode == "raw_logprobs" and not changed and not settings.engine.get("logits_processors"):
        return None
    return (
        f"engine.logprobs_mode: {mode} gives log-probs of another distribution"
        + (f" ({', '.join(changed)})" if changed else "")
        + "; leave it out"
    )


def _of_server(settings: RequestSettings) -> str | None:
    if not settings.logprobs:
        return "they are not requested; set logprobs: true"
    if not settings.return_token_ids:
        return (
            "the text is tokenised here, perhaps to other tokens than the sampled ones; set "
            "return_token_ids: true, if the server has it"
        )
    if changed := _changed(settings):
        return (
            f"with {', '.join(changed)} a server may report log-probs from before temperature and "
            "filters"
        )
    body = settings.extra_body
    odd = [
        f"{name}: {value}"
        for name, value in body.items()
        if name not in _HARMLESS and value is not None
        if not any(value == neutral for neutral in _NEUTRAL_FIELDS.get(name, ()))
    ]
    if odd:
        return f"extra_body sets {', '.join(odd)}, which may change the distribution"
    if unset := [name for name in _SERVER_DEFAULTS if body.get(name) is None]:
        return (
            f"the server may have defaults of its own of {', '.join(unset)}; set extra_body: "
            "{top_k: -1, min_p: 0, repetition_penalty: 1}"
        )
    return None
