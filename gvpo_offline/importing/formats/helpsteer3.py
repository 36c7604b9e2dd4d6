"""HelpSteer3 preferences: a context, two responses, an annotators' preference from -3 to 3.

-3 means that response 1 is much better, 3 that response 2 is much better.
"""

from __future__ import annotations

from gvpo_offline import conversations, values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.row_format import RowFormat, comparison_id, text_fragment
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record


def open_format(config: ImportConfig) -> RowFormat:
    """One group per row; the rewards of response 1 and 2 are -preference/2 and preference/2."""
    return RowFormat(
        config,
        required=("context", "response1", "response2", "overall_preference"),
        parse=_parse,
    )


def _parse(record: Record) -> list[Fragment]:
    preference = values.number(record["overall_preference"], "overall_preference")
    if preference is not None and not -3 <= preference <= 3:
        raise DataError("overall_preference lies between -3 and 3", received=preference)
    prompt = conversations.prompt(record["context"])
    responses = [record["response1"], record["response2"]]
    return [
        text_fragment(
            prompt,
            responses,
            [None, None] if preference is None else [-preference / 2, preference / 2],
            group_id=comparison_id(prompt, responses),
        )
    ]
