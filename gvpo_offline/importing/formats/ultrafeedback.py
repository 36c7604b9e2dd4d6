"""UltraFeedback: an instruction and four completions, each with a score of 1 to 10 and ratings of
four aspects.

The first release has scores of 10 that should be 1. The corrected release of December 2023 decided
by the mean rating of a completion's aspects (fix_overall_score_issue.py in OpenBMB/UltraFeedback):
with a mean of at most 2 the score became 1, with a mean of at most 4 it was annotated again, and
with a mean above 4 it was kept. The corrected release adds that mean to every completion as
`fine-grained_score`, which identifies a corrected file.
"""

from __future__ import annotations

from functools import partial
from statistics import fmean
from typing import Any

from gvpo_offline import conversations, values
from gvpo_offline.errors import DataError
from gvpo_offline.importing.formats.shared.parts import part_weights
from gvpo_offline.importing.formats.shared.row_format import RowFormat, text_fragment
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.rows import Record

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")
_SCORE, _MEAN = "overall_score", "fine-grained_score"
PARTS = {_SCORE: 1.0, _MEAN: 0.0, **dict.fromkeys(ASPECTS, 0.0)}
_SUSPECT = 10.0
_CREDIBLE_ABOVE = 4.0


def open_format(config: ImportConfig) -> RowFormat:
    """One group per row; the reward is the overall score. The aspect ratings are its parts."""
    needs_score = bool(part_weights(config, PARTS).get(_SCORE))
    refuse = needs_score and config.missing_rewards == "error"
    return RowFormat(
        config,
        required=("instruction", "completions"),
        parse=partial(_parse, refuse=refuse),
        parts=PARTS,
    )


def _parse(record: Record, *, refuse: bool) -> list[Fragment]:
    completions = values.structs(record["completions"], "completions")
    parts: dict[str, list[float | None]] = {name: [] for name in PARTS}
    for index, completion in enumerate(completions):
        for name, value in _ratings(completion, index, refuse=refuse).items():
            parts[name].append(value)
    return [
        text_fragment(
            conversations.conversation([record["instruction"]]),
            [values.field(c, "response", "a completion") for c in completions],
            samplers=[values.sampler(completion.get("model")) for completion in completions],
            parts=parts,
        )
    ]


def _ratings(completion: dict[str, Any], index: int, *, refuse: bool) -> dict[str, float | None]:
    annotations = values.struct(completion.get("annotations"), "annotations")
    aspects = {
        name: values.rating(values.struct(annotations.get(name), name).get("Rating"), name)
        for name in ASPECTS
    }
    score = values.rating(values.field(completion, _SCORE, "a completion"), _SCORE)
    mean = values.number(completion.get(_MEAN), _MEAN)
    if score == _SUSPECT and mean is None and not _credible(aspects):
        if refuse:
            raise DataError(
                f"the aspects of a completion with an overall_score of 10 are rated above "
                f"{_CREDIBLE_ABOVE:g} on average: the first release has 10 for some scores of 1",
                received=f"10 for response {index}, whose aspects are rated {aspects}",
                remedy="import the corrected release, whose completions have a fine-grained_score, "
                "or drop such responses (missing_rewards: drop)",
            )
        score = None
    return {_SCORE: score, _MEAN: mean, **aspects}


def _credible(aspects: dict[str, float | None]) -> bool:
    given = [rating for rating in aspects.values() if rating is not None]
    return bool(given) and fmean(given) > _CREDIBLE_ABOVE
