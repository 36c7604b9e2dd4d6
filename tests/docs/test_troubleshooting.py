"""The page of error messages quotes messages that the package has, and can be found."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "howto" / "troubleshooting.md"
HEADINGS = re.findall(r"^### (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
_LEAST = 6  # characters of a part between two names


def _texts() -> list[str]:
    """The constant parts of every text in the package's code, without docstrings."""
    found = []
    for path in (ROOT / "gvpo_offline").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        plain = {id(own.value) for own in ast.walk(tree) if isinstance(own, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) in plain:
                continue
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):  # with names in place: any text
                parts = [
                    part.value if isinstance(part, ast.Constant) else "…" for part in node.values
                ]
                found.append("".join(map(str, parts)))
    return found


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return _texts()


@pytest.mark.parametrize("heading", HEADINGS)
def test_the_quoted_message_is_one_of_the_package(heading: str, texts: list[str]) -> None:
    """In one text of the code, part by part and in order."""
    assert re.fullmatch(r"`[^`]+`", heading), "a heading quotes a message"
    parts = [part.strip() for part in heading.strip("`").split("…")]
    assert max(map(len, parts)) >= _LEAST * 2
    pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    assert any(pattern.search(text) for text in texts), heading


def test_every_section_says_more_than_the_message() -> None:
    sections = re.split(r"^### .*$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(sections) == len(HEADINGS) == len(set(HEADINGS))
    assert all(len(text.split()) >= 5 for text in sections)


def test_the_page_is_linked_from_the_first_pages() -> None:
    assert "(howto/troubleshooting.md)" in (ROOT / "docs/index.md").read_text(encoding="utf-8")
    assert "(docs/howto/troubleshooting.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert '"howto/troubleshooting"' in (ROOT / "docs/conf.py").read_text(encoding="utf-8")
