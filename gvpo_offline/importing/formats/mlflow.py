"""MLflow: traces as JSON (`Trace.to_json`, `mlflow traces get`, tables of `search_traces`).

Spans of type LLM and CHAT_MODEL are calls of models; the others are left out and counted. Scores
are the assessments (feedback) of a span, or of a trace with one such span.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from typing import Any

from gvpo_offline import values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.annotations import add_score
from gvpo_offline.importing.formats.shared.logged_calls import CallFormat, LoggedCall
from gvpo_offline.importing.formats.shared.spans import as_list, at, error_of, parsed, span_id
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record
from gvpo_offline.json_text import loads

# What MLflow's own judges say.
LABELS = {"yes": 1.0, "no": 0.0}
_MODELS = ("LLM", "CHAT_MODEL")
_SPAN_ID_BYTES = 8


def open_format(config: ImportConfig) -> MLflowFormat:
    """The format; the keys of `reward_weights` are names of assessments."""
    return MLflowFormat(config, "assessment", LABELS)


class MLflowFormat(CallFormat):
    """Reads traces."""

    def calls(self, record: Record) -> Iterable[LoggedCall]:
        """See `CallFormat.calls`."""
        trace = values.struct(parsed(record.get("trace")) or record, "trace")
        spans = at(parsed(at(trace, "data")), "spans")
        spans = as_list(trace.get("spans") if spans is None else spans)
        if not spans:
            raise DataError(
                "a row is a trace with its spans (data.spans)",
                received=f"the columns {', '.join(record) or 'none'}",
                remedy="export the traces with their spans",
            )
        spans = values.structs(spans, "spans")
        own = [span for span in spans if _attribute(span, "mlflow.spanType") in _MODELS]
        self.others += len(spans) - len(own)
        given = at(trace, "info", "assessments") or trace.get("assessments")
        scores = self._assessed(as_list(given), [_id(span) for span in own])
        for span in own:
            sent = _attribute(span, "mlflow.spanInputs")
            returned = _attribute(span, "mlflow.spanOutputs")
            named = _attribute(span, "mlflow.llm.model")
            yield LoggedCall(
                key=_id(span),
                sent=sent,
                returned=returned,
                model=at(returned, "model") or named or at(sent, "model"),
                error=error_of(span),
                tools=as_list(_attribute(span, "mlflow.chat.tools")),
                scores=scores.get(_id(span), {}),
            )

    def _assessed(self, given: list[Any], ids: list[str | None]) -> dict[str | None, Any]:
        """The feedback of each span."""
        scores: dict[str | None, dict[str, Any]] = {}
        for entry in given:
            feedback = at(entry, "feedback")
            if feedback is None or at(entry, "valid") is False:
                continue  # an expectation, or replaced by a later one
            key = at(entry, "span_id")
            key = _hex(key) if key else (ids[0] if len(ids) == 1 else None)
            if key in ids:
                name = at(entry, "assessment_name") or at(entry, "name")
                value = at(feedback, "value")
                add_score(scores.setdefault(key, {}), {"name": name, "value": value})
            else:
                self.unused += 1
        return scores


def _attribute(span: Mapping[str, Any], name: str) -> Any:
    """An attribute, which MLflow holds as JSON text, also where it is a text."""
    value = values.struct(parsed(span.get("attributes")) or {}, "the attributes of a span")
    found = value.get(name)
    if isinstance(found, str) and found.startswith('"'):
        try:
            return loads(found)
        except ValueError:
            return found
    return parsed(found)


def _id(span: Mapping[str, Any]) -> str | None:
    named = span.get("span_id")
    return _hex(named) if isinstance(named, str) and named else span_id(span)


def _hex(value: Any) -> str:
    """A span's id in hexadecimal digits; MLflow 3 writes it as base64."""
    name = values.text(value, "the id of a span")
    try:
        found = base64.b64decode(name, validate=True)
    except (binascii.Error, ValueError):
        found = b""
    return found.hex() if len(found) == _SPAN_ID_BYTES else name.lower().removeprefix("0x")
