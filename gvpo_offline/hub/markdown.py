"""Text of logs and settings in Markdown: it is shown as it is, and never becomes markup."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gvpo_offline.visible import visible

_TICKS = re.compile(r"`+")


def code(text: object) -> str:
    """Text as a code span on one line, for a cell of a table too.

    Within a code span no link, image, HTML or comment begins (CommonMark, section 6.1), whatever
    the text holds; its fence has more backticks than any run of them in the text.
    """
    plain = visible(" ".join(_without_comments(str(text)).split()), keep="").replace("|", "\\|")
    if not plain:
        return "(empty)"
    fence = "`" * (1 + _longest_run(plain))
    pad = " " if len(fence) > 1 or plain.startswith(" ") else ""
    return f"{fence}{pad}{plain}{pad}{fence}"


def block(text: str, language: str = "") -> list[str]:
    """Text as the lines of a fenced block, whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + _longest_run(text))
    return [f"{fence}{language}", *visible(_without_comments(text)).splitlines(), fence, ""]


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table of cells that are Markdown; none without rows."""
    if not rows:
        return []
    lines = [heading, ["---"] * len(heading), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def _longest_run(text: str) -> int:
    return max((len(run) for run in _TICKS.findall(text)), default=0)


def _without_comments(text: str) -> str:
    """Text that cannot be taken for a mark that a later card looks for."""
    return text.replace("<!--", "<! --")
