"""Spans of OpenTelemetry, with the attributes of its GenAI conventions or of OpenInference.

Each span of a request to a model is a row of responses: the messages sent are the prompt, each
choice is a response, and responses to one prompt are a group. Spans of tools, agents, chains and
retrievers are left out and counted. Scores are annotations of the span: in the file that `rewards`
names, or in the span itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from gvpo_offline import conversations, values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.annotations import Annotations, scores_in
from gvpo_offline.importing.formats.shared.failures import set_endings
from gvpo_offline.importing.formats.shared.log_format import InputInfo
from gvpo_offline.importing.formats.shared.named_scores import NamedScores
from gvpo_offline.importing.formats.shared.span_messages import Generation, generation
from gvpo_offline.importing.formats.shared.spans import (
    error_of,
    span_attributes,
    span_id,
    spans_of,
)
from gvpo_offline.importing.formats.shared.trainer_logs import (
    RowLocation,
    TrainerFormat,
    one_response,
)
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record

_PREFIXES = ("llm", "gen_ai", "openinference", "output")


def open_format(config: ImportConfig) -> OtelFormat:
    """The format; the keys of `reward_weights` are names of annotations."""
    return OtelFormat(config)


class OtelFormat(TrainerFormat):
    """Reads spans: of OTLP's JSON, of Phoenix, and of the exporters of the SDKs."""

    def __init__(self, config: ImportConfig) -> None:
        super().__init__(config, required=(), has_parts=True)
        self._scores = NamedScores(config, "annotation")
        self._annotations = (
            None if config.rewards is None else Annotations(config.rewards, config.limits)
        )
        self._expects_scores = bool(
            config.rewards or config.reward_weights or config.missing_rewards == "drop"
        )
        self._others = 0

    def run_of(self, source: InputInfo) -> str:
        """Empty: neither ids nor names depend on the path of a log."""
        return ""

    def dependencies(self, source: InputInfo) -> Mapping[str, str]:
        """The SHA-256 of the file of annotations."""
        return {} if self._annotations is None else {"rewards": self._annotations.describe()}

    def parse(self, record: Record, place: RowLocation) -> Iterable[Fragment]:
        """See `TrainerFormat.parse`."""
        found: list[Fragment] = []
        for span in spans_of(record):
            key = span_id(span)
            attributes = span_attributes(span, _PREFIXES)
            if not attributes and key is None:
                raise DataError(
                    "a row is a span, or a list of spans",
                    received=f"the columns {', '.join(span) or 'none'}",
                    remedy="choose the log's format; if the spans are below a field of a JSON "
                    "file, set rows_at to it",
                )
            error = error_of(span)
            try:
                made = generation(attributes, span.get("span_kind"))
            except DataError:
                if error is None:
                    raise
                self.record_failure(place, error)
                continue
            if made is None:
                self._others += 1
            elif error is not None:
                self.record_failure(place, error)
            else:
                found += self._responses(made, span, key, place)
        return found

    def _responses(
        self, made: Generation, span: Mapping[str, Any], key: str | None, place: RowLocation
    ) -> Sequence[Fragment]:
        scores = scores_in(span, partial(span_attributes, prefixes=("gen_ai",)))
        if self._annotations is not None:
            scores |= self._annotations.of(key)
        found = []
        for number, (response, reason) in enumerate(zip(made.responses, made.reasons, strict=True)):
            fragment = one_response(
                reward=None,
                prompt=conversations.prompt(made.prompt or None),
                text=conversations.response(response),
                arguments=conversations.template_arguments({"tools": made.tools}),
                sampler=values.sampler(made.model),
                response_id=key if key is None or number == 0 else f"{key}#{number}",
            )
            set_endings(fragment, [reason])
            if fragment.failed is not None and fragment.failed[0] is not None:
                self.record_failure(place, fragment.failed[0])
                continue
            if scores and len(made.responses) > 1:
                raise DataError(
                    "an annotation scores a span of one response",
                    received=f"{len(made.responses)} responses with one value of "
                    f"{', '.join(scores)}",
                    remedy="remove the span, or its annotations",
                )
            if not scores and not self._expects_scores:
                fragment.rewards = None  # a log without scores
            else:
                self._scores.set(fragment, scores)
            found.append(fragment)
        return found

    def finish(self) -> Mapping[str, int]:
        """See `DropsResponses.finish`; spans of other kinds are counted."""
        found = super().finish()
        self._scores.check()
        unused = 0 if self._annotations is None else len(self._annotations.unused)
        return {**found, "dropped_other_spans": self._others, "unused_annotations": unused}
