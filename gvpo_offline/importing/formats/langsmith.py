"""LangSmith: exported runs.

Runs of type llm are calls of models; the others are left out and counted. Feedback is in the file
that `rewards` names, or in `feedback_stats`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gvpo_offline import values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.logged_calls import CallFormat, LoggedCall
from gvpo_offline.importing.formats.shared.spans import as_list, at, parsed
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record

_MODEL_NAMES = ("model", "model_name")


def open_format(config: ImportConfig) -> LangSmithFormat:
    """The format; the keys of `reward_weights` are keys of feedback."""
    return LangSmithFormat(config, "feedback")


class LangSmithFormat(CallFormat):
    """Reads runs."""

    def calls(self, record: Record) -> Iterable[LoggedCall]:
        """See `CallFormat.calls`."""
        rows = as_list(record.get("runs")) or [record]
        for row in values.structs(rows, "runs"):
            if "run_type" not in row:
                raise DataError(
                    "a row is a run (id, run_type, inputs, outputs)",
                    received=f"the columns {', '.join(row) or 'none'}",
                )
            if row["run_type"] != "llm":
                self.others += 1
                continue
            error = row.get("error")
            yield LoggedCall(
                key=values.identifier(row.get("id")),
                sent=row.get("inputs"),
                returned=row.get("outputs"),
                model=_model(row),
                error=f"the error {str(error)[:200]!r}" if error else None,
                tools=as_list(at(parsed(row.get("extra")), "invocation_params", "tools")),
                scores=_feedback(parsed(row.get("feedback_stats"))),
            )


def _model(row: Record) -> Any:
    extra, inputs = parsed(row.get("extra")), parsed(row.get("inputs"))
    named = at(extra, "metadata", "ls_model_name")
    asked = [at(extra, "invocation_params", name) for name in _MODEL_NAMES]
    return next((name for name in (named, *asked, at(inputs, "model")) if name), None)


def _feedback(stats: Any) -> dict[str, Any]:
    """The scores of a run, of which LangSmith keeps number and mean.

    Raises:
        DataError: a mean of several.
    """
    found = {}
    for name, own in (stats if isinstance(stats, dict) else {}).items():
        if not at(own, "n"):
            continue
        if own["n"] != 1:
            raise DataError(
                "a run has one feedback of each key",
                received=f"{name}: {own['n']}, of which feedback_stats has the mean",
                remedy="export the feedback, keep one annotator's, and set rewards to that file "
                "and remove feedback_stats from the runs",
            )
        found[name] = own.get("avg")
    return found
