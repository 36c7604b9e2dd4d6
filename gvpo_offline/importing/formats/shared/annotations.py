"""Scores of spans and observations in a file of their own, by the id of what they score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gvpo_offline import values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.fragment import with_location
from gvpo_offline.importing.sources.inputs import find_sources
from gvpo_offline.limits import Limits
from gvpo_offline.paths import MISSING, value_at

__all__ = ["Annotations", "add_score", "scores_in"]

# The names of Phoenix (API, data frames), OpenTelemetry's results, Langfuse and LangSmith.
_IDS = ("span_id", "context.span_id", "spanId", "observationId", "observation_id", "run_id")
_NAMES = ("name", "annotation_name", "gen_ai.evaluation.name", "key")
_NUMBERS = (*("score", "result.score", "value", "gen_ai.evaluation.score.value"),)
_LABELS = (
    *("label", "result.label", "stringValue", "string_value", "gen_ai.evaluation.score.label"),
)


class Annotations:
    """The scores in a file, held in memory.

    Args:
        pattern: file or glob, of any kind that inputs may have.
        limits: as for `find_sources`.

    Attributes:
        unused: ids that no response had so far.
    """

    def __init__(self, pattern: str, limits: Limits | None = None) -> None:
        self._pattern = pattern
        self._limits = limits
        self._scores: dict[str, dict[str, Any]] | None = None
        self.unused: set[str] = set()

    def describe(self) -> str:
        """The SHA-256 of the files."""
        return " ".join(
            s.sha256(lambda _: None) for s in find_sources(self._pattern, limits=self._limits)
        )

    def of(self, key: str | None) -> Mapping[str, Any]:
        """The scores of an id by name.

        Raises:
            DataError: a row of the file has no id or name, or an id has two scores of one name.
        """
        if self._scores is None:
            self._scores = self._load()
            self.unused = set(self._scores)
        if key is None:
            return {}
        self.unused.discard(key)
        return self._scores.get(key, {})

    def _load(self) -> dict[str, dict[str, Any]]:
        scores: dict[str, dict[str, Any]] = {}
        for source in find_sources(self._pattern, limits=self._limits):
            for row, given in source.rows(None, lambda _: None):
                record = given if source.columns is None else values.with_lists(given)
                inner = record.get("data")
                for entry in inner if isinstance(inner, list) else [record]:
                    try:
                        _check(entry)
                        key = _first(entry, _IDS)
                        if not isinstance(key, str):
                            raise DataError(
                                "an annotation names what it scores",
                                received=f"no {', '.join(_IDS)} among {', '.join(entry)}",
                                remedy="leave out annotations of traces, sessions and documents",
                            )
                        own = scores.setdefault(key.lower().removeprefix("0x"), {})
                        add_score(own, entry)
                    except DataError as error:
                        raise with_location(error, file=source.label, row=row) from None
        return scores


def add_score(scores: dict[str, Any], entry: Mapping[str, Any]) -> None:
    """Add one annotation: its number, else its label; a note, which has neither, is left out.

    Raises:
        DataError: it has no name, or `scores` has another of that name.
    """
    name = _first(entry, _NAMES)
    if not isinstance(name, str) or not name:
        raise DataError(
            "an annotation has a name",
            received=f"the fields {', '.join(entry)}",
            remedy=f"name the field one of {', '.join(_NAMES)}",
        )
    number = _first(entry, _NUMBERS)
    value = _first(entry, _LABELS) if number is None else number
    if value is None:
        return
    if name in scores and scores[name] != value:
        raise DataError(
            "a response has one annotation of each name",
            received=f"{name}: {scores[name]!r} and {value!r}",
            remedy="keep the annotation of one annotator, or rename the others",
        )
    scores[name] = value


def scores_in(span: Mapping[str, Any], attributes_of: Any) -> dict[str, Any]:
    """The scores that a span holds itself: its `annotations`, and its events
    `gen_ai.evaluation.result`.

    Args:
        span: the span.
        attributes_of: returns the attributes of an event as a record of nested records.

    Raises:
        DataError: as `add_score`.
    """
    scores: dict[str, Any] = {}
    for entry in values.entries(span.get("annotations") or [], "the annotations of a span"):
        _check(entry)
        add_score(scores, entry)
    for event in values.entries(span.get("events") or [], "the events of a span"):
        if isinstance(event, dict) and event.get("name") == "gen_ai.evaluation.result":
            add_score(scores, attributes_of(event))
    return scores


def _check(entry: Any) -> None:
    if not isinstance(entry, dict):
        raise DataError("an annotation is a record", received=repr(entry))


def _first(entry: Mapping[str, Any], paths: tuple[str, ...]) -> Any:
    for path in paths:
        found = value_at(entry, path)
        if found is not None and found is not MISSING and found != "" and found == found:
            return found
    return None
