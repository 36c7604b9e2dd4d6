"""The documentation's sources: links lead somewhere, on GitHub as on the site; every setting of
every command is explained. `make docs` checks the rest.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gvpo_offline.commands.table import COMMANDS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

from settings_pages import page_of, settings_of  # noqa: E402

FOLDERS = ("docs", "pipelines", "research", "schemas", "benchmarks", "examples")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md"))),
]
PAGES = [page for page in PAGES if "generated" not in page.parts]
README_WORDS = 1200
EXAMPLE_FILES = {"path.py"}  # a reader's own
_LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s#]*)(#[^)\s]+)?\)")


def prose_lines(page: Path) -> Iterator[str]:
    """The lines of a page outside fenced code."""
    fenced = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield line


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page: lower case, punctuation dropped, spaces dashes."""
    titles = [line.lstrip("#").strip() for line in prose_lines(page) if line.startswith("#")]
    kept = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {"#" + title.replace(" ", "-") for title in kept}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for line in prose_lines(page):
        for path, anchor in _LINK.findall(line):
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or not target.is_relative_to(ROOT):
                broken.append(path)
            elif anchor and target.suffix == ".md" and anchor not in anchors(target):
                broken.append(f"{path}{anchor}")
    assert not broken


def test_the_package_names_pages_that_exist() -> None:
    """Errors and help texts send readers to docs/….md."""
    named = {
        name
        for path in (ROOT / "gvpo_offline").rglob("*.py")
        for name in re.findall(r"docs/[\w/-]+\.md", path.read_text(encoding="utf-8"))
    }
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_the_readme_is_short() -> None:
    """Counted as `wc -w` counts."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_has_a_text_and_a_place_on_its_page(name: str) -> None:
    page = page_of(name, COMMANDS[name])
    for kind in COMMANDS[name].settings:
        settings = settings_of(kind)
        assert [s.name for s in settings] == [f.name for f in dataclasses.fields(kind) if f.init]
        for setting in settings:
            assert setting.text, f"{kind.__name__}.{setting.name}"
            assert f"### `{setting.name}`" in page


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_source_files_that_a_page_names_exist(page: Path) -> None:
    """`engine.py` somewhere, `compute/layout.py` under its folder; of this repository's code."""
    text = page.read_text(encoding="utf-8")
    names = set(re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`", text)) - EXAMPLE_FILES
    folders = ("gvpo_offline", "docs", "benchmarks", "pipelines", "research", "examples", "tests")
    known = [path.as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert [n for n in sorted(names) if not any(p.endswith(f"/{n}") for p in known)] == []


def test_the_architecture_lists_every_package() -> None:
    """As rows of its table; no row names a package that is gone."""
    text = (ROOT / "docs" / "theory" / "architecture.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)/`", row)}
    packages = {path.parent.name for path in (ROOT / "gvpo_offline").glob("*/__init__.py")}
    assert listed == packages
