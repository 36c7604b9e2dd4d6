"""Gold answers as metadata holds them: what is one, what is missing, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from support.rewarding import scoring_input

from gvpo_offline.errors import DataError
from gvpo_offline.rewards.kinds import ExactSettings, MathSettings, NumericSettings
from gvpo_offline.rewards.match import ExactScorer, NumericScorer
from gvpo_offline.rewards.maths import MathScorer
from gvpo_offline.rewards.scorer import GroupScorer

SCORERS: dict[str, GroupScorer] = {
    "exact": ExactScorer(ExactSettings(kind="exact", column="answer")),
    "numeric": NumericScorer(NumericSettings(kind="numeric", column="answer")),
    "math": MathScorer(MathSettings(kind="math", column="answer")),
}


@pytest.mark.parametrize("kind", SCORERS)
@pytest.mark.parametrize("gold", [["4"], [4], [], {"value": 4}, {}])
def test_lists_and_records_are_no_gold_answers(kind: str, gold: Any) -> None:
    """Their text, brackets and all, would be the answer of no response, or contain a number."""
    with pytest.raises(DataError, match="a gold answer is text or a number") as caught:
        SCORERS[kind].score_group(scoring_input(["4", "[4]"], answer=gold))
    assert (caught.value.file, caught.value.row, caught.value.group) == ("f", 3, "g")


@pytest.mark.parametrize("kind", SCORERS)
@pytest.mark.parametrize("gold", [None, math.nan])
def test_null_and_nan_are_missing_gold_answers(kind: str, gold: Any) -> None:
    """Not the text "nan", which a response may hold."""
    (found,) = SCORERS[kind].score_group(scoring_input(["nan", "4"], answer=gold))
    assert all(map(math.isnan, found))


@pytest.mark.parametrize("kind", ["exact", "numeric"])
def test_texts_and_numbers_are_gold_answers(kind: str) -> None:
    for gold in ("4", 4):
        assert SCORERS[kind].score_group(scoring_input(["4", "5"], answer=gold)).tolist() == [
            [1, 0]
        ]


def test_a_field_of_a_record_is_a_gold_answer() -> None:
    scorer = NumericScorer(NumericSettings(kind="numeric", column="answer.value"))
    assert scorer.score_group(scoring_input(["4"], answer={"value": 4.0})).tolist() == [[1]]
