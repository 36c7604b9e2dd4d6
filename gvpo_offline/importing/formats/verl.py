"""verl: `<step>.jsonl`, which its trainers write to `rollout_data_dir` and `validation_data_dir`.

Responses with the same `uid` at one step are a group; without a uid, responses to the same `input`
are. The run is the name of the folder that holds the files. verl's newer trainers write one uid per
response, `<uid>_<session>_<output>`; its first part identifies the group.

verl decodes texts without special tokens: prompts lack the markers of the chat template, and the
log does not show whether a response was truncated. One warning per import says so.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from gvpo_offline import conversations, values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.trainer_logs import (
    RowLocation,
    TrainerFormat,
    group_id,
    one_response,
    step_name,
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
    """Reads the rows of verl's dumped generations."""

    def __init__(self, config: ImportConfig) -> None:
        super().__init__(config, required=("input", "output", "score", "step"))
        self._warned = False

    def parse(self, record: Record, place: RowLocation) -> Iterable[Fragment]:
        """See `TrainerFormat.parse`."""
        self._warn(place)
        uid = record.get("uid")
        request = record.get("request_id")
        fragment = one_response(
            prompt=conversations.prompt(record["input"]),
            text=conversations.response(record["output"]),
            arguments=conversations.template_arguments(record),
            reward=self.reward(record["score"], "score"),
            sampler=f"{place.run}@{step_name(record['step'])}",
            response_id=None if request is None else values.identifier(request),
        )
        if uid is None:
            fragment.group_id = group_id(fragment, place.run, step_name(record["step"]))
        else:
            fragment.group_id = f"{place.run}/{step_name(record['step'])}/{_group_uid(uid)}"
        return [fragment]

    def _warn(self, place: RowLocation) -> None:
        if self._warned:
            return
        self._warned = True
        _log.warning(
            "%s: verl logs text without special tokens. Prompts are tokenised as logged, without "
            "the markers of the chat template, and responses that were truncated at the length "
            "limit are imported as complete.",
            place.label,
        )


def _group_uid(value: object) -> str:
    uid = values.identifier(value)
    found = _RESPONSE_UID.fullmatch(uid)
    if found is None:
        return uid
    if int(found[3]):
        raise DataError(
            "a response holds everything that the policy wrote",
            received=f"output {found[3]} of session {found[1]}_{found[2]}, which has several",
            remedy="import such sessions from their token ids, with a loss mask",
        )
    return found[1]
