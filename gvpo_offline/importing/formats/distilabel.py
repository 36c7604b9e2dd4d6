"""Output of distilabel's UltraFeedback task: an instruction, generations, a judge's ratings.

Ratings are integers, or integers as text in some data sets. A rating that is absent or "N/A" is a
missing reward. Other tasks and older versions of distilabel write other columns: import them with
`format: flat`.
"""

from __future__ import annotations

from gvpo_offline import conversations, values
from gvpo_offline.importing.formats.shared.row_format import RowFormat, text_fragment
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record

_MODELS = ("generation_models", "model_names")


def open_format(config: ImportConfig) -> RowFormat:
    """One group per row; the reward is the rating."""
    return RowFormat(
        config,
        required=("instruction", "generations", "ratings"),
        optional=_MODELS,
        parse=_parse,
    )


def _parse(record: Record) -> list[Fragment]:
    responses = values.entries(record["generations"], "generations")
    ratings = record["ratings"]
    if ratings is None:  # distilabel could not parse the judge's answer
        ratings = [None] * len(responses)
    models = next((record[name] for name in _MODELS if record.get(name) is not None), None)
    return [
        text_fragment(
            conversations.conversation([record["instruction"]]),
            responses,
            [values.rating(rating) for rating in values.entries(ratings, "ratings")],
            samplers=None
            if models is None
            else [values.sampler(name) for name in values.entries(models, "models")],
        )
    ]
