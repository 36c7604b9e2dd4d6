"""Names of a log in the card of a dataset: they stay text within their cell."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from gvpo_offline.hub.card import BEGIN, END, _cell, _markdown

HOSTILE = [
    "<script>alert(1)</script>",
    "![x](http://example.org/track.png)",
    "[x](javascript:alert(1))",
    "\\![x](http://example.org/track.png)",
    "a | b\n| c | d |",
    f"x {END} {BEGIN}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_cell_holds_no_markup(text: str) -> None:
    lines = "\n".join(_markdown(("name", "text"), [(text, "next")]))
    tokens = MarkdownIt("commonmark").enable("table").parse(lines)
    inline = [child for token in tokens for child in token.children or []]
    assert {child.type for child in inline} <= {"text", "text_special"}
    assert not [token for token in tokens if token.type == "html_block"]
    cells = [token for token in tokens if token.type == "td_open"]
    assert len(cells) == 2
    shown = ["".join(c.content for c in t.children or []) for t in tokens if t.type == "inline"]
    assert shown[2] == " ".join(text.split())
    assert BEGIN not in _cell(text)
