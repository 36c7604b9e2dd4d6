"""What the finish reasons of servers and libraries mean: one table for every log and every answer.

A response is complete (the model ended it, or a stop string did), cut (a limit ended it, so that
the model never wrote its end) or failed (a filter, an error or a client ended it; its text is not
what the model would have said). Words are compared without regard to case, and camelCase, hyphens
and blanks count as underscores: `MAX_TOKENS`, `maxTokens` and `max_tokens` are one word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal

from gvpo_offline.errors import DataError

Ending = Literal["complete", "cut", "failed", "unknown"]
"""How a response ended; unknown where the log does not say."""

# The producers of each word stand beside it. "Responses" is OpenAI's responses API.
COMPLETE: Mapping[str, str] = {
    "stop": "OpenAI, vLLM, SGLang, Gemini, Mistral, Groq, Ollama, llama.cpp",
    "end_turn": "Anthropic, Bedrock",
    "stop_sequence": "Anthropic, Bedrock, Cohere, text-generation-inference, watsonx",
    "stop_criteria_met": "Bedrock (Titan)",
    "eos": "text-generation-webui, Together, llama.cpp",
    "eos_token": "text-generation-inference, watsonx",
    "endoftext": "AI21",
    "complete": "Cohere",
    "completed": "Responses",
    "finish": "Bedrock (Titan)",
    "finished": "Bedrock (Titan)",
    "tool_call": "Cohere, OpenTelemetry",
    "tool_calls": "OpenAI, vLLM, SGLang, Mistral, Groq",
    "tool_use": "Anthropic, Bedrock",
    "function_call": "OpenAI",
}
CUT: Mapping[str, str] = {
    "length": "OpenAI, vLLM, SGLang, Mistral, Groq, text-generation-inference, Bedrock (Titan)",
    "max_tokens": "Anthropic, Bedrock, Gemini, Cohere, watsonx",
    "max_output_tokens": "Responses",
    "max_new_tokens": "logs of transformers",
    "max_length": "logs of transformers",
    "model_length": "Mistral",
    "token_limit": "watsonx",
    "limit": "llama.cpp",
    "time_limit": "watsonx",
    "error_limit": "Cohere",
    "context_length": "prime-rl",
    "context_length_exceeded": "agents",
    "model_context_window_exceeded": "Anthropic, Bedrock",
    "repetition": "vLLM",
    "incomplete": "Responses",
    "truncated": "logs of trainers",
    "pause_turn": "Anthropic",
    "compaction": "Anthropic",
}
FAILED: Mapping[str, str] = {
    "content_filter": "OpenAI, Azure, Responses",
    "content_filtered": "Bedrock",
    "guardrail_intervened": "Bedrock",
    "malformed_model_output": "Bedrock",
    "malformed_tool_use": "Bedrock",
    "safety": "Gemini",
    "image_safety": "Gemini",
    "recitation": "Gemini",
    "language": "Gemini",
    "blocklist": "Gemini",
    "prohibited_content": "Gemini",
    "spii": "Gemini",
    "model_armor": "Gemini",
    "malformed_function_call": "Gemini",
    "unexpected_tool_call": "Gemini",
    "too_many_tool_calls": "Gemini",
    "other": "Gemini",
    "refusal": "Anthropic",
    "error": "Mistral, vLLM, Cohere, OpenRouter, watsonx",
    "error_toxic": "Cohere",
    "abort": "vLLM, SGLang",
    "aborted": "logs of trainers",
    "cancelled": "Responses, watsonx",
    "canceled": "agents",
    "user_cancel": "Cohere",
    "timeout": "Cohere",
    "insufficient_system_resource": "DeepSeek",
    "failed": "Responses",
    "expired": "batch APIs",
    "in_progress": "Responses",
    "queued": "Responses",
    "not_finished": "watsonx",
}
UNKNOWN: Mapping[str, str] = {
    "": "columnar files",
    "none": "null as text",
    "null": "null as text",
    "unknown": "AI SDK",
    "unspecified": "Gemini",
    "finish_reason_unspecified": "Gemini",
}
# Of the complete ones: a stop string ended the response, so the model wrote no end token.
STOP_STRING = ("stop_sequence",)

_ENDINGS: dict[str, Ending] = {
    **dict.fromkeys(COMPLETE, "complete"),
    **dict.fromkeys(CUT, "cut"),
    **dict.fromkeys(FAILED, "failed"),
    **dict.fromkeys(UNKNOWN, "unknown"),
}
# Words of the APIs that call the finish reason `stop_reason`, where others put the stop string.
_API_NAMES = {"Anthropic", "Bedrock", "watsonx"}
_IN_STOP_REASON = {
    word
    for words in (COMPLETE, CUT, FAILED)
    for word, producers in words.items()
    if _API_NAMES & set(producers.split(", "))
}
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")
# As Python prints a member of an enumeration: FinishReason.MAX_TOKENS.
_CLASS = re.compile(r"^(?:finish|stop)_?reason\.")


def normal_form(word: str) -> str:
    """A finish reason as the table spells it."""
    snake = _HUMP.sub("_", word.strip()).lower().replace("-", "_").replace(" ", "_")
    return _CLASS.sub("", snake)


def is_known(word: str) -> bool:
    """Whether the table has a word."""
    return normal_form(word) in _ENDINGS


def is_stop_reason(stopped_at: Any) -> bool:
    """Whether what ended a response is a finish reason, as Anthropic's `stop_reason` is.

    Words such as `stop` are none here: vLLM's `stop_reason` is the stop string, which may be STOP.
    """
    return isinstance(stopped_at, str) and normal_form(stopped_at) in _IN_STOP_REASON


def ending(reason: Any) -> Ending:
    """How a response ended.

    Args:
        reason: a finish reason, a flag (true or 1: cut), null, or SGLang's record
            {"type": word, ...}.

    Raises:
        DataError: it is none of these, or no list has the word.
    """
    reason = reason.get("type") if isinstance(reason, dict) else reason
    if reason is None:
        return "unknown"
    if isinstance(reason, str):
        found = _ENDINGS.get(normal_form(reason))
        if found is not None:
            return found
        if reason.strip().lower() in ("true", "false"):
            raise DataError(
                "truncated is a flag or a finish reason (such as stop, length)",
                received=repr(reason),
                remedy="log the flag itself, not its text",
            )
    elif isinstance(reason, int | float | Decimal) and reason in (0, 1):
        return "cut" if reason else "complete"
    raise DataError(
        f"a finish reason is a flag, null or a word that means complete ({', '.join(COMPLETE)}), "
        f"cut ({', '.join(CUT)}) or failed ({', '.join(FAILED)})",
        received=repr(reason),
        remedy="replace the word in the log by one of these: complete where the model wrote its "
        "end, cut where a limit ended it",
    )


def stop_string(reason: Any, stopped_at: Any = None) -> str | None:
    """The stop string that ended a response; the model wrote no end token then.

    Args:
        reason: the finish reason, as for `ending`.
        stopped_at: what ended the response, as servers give it: a text (the stop string), a token
            id, or null (the end token). A text that `is_stop_reason` is taken as that.

    Returns:
        None where no stop string ended it; empty text where the string is not known.
    """
    if isinstance(reason, dict):  # SGLang: {"type": "stop", "matched": text or token id}
        reason, stopped_at = reason.get("type"), reason.get("matched", stopped_at)
    word = normal_form(reason) if isinstance(reason, str) else None
    if word is not None and _ENDINGS.get(word, "complete") not in ("complete", "unknown"):
        return None
    found = stopped_at if isinstance(stopped_at, str) and stopped_at else None
    if found is not None and is_stop_reason(found):
        word, found = normal_form(found), None
    return "" if found is None and word in STOP_STRING else found


def by_stop_string(reason: Any, stopped_at: Any = None) -> bool:
    """Whether a stop string ended a response; see `stop_string`."""
    return stop_string(reason, stopped_at) is not None
