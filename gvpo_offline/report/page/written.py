"""How the cells of a table are written, and by what they are sorted."""

from __future__ import annotations

import math
import re
from urllib.parse import quote

from gvpo_offline.report.page.blocks import Cell, Column
from gvpo_offline.visible import visible

_DASH = "\N{EN DASH}"
_LARGE = 1e6  # from here on, and below _SMALL, numbers are written with an exponent
_SMALL = 1e-4
# A first word that is no name of a setting, command or file.
_WORD = re.compile(r"(?!pip )[a-z]+(?=[ ,;:])")
_LONG_VALUE = 14  # characters of a figure's value that fit in large letters
_WIDE_CELL = 48  # characters of a cell that want more than a narrow column


def written(cell: Cell, column: Column) -> str:
    """A cell as the reader sees it. A text in a column of numbers stays as it is."""
    if cell is None:
        return _DASH
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, str) or column.kind in ("text", "group"):
        return str(cell)
    if not math.isfinite(cell):
        return "NaN" if math.isnan(cell) else "∞" if cell > 0 else "-∞"
    if column.kind == "count":
        return f"{cell:,.0f}"
    if column.kind == "share":
        return share(cell, column.digits)
    return number(cell, column.digits)


def number(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits, and all digits before the point."""
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= _LARGE or size < _SMALL:
        return f"{value:.{digits - 1}e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    decimals = max(digits - 1 - math.floor(math.log10(size)), 0)
    return f"{value:,.{decimals}f}"


def share(value: float, digits: int = 3) -> str:
    """A fraction as a percentage; only 0 is written as 0%, and only 1 as 100%."""
    if value in (0, 1):
        return f"{value:.0%}"
    text = number(100.0 * value, digits)
    if 0 < value < 1:
        if float(text.replace(",", "")) >= 100:
            return ">99.9%"
        if value < _SMALL / 100:
            return "<0.0001%"
    return text + "%"


def sort_key(cell: Cell, column: Column) -> str:
    """What a page's script sorts a cell by: a number, a text, or "" for none (always last)."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return repr(float(cell)) if isinstance(cell, int | float) else visible(cell)


def address(text: str) -> str:
    """`text` as part of an address within the page."""
    return quote(visible(text), safe="")


def group_address(group_id: str) -> str:
    """The address of a group within the page."""
    return "#group=" + address(group_id)


def sentence(text: str) -> str:
    """`text` with a capital, unless it begins with a name, and with a mark at its end."""
    if _WORD.match(text):
        text = text[0].upper() + text[1:]
    return text if not text or text[-1] in ".!?:…" else text + "."


def is_long(value: str) -> bool:
    """Whether a figure's value, such as a path, is shown in smaller letters."""
    return len(value) > _LONG_VALUE


def is_wide(cell: str) -> bool:
    """Whether a cell's text needs a wide column to be read."""
    return len(cell) > _WIDE_CELL
