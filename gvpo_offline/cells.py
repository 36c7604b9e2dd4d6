"""Cells of text files with columns (CSV, TSV), in which every value is text.

A format that asks for text takes a cell as it is. Where it asks for a number, a flag or a list, the
cell's text is read as one: no other text of a log is, since there a number in quotes may be a
mistake.
"""

from __future__ import annotations

from typing import Any

from gvpo_offline.json_text import loads

__all__ = ["Cell", "cell_value"]

_FLAGS = {"true": True, "false": False}
_MISSING = ("", "null", "none", "nan", "na", "n/a")


class Cell(str):
    """The text of a cell."""

    __slots__ = ()


def cell_value(value: Any) -> Any:
    """The number, flag or list that the text of a `Cell` stands for; any other value unchanged.

    An empty cell, `null`, `None`, `NaN` and `NA` are None. `true` and `false` are flags in any
    case. A list or record is JSON. A cell that is none of these is returned as its text.
    """
    if not isinstance(value, Cell):
        return value
    text = value.strip()
    low = text.lower()
    if low in _MISSING:
        return None
    if low in _FLAGS:
        return _FLAGS[low]
    if text[0] in "[{":
        try:
            return loads(text)
        except ValueError:
            return str(value)
    for kind in (int, float):
        try:
            return kind(text) if "_" not in text else str(value)
        except ValueError:
            continue
    return str(value)
