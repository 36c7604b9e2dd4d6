"""verl: what its trainers write to `rollout_data_dir` and `validation_data_dir`, `<step>.jsonl`.

Responses with one `uid` at one step are a group; without a uid, responses to one `input` are. The
run is the folder that holds the files. verl's newer trainers write a uid per response,
`<uid>_<session>_<output>`, of which the first part is the group's.

The texts were decoded without special tokens: a prompt lacks its chat template's markers, and
whether a response was cut can no longer be seen. That is said once, in a warning.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from gvpo_offline import values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.trainer_logs import (
    RowLocation,
    TrainerFormat,
    group_id,
    one_response,
)
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record

_RESPONSE_UID = re.compile(r"(.+)_(\d+)_(\d+)")
_log = logging.getLogger(__name__)


def open_format(config: ImportConfig) -> VerlFormat:
    """The format; the reward is `score`."""
    return VerlFormat(config)


class VerlFormat(TrainerFormat):
    """Rows of verl's dumps of generations."""

    def __init__(self, config: ImportConfig) -> None:
        super().__init__(config, required=("input", "output", "score", "step"))
        self._warned = False

    def parse(self, record: Record, place: RowLocation) -> Iterable[Fragment]:
        """See `TrainerFormat.parse`."""
        self._warn(place)
        uid = record.get("uid")
        request = record.get("request_id")
        fragment = one_response(
            prompt=values.prompt(record["input"]),
            text=values.response(record["output"]),
            reward=values.number(record["score"], "score"),
            sampler=f"{place.run}@{record['step']}",
            response_id=None if request is None else values.identifier(request),
        )
        if uid is None:
            fragment.group_id = group_id(fragment, place.run, record["step"])
        else:
            fragment.group_id = f"{place.run}/{record['step']}/{_group_uid(uid)}"
        return [fragment]

    def _warn(self, place: RowLocation) -> None:
        if self._warned:
            return
        self._warned = True
        _log.warning(
            "%s: verl logs text without special tokens. Prompts are tokenised as they stand, "
            "without the markers of a chat template, and responses that were cut at the length "
            "limit look whole.",
            place.label,
        )


def _group_uid(value: object) -> str:
    uid = values.identifier(value)
    found = _RESPONSE_UID.fullmatch(uid)
    if found is None:
        return uid
    if int(found[3]):
        raise DataError(
            "a response is all that the policy wrote",
            received=f"output {found[3]} of the session {found[1]}_{found[2]}, which has several",
            remedy="import such sessions from their token ids, with a loss mask",
        )
    return found[1]
