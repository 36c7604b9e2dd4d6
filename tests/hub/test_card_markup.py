"""Names of a log in the card of a dataset: they stay text within their cell."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from support.planted import clean_groups, write

from gvpo_offline.hub.card import BEGIN, END, _cell, _markdown, card
from gvpo_offline.store.manifest import TokenizerInfo, load_manifest

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


def test_a_whole_card_of_hostile_names_holds_no_markup(tmp_path: Path) -> None:
    """Names of samplers, of the tokenizer and of the reference's model end no code, open no link
    and reach no terminal; the front matter is YAML. The only HTML are the card's own marks."""
    evil = "a`<img src=x>`b\n```\n# h\n<script>x</script>\x1b]0;t\x07\u202e|![i](http://x/y)"
    folder = write(tmp_path, clean_groups(8))
    manifest = load_manifest(folder)
    family = manifest.references[0].model_copy(update={"model_name_or_path": evil})
    tokenizer = TokenizerInfo(name_or_path=evil, fingerprint="0" * 64, vocab_size=10)
    changes = {"tokenizer": tokenizer, "samplers": {evil: {"model": evil}}, "references": [family]}
    text = card(manifest.model_copy(update=changes), "me/data")
    assert [c for c in text if not c.isprintable() and c != "\n"] == []
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["pretty_name"] == "data"
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    every = [t for token in tokens for t in (token, *(token.children or ()))]
    assert [t.content.strip() for t in every if "html" in t.type] == [BEGIN, END]
    assert not [t for t in every if t.type in ("link_open", "image")]
    headings = [b.content for a, b in pairwise(tokens) if a.type == "heading_open"]
    assert "h" not in headings
    assert {"data", "Train from it", "Read it", "What it holds"} <= set(headings)
