"""The first page of the documentation leads to every other page, once."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))
_LINK = re.compile(r"\]\(([\w/-]+\.md)(?:#[\w-]+)?\)")


def pages() -> set[str]:
    """All pages but the first one and those that the build writes."""
    found = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    return {page for page in found if "generated" not in page and page != "index.md"}


def test_the_first_page_links_every_page_once() -> None:
    links = Counter(_LINK.findall((DOCS / "index.md").read_text(encoding="utf-8")))
    assert {page: n for page, n in links.items() if n > 1} == {}
    assert set(links) == pages()


def test_the_navigation_lists_every_page_once() -> None:
    """`make docs` fails too, but later."""
    from conf import toctrees

    listed = Counter(f"{page}.md" for part in toctrees["index"].values() for page in part)
    assert {page: n for page, n in listed.items() if n > 1} == {}
    assert set(listed) == pages()
