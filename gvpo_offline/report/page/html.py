"""A page as one HTML file."""

from __future__ import annotations

from gvpo_offline.report.page.blocks import Page


def render_page(page: Page, *, live: bool = False) -> str:
    """The HTML of a page, with everything that it needs.

    Args:
        page: what it shows.
        live: the page asks the server that sent it for news, and shows them.
    """
    raise NotImplementedError
