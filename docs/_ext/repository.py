"""Links that leave the site: to files of the repository that are no pages of the documentation.

In the sources they are relative paths, which GitHub resolves. On the site they lead to the
repository. A path that does not exist is a warning, and so fails `make docs`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinx.util import logging

if TYPE_CHECKING:
    from sphinx.application import Sphinx

logger = logging.getLogger(__name__)
_LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^\s*(```|~~~)")


def rewrite(text: str, page: Path, docs: Path, url: str) -> tuple[str, list[str]]:
    """The page's text with links out of `docs` made absolute; and those that lead nowhere.

    Args:
        text: Markdown.
        page: the file that the text is of; relative links start at its folder.
        docs: the folder of the site's sources.
        url: of the repository.
    """
    root, broken = docs.parent, []

    def absolute(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(page.parent / match[1]))
        if target.is_relative_to(docs):
            return match[0]  # MyST checks pages and headings
        if not target.is_relative_to(root) or not target.exists():
            broken.append(match[1])
            return match[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"]({url}/{kind}/main/{target.relative_to(root).as_posix()}{match[2] or ''})"

    lines, fenced = [], False
    for line in text.split("\n"):
        fenced ^= bool(_FENCE.match(line))
        lines.append(line if fenced else _LINK.sub(absolute, line))
    return "\n".join(lines), broken


def _on_source(app: Sphinx, docname: str, source: list[str]) -> None:
    page = Path(app.env.doc2path(docname))
    url = app.config.repository_url
    source[0], broken = rewrite(source[0], page, Path(app.srcdir), url)
    for target in broken:
        logger.warning("link to a file that does not exist: %s", target, location=docname)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_config_value("repository_url", "", "env", str)
    app.connect("source-read", _on_source)
    return {"version": "1", "parallel_read_safe": True}
