"""Langfuse: exported observations, and downloaded traces with their observations and scores.

Observations of type GENERATION are calls of models; the others are left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gvpo_offline import values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.annotations import add_score
from gvpo_offline.importing.formats.shared.logged_calls import CallFormat, LoggedCall
from gvpo_offline.importing.formats.shared.spans import as_list
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record


def open_format(config: ImportConfig) -> LangfuseFormat:
    """The format; the keys of `reward_weights` are names of scores."""
    return LangfuseFormat(config, "score")


class LangfuseFormat(CallFormat):
    """Reads observations, also below a trace or a page of the API."""

    def calls(self, record: Record) -> Iterable[LoggedCall]:
        """See `CallFormat.calls`."""
        inner = record.get("observations", record.get("data"))
        if inner is None:
            rows: list[Any] = [record]
        else:
            rows = as_list(inner)
        if not rows or not all(isinstance(row, dict) and "type" in row for row in rows):
            raise DataError(
                "a row is an observation (id, type, input, output), or holds observations",
                received=f"the columns {', '.join(record) or 'none'}",
                remedy="export observations, not traces",
            )
        own = [row for row in rows if row["type"] == "GENERATION"]
        self.others += len(rows) - len(own)
        scores: dict[str, dict[str, Any]] = {}
        for score in values.structs(as_list(record.get("scores")), "scores"):
            key = score.get("observationId") or score.get("observation_id")
            # A score of the trace is that of its only generation.
            if key is None and len(own) == 1:
                key = own[0].get("id")
            if key in [row.get("id") for row in own]:
                add_score(scores.setdefault(str(key), {}), score)
            else:
                self.unused += 1
        for row in own:
            yield _call(row, scores.get(str(row.get("id")), {}))


def _call(row: Mapping[str, Any], scores: dict[str, Any]) -> LoggedCall:
    error = None
    if row.get("level") == "ERROR":
        said = row.get("statusMessage") or row.get("status_message")
        error = f"an observation of level ERROR: {str(said)[:200]}"
    return LoggedCall(
        key=values.identifier(row.get("id")),
        sent=row.get("input"),
        returned=row.get("output"),
        model=row.get("model") or row.get("provided_model_name"),
        error=error,
        scores=scores,
    )
