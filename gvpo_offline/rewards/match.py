"""Answers held against a column of the log: as texts, as numbers."""

from __future__ import annotations

import math
import re
from typing import Any

from gvpo_offline.group import FloatArray
from gvpo_offline.rewards.cases import ScoringInput
from gvpo_offline.rewards.kinds import ExactSettings, NumericSettings
from gvpo_offline.rewards.scorer import GroupScorer, numbers, settings_of

# 1,234.5 and 1234.5 and .5; a comma counts where it sets three digits apart, a sign where it is not
# a difference's.
_NUMBER = re.compile(
    r"(?:(?<![\d)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
)


class ExactScorer(GroupScorer):
    """1 where two texts are the same, space around them aside; 0 where they differ.

    A group whose column is null has no right answer: its numbers are missing.
    """

    def __init__(self, settings: ExactSettings) -> None:
        super().__init__()
        self._settings = settings

    def identity(self) -> dict[str, Any]:
        """Its settings."""
        return settings_of(self._settings)

    def score_group(self, case: ScoringInput) -> FloatArray:
        """(1, k)."""
        gold = case.column(self._settings.column)
        if gold is None:
            return numbers([None] * case.size)
        # The column may hold the bare answer.
        wanted = self._read(str(gold), otherwise=str(gold))
        return numbers([float(self._read(text) == wanted) for text in case.responses])

    def _read(self, text: str, otherwise: str | None = None) -> str | None:
        found = last_match(self._settings.pattern, text)
        found = otherwise if found is None else found
        if found is None:
            return None
        return found.strip().casefold() if self._settings.ignore_case else found.strip()


class NumericScorer(GroupScorer):
    """1 where two numbers are the same within a tolerance; 0 where they differ or there is none.

    A group whose column is null, or has no number, has no right answer: its numbers are missing.
    """

    def __init__(self, settings: NumericSettings) -> None:
        super().__init__()
        self._settings = settings

    def identity(self) -> dict[str, Any]:
        """Its settings."""
        return settings_of(self._settings)

    def score_group(self, case: ScoringInput) -> FloatArray:
        """(1, k)."""
        gold = case.column(self._settings.column)
        text = "" if gold is None else str(gold)
        matched = last_match(self._settings.pattern, text)
        wanted = last_number(text if matched is None else matched)
        if wanted is None:
            return numbers([None] * case.size)
        found = [
            last_number(last_match(self._settings.pattern, text) or "") for text in case.responses
        ]
        return numbers([float(n is not None and self._same(n, wanted)) for n in found])

    def _same(self, one: float, other: float) -> bool:
        tolerance = self._settings.tolerance
        return math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)


def last_number(text: str) -> float | None:
    """The last number that stands in a text, or None."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def last_match(pattern: str | None, text: str) -> str | None:
    """The last match's first group, or all of it; the text itself without a pattern."""
    if pattern is None:
        return text
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    return matches[-1][1] if matches[-1].re.groups else matches[-1][0]
