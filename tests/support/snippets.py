"""The code blocks of the documentation, found by the CommonMark parser that builds the site.

A block that tests cannot run has a comment before it that says why:

    <!-- not run: downloads from the hub -->

The comment is shown neither on the site nor on GitHub.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "pipelines", "research", "schemas", "benchmarks", "examples")
PAGES = [
    page
    for page in (
        *sorted(ROOT.glob("*.md")),
        *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md"))),
    )
    if "generated" not in page.parts and page.name != "CHANGELOG.md"
]
_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->", re.DOTALL)
_SUBSTITUTION = re.compile(r"\$\(.*\)")
_ELLIPSES = ("…", "...")


@dataclass(frozen=True)
class Snippet:
    """A code block of a page.

    Attributes:
        page: path of the page, from the root of the repository.
        line: of its first line of code, counted from 1.
        language: as written behind the fence; "" for an indented block.
        text: the code.
        not_run: why no test runs it; None: a test does.
    """

    page: str
    line: int
    language: str
    text: str
    not_run: str | None

    @property
    def name(self) -> str:
        """Page and line, to name a test."""
        return f"{self.page}:{self.line}"


def snippets(page: Path) -> list[Snippet]:
    """All code blocks of a Markdown file, in order."""
    found, reason = [], None
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            match = _NOT_RUN.search(token.content)
            reason = match.group(1) if match else None
        elif token.type in ("fence", "code_block"):
            assert token.map is not None
            words = token.info.split() or [""]
            line = token.map[0] + 1 + (token.type == "fence")
            name = page.relative_to(ROOT).as_posix()
            found.append(Snippet(name, line, words[0], token.content, reason))
            reason = None
        elif token.type.endswith("_open"):
            reason = None
    return found


def all_snippets(*languages: str) -> list[Snippet]:
    """The code blocks in these languages, of all pages."""
    return [s for page in PAGES for s in snippets(page) if s.language in languages]


@dataclass(frozen=True)
class ShellLine:
    """A command line: its words, and whether the page leaves words out (`…`)."""

    words: tuple[str, ...]
    shortened: bool


def shell_lines(text: str) -> list[ShellLine]:
    """The commands of a block; continued lines are joined, comments left out.

    The output of `$(…)` is unknown: the word SUBSTITUTED stands for it.
    """
    found = []
    for line in _SUBSTITUTION.sub("SUBSTITUTED", text.replace("\\\n", " ")).splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        kept = tuple(word for word in words if word not in _ELLIPSES)
        if kept:
            found.append(ShellLine(kept, len(kept) < len(words)))
    return found
