"""Scorers that compare the answer in a response with a column of the log, as text or number."""

from __future__ import annotations

import math
import re
from typing import Any

from gvpo_offline.group import FloatArray
from gvpo_offline.rewards.cases import ScoringInput, gold_answer
from gvpo_offline.rewards.kinds import ExactSettings, NumericSettings
from gvpo_offline.rewards.scorer import GroupScorer, numbers, settings_of

# 1,234.5 and 1234.5 and .5; a comma belongs to a number where it separates groups of three digits,
# a sign where it is not that of a subtraction.
_NUMBER = re.compile(
    r"(?:(?<![\d)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
)


class ExactScorer(GroupScorer):
    """1 if two texts are equal, ignoring whitespace around them; else 0.

    A group whose column is null or NaN has no correct answer: its numbers are missing.
    """

    def __init__(self, settings: ExactSettings) -> None:
        super().__init__()
        self._settings = settings

    def identity(self) -> dict[str, Any]:
        """The settings."""
        return settings_of(self._settings)

    def score_group(self, group: ScoringInput) -> FloatArray:
        """(1, k)."""
        gold = gold_answer(group, self._settings.column)
        if gold is None:
            return numbers([None] * group.size)
        # Without a match, the column holds the answer alone.
        wanted = self._read(gold, otherwise=gold)
        return numbers([float(self._read(text) == wanted) for text in group.responses])

    def _read(self, text: str, otherwise: str | None = None) -> str | None:
        found = last_match(self._settings.pattern, text)
        found = otherwise if found is None else found
        if found is None:
            return None
        return found.strip().casefold() if self._settings.ignore_case else found.strip()


class NumericScorer(GroupScorer):
    """1 if two numbers are equal within a tolerance; 0 if they differ or the response has none.

    A group whose column is null, NaN or without a number has no correct answer: its numbers are
    missing.
    """

    def __init__(self, settings: NumericSettings) -> None:
        super().__init__()
        self._settings = settings

    def identity(self) -> dict[str, Any]:
        """The settings."""
        return settings_of(self._settings)

    def score_group(self, group: ScoringInput) -> FloatArray:
        """(1, k)."""
        text = gold_answer(group, self._settings.column) or ""
        matched = last_match(self._settings.pattern, text)
        wanted = last_number(text if matched is None else matched)
        if wanted is None:
            return numbers([None] * group.size)
        found = [
            last_number(last_match(self._settings.pattern, text) or "") for text in group.responses
        ]
        return numbers([float(n is not None and self._same(n, wanted)) for n in found])

    def _same(self, one: float, other: float) -> bool:
        tolerance = self._settings.tolerance
        return math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)


def last_number(text: str) -> float | None:
    """The last number in a text, or None."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def last_match(pattern: str | None, text: str) -> str | None:
    """The last match of a pattern (its first group, if it has one), or None.

    Without a pattern, the text itself.
    """
    if pattern is None:
        return text
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    return matches[-1][1] if matches[-1].re.groups else matches[-1][0]
