"""Small statistics and texts of numbers that several sections share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gvpo_offline.group import FloatArray

MINUS = "\N{MINUS SIGN}"
_LARGE = 1e15  # from here on, numbers are written with an exponent


def correlation(one: FloatArray, other: FloatArray) -> float:
    """Pearson's correlation of values that are centred already; NaN if all of one are 0."""
    squares = float(np.dot(one, one)), float(np.dot(other, other))
    if not all(0 < value < math.inf for value in squares):
        return math.nan
    return float(np.dot(one, other)) / math.sqrt(squares[0]) / math.sqrt(squares[1])


def quantiles(values: npt.NDArray[np.generic], at: Sequence[float]) -> list[float]:
    """Quantiles, with linear interpolation; NaN for each without values."""
    if not len(values):
        return [math.nan] * len(at)
    return [float(value) for value in np.quantile(values.astype(np.float64), at)]


def ratio(part: float, whole: float) -> float:
    """part / whole; NaN if the whole is 0."""
    return part / whole if whole else math.nan


def cell(value: float) -> float | None:
    """A number as the cell of a table; None if it is not finite."""
    return float(value) if math.isfinite(value) else None


def percent(share: float) -> str:
    """A share as text."""
    if not math.isfinite(share):
        return "none"
    text = f"{100 * share:.3g}%"
    return text.replace("-", MINUS, 1) if share < 0 else text


def plain(value: float, digits: int = 3) -> str:
    """A number as text."""
    if not math.isfinite(value):
        return "none"
    large = 10**digits <= abs(value) < _LARGE
    text = f"{value:,.0f}" if large else f"{value:.{digits}g}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def interval(low: str, high: str) -> str:
    """A range in a label: an en dash between numbers, "to" where one of them is negative."""
    return f"{low} to {high}" if MINUS in low + high else f"{low}\N{EN DASH}{high}"


def counted(number: int, unit: str) -> str:
    """`1 group`, `2 groups`."""
    return f"{number:,} {unit}s" if number != 1 else f"1 {unit}"
