"""What distilabel's UltraFeedback task writes: an instruction, generations, a judge's ratings.

Ratings are integers, or text in some data sets; a rating that the judge did not give, or gave as
N/A, is missing. Other tasks and older versions have other columns: see `format: flat`.
"""

from __future__ import annotations

from gvpo_offline import values
from gvpo_offline.importing.formats.shared.row_format import RowFormat, text_fragment
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record

_MODELS = ("generation_models", "model_names")


def open_format(config: ImportConfig) -> RowFormat:
    """One row a group; the reward is the rating."""
    return RowFormat(
        config,
        required=("instruction", "generations", "ratings"),
        optional=_MODELS,
        parse=_parse,
    )


def _parse(record: Record) -> list[Fragment]:
    responses = values.entries(record["generations"], "generations")
    ratings = record["ratings"]
    if ratings is None:  # the judge's whole answer could not be read
        ratings = [None] * len(responses)
    models = next((record[name] for name in _MODELS if record.get(name) is not None), None)
    return [
        text_fragment(
            values.conversation([record["instruction"]]),
            responses,
            [values.rating(rating) for rating in values.entries(ratings, "ratings")],
            samplers=None
            if models is None
            else [values.sampler(name) for name in values.entries(models, "models")],
        )
    ]
