"""HelpSteer2 (and HelpSteer): a prompt, a response, five attributes rated 0 to 4 by annotators.

A prompt of several turns contains turn markers in its text. The data set has the two responses to a
prompt in consecutive rows; responses are grouped by prompt, whatever the order of the rows.
"""

from __future__ import annotations

import re

from gvpo_offline import conversations, values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.row_format import RowFormat, text_fragment
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record

# The weights with which the data set's authors combine the five attributes into one reward; source:
# model card of nvidia/Llama3-70B-SteerLM-RM.
WEIGHTS = {
    "helpfulness": 0.65,
    "correctness": 0.8,
    "coherence": 0.45,
    "complexity": 0.55,
    "verbosity": -0.4,
}
_MARKER = re.compile(r"\n<extra_id_1>(User|Assistant)\n")


def open_format(config: ImportConfig) -> RowFormat:
    """One response per row; the reward is the weighted sum of the attributes."""
    return RowFormat(config, required=("prompt", "response", *WEIGHTS), parse=_parse, parts=WEIGHTS)


def _parse(record: Record) -> list[Fragment]:
    return [
        text_fragment(
            _prompt(record["prompt"]),
            [record["response"]],
            parts={name: [values.number(record[name], name)] for name in WEIGHTS},
        )
    ]


def _prompt(text: object) -> conversations.Prompt:
    if not isinstance(text, str):
        return conversations.conversation([text])
    first, *rest = _MARKER.split(text)
    roles = rest[::2]
    if roles != ["Assistant", "User"] * (len(roles) // 2):
        raise DataError(
            "the turns of a prompt alternate between user and assistant, the user's first and last",
            received=text,
            remedy="correct or remove the row",
        )
    return conversations.conversation([first, *rest[1::2]])
