"""Weave (W&B): exported calls. Calls of the clients of model APIs are read; the others are left out
and counted. Scores are the feedback of a call (scorers, annotations)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from gvpo_offline import values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.annotations import add_score
from gvpo_offline.importing.formats.shared.logged_calls import CallFormat, LoggedCall
from gvpo_offline.importing.formats.shared.spans import as_list, at, parsed
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record

# weave:///entity/project/op/NAME:DIGEST
_OP = re.compile(r"(?:.*/op/)?([^:/]+)(?::.*)?")
# Of the clients that Weave patches; an answer in a form that is not known is refused.
_MODELS = re.compile(
    r"(?:.*\.)?(?:completions\.(?:create|parse)|responses\.(?:create|parse)|chat\.complete|"
    r"litellm\.a?completion|(?:Async)?Messages\.create|generate_content)"
)
_FEEDBACK = re.compile(r"wandb\.(?:runnable|annotation)\.(.+)")


def open_format(config: ImportConfig) -> WeaveFormat:
    """The format; the keys of `reward_weights` are names of scorers and annotations, or
    `scorer.key` where a scorer returns a record."""
    return WeaveFormat(config, "score")


class WeaveFormat(CallFormat):
    """Reads calls."""

    def calls(self, record: Record) -> Iterable[LoggedCall]:
        """See `CallFormat.calls`."""
        name = record.get("op_name")
        found = _OP.fullmatch(name) if isinstance(name, str) else None
        if found is None:
            raise DataError(
                "a row is a call (id, op_name, inputs, output)",
                received=f"op_name {name!r} among {', '.join(record) or 'none'}",
            )
        if not _MODELS.fullmatch(found.group(1)):
            self.others += 1
            return
        sent, returned = parsed(record.get("inputs")), parsed(record.get("output"))
        error = record.get("exception")
        yield LoggedCall(
            key=values.identifier(record.get("id")),
            sent=sent,
            returned=returned,
            model=at(returned, "model") or at(sent, "model"),
            error=f"the exception {str(error)[:200]!r}" if error else None,
            scores=_feedback(record),
        )


def _feedback(record: Record) -> dict[str, Any]:
    given = at(parsed(record.get("summary")), "weave", "feedback") or record.get("feedback")
    scores: dict[str, Any] = {}
    for entry in as_list(given):
        named = _FEEDBACK.fullmatch(str(at(entry, "feedback_type")))
        if named is None:
            continue  # a reaction or a note
        payload = parsed(at(entry, "payload"))
        value = at(payload, "output")
        value = at(payload, "value") if value is None else value
        parts = {f"{named[1]}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {}
        for name, part in (parts or {named[1]: value}).items():
            add_score(scores, {"name": name, "value": part})
    return scores
