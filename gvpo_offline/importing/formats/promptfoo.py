"""promptfoo: results of `promptfoo eval --output` as JSON (`results.results`) or JSON lines.

A result is one response. Results with the same rendered prompt are a group, over repeats, providers
and files; the provider is the sampler. The reward is the result's score; `success` and the named
scores (the `metric` of assertions) are the other components.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gvpo_offline import conversations, values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.failures import set_endings
from gvpo_offline.importing.formats.shared.log_format import InputInfo
from gvpo_offline.importing.formats.shared.named_scores import NamedScores
from gvpo_offline.importing.formats.shared.trainer_logs import (
    RowLocation,
    TrainerFormat,
    one_response,
)
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record
from gvpo_offline.json_text import kind_of

_ERROR = 2  # failureReason: 0 none, 1 an assertion, 2 an error
_CHANGES = ("transform", "postprocess")
# What promptfoo writes before the reasoning of a model, in one text with the answer.
_THINKING = "Thinking: "
_MEDIA = ("images", "audio", "video")
_ATTACKS = ("redteamFinalPrompt", "redteamHistory", "redteamTreeHistory", "messages")


def open_format(config: ImportConfig) -> PromptfooFormat:
    """The format; the keys of `reward_weights` are `score`, `success` and named scores."""
    return PromptfooFormat(config)


class PromptfooFormat(TrainerFormat):
    """Reads the results of evaluations."""

    def __init__(self, config: ImportConfig) -> None:
        super().__init__(config, required=("prompt", "provider", "score"), has_parts=True)
        self._scores = NamedScores(config, "score", default="score")

    def run_of(self, source: InputInfo) -> str:
        """Empty: neither ids nor names depend on the path of a log."""
        return ""

    def dependencies(self, source: InputInfo) -> Mapping[str, str]:
        """None: the fragments depend on the rows and the settings alone."""
        return {}

    def parse(self, record: Record, place: RowLocation) -> Iterable[Fragment]:
        """See `TrainerFormat.parse`."""
        response = values.struct(record.get("response"), "response")
        error = record.get("error") if record.get("failureReason") == _ERROR else None
        error = response.get("error") or error
        if error or record.get("failureReason") == _ERROR:
            self.record_failure(place, f"the error {str(error)[:200]!r}")
            return []
        _check(record, response)
        provider = record["provider"]
        if isinstance(provider, dict):
            provider = provider.get("label") or provider.get("id")
        fragment = one_response(
            reward=None,
            prompt=_prompt(values.struct(record["prompt"], "prompt").get("raw")),
            text=_response(response.get("output")),
            sampler=values.sampler(provider),
        )
        set_endings(fragment, [response.get("finishReason")])
        if fragment.failed is not None and fragment.failed[0] is not None:
            self.record_failure(place, fragment.failed[0])
            return []
        named = values.struct(record.get("namedScores"), "namedScores")
        own = {name: record[name] for name in ("score", "success") if name in record}
        twice = sorted(own.keys() & named.keys())
        if twice:
            raise DataError(
                "a named score has another name than the result's own scores",
                received=", ".join(twice),
                remedy="rename the metric of the assertion",
            )
        return [self._scores.set(fragment, {**own, **named})]

    def finish(self) -> Mapping[str, int]:
        """See `DropsResponses.finish`."""
        found = super().finish()
        self._scores.check()
        return found


def _check(record: Record, response: Mapping[str, Any]) -> None:
    """Raise DataError if the result does not hold what was sent and what the model wrote."""
    options = values.struct(
        values.struct(record.get("testCase"), "testCase").get("options"), "testCase.options"
    )
    changed = [name for name in _CHANGES if options.get(name)]
    if changed:
        raise DataError(
            "response.output is the text that the model wrote",
            received=f"testCase.options.{changed[0]}, which changed it",
            remedy=f"evaluate again without {changed[0]}, or with it in the assertions",
        )
    media = [name for name in _MEDIA if response.get(name)]
    if media:
        raise DataError(
            "a response is text",
            received=f"response.{media[0]}",
            remedy="remove the result: the policy is a language model and writes text alone",
        )
    metadata = values.struct(response.get("metadata"), "response.metadata")
    attacks = [name for name in _ATTACKS if metadata.get(name)]
    if attacks:
        raise DataError(
            "prompt.raw is what was sent to the provider",
            received=f"response.metadata.{attacks[0]}: a red-team strategy sent other messages",
            remedy="remove the results of strategies with several turns",
        )


def _prompt(raw: Any) -> conversations.Prompt:
    if not isinstance(raw, str) or not raw:
        raise DataError("prompt.raw is the prompt", received=repr(raw)[:120])
    if raw.lstrip().startswith("- role:"):
        raise DataError(
            "the messages of a prompt are JSON",
            received=f"YAML: {raw[:80]!r}",
            remedy="write the prompt file as JSON, and evaluate again",
        )
    return conversations.prompt(raw)


def _response(output: Any) -> conversations.Reply:
    """The response: a text, or the list of tool calls that promptfoo makes of a message."""
    if isinstance(output, str) and output.startswith(_THINKING):
        raise DataError(
            "response.output is the text that the model wrote",
            received=f"reasoning that promptfoo put into it: {output[:80]!r}",
            remedy="evaluate again with showThinking: false, or remove the result",
        )
    if isinstance(output, str):
        return conversations.Reply(values.valid_text(output))
    calls = output if isinstance(output, list) else []
    if calls and all(isinstance(call, dict) and "function" in call for call in calls):
        return conversations.response([{"role": "assistant", "content": None, "tool_calls": calls}])
    raise DataError(
        "response.output is the text that the model wrote, or its tool calls",
        received=f"{kind_of(output)}: {str(output)[:120]}",
        remedy="evaluate again without response_format, or remove the result: promptfoo keeps the "
        "parsed JSON, not its text",
    )
