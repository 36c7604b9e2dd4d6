"""A page as one HTML file.

The file needs no network and no server. Its Content-Security-Policy allows its own scripts, by
their hashes, and nothing else: no request, no `eval`, no event handler in markup. What a log holds
is escaped by Jinja, or stands in JSON that scripts read and write with `textContent`.

Charts are Vega-Lite specifications, drawn in the browser by the bundle of vl-convert-python: 0.9 MB
of a page, made in 1.5 CPU seconds once per process, too little for a cache on disk.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from gvpo_offline.errors import ConfigError
from gvpo_offline.report.page.blocks import Block, Chart, Page, Table
from gvpo_offline.report.page.packed import packed_group
from gvpo_offline.report.page.written import (
    address,
    group_address,
    is_long,
    is_wide,
    sentence,
    sort_key,
    written,
)
from gvpo_offline.visible import visible

if TYPE_CHECKING:
    from jinja2 import Environment

_BACKTICKS = re.compile("`([^`\n]+)`")
_ID = re.compile(r"[A-Za-z0-9-]+")
# Of the page itself. Its other ids have an underscore, as no block's has.
_OWN_IDS = ("page", "groups-to-read")
# theme.js runs before the page is painted; the others once it has been read.
_SCRIPTS = ("base.js", "tables.js", "charts.js", "tokens.js", "groups.js", "keys.js")
# What JSON within a <script> needs: "</script>" and "<!--" would end it or change how it is read.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def render_page(page: Page, *, live: bool = False) -> str:
    """The HTML of a page, with everything that it needs.

    Args:
        page: what it shows.
        live: the page asks the server that sent it for news, and shows them (`live.py`).

    Returns:
        A document without lone surrogates, so that it can be written as UTF-8.

    Raises:
        ConfigError: jinja2 or vl-convert-python is not installed.
        ValueError: an id is not of letters, digits and hyphens, or not unique in the page.
    """
    _check_ids(page)
    environment = _environment()
    charts = [block for section in page.sections for block in section.blocks if _is_chart(block)]
    scripts = {"theme": asset("theme.js"), "page": _page_script(live=live)}
    if charts:
        scripts["vega"] = vega_bundle()
    style = asset("page.css") + asset("groups.css")
    known = frozenset(visible(group.group_id) for group in page.groups)
    return environment.get_template("page.html").render(
        page=page,
        live=live,
        style=_markup(style),
        scripts={name: _markup(text) for name, text in scripts.items()},
        policy=_policy(scripts.values(), style, live=live),
        titles={section.id: section.title for section in page.sections},
        flags=frozenset(flag for group in page.groups for flag in group.flags),
        groups_json=_script_json([packed_group(group) for group in page.groups]),
        chart_json=_chart_json,
        kind=lambda block: type(block).__name__.lower(),
        written=written,
        sort_key=sort_key,
        links=partial(_links, known=known),
        group_address=group_address,
    )


@cache
def asset(name: str) -> str:
    """The text of a file of `assets/`."""
    return files("gvpo_offline.report.page").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def vega_bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that sets `window.vegaEmbed`.

    Raises:
        ConfigError: vl-convert-python is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise _missing("charts are drawn by Vega-Lite", "vl-convert-python") from error
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    # In JavaScript both spellings are the same string; in HTML only one ends the script.
    return re.sub(r"<(/script|!--)", r"\\x3c\1", script, flags=re.IGNORECASE)


def _page_script(*, live: bool) -> str:
    parts = [*_SCRIPTS, *(["live.js"] if live else []), "start.js"]
    return "(() => {\n" + "".join(map(asset, parts)) + "})();\n"


@cache
def _environment() -> Environment:
    try:
        from jinja2 import BaseLoader, Environment, StrictUndefined, TemplateNotFound
    except ImportError as error:
        raise _missing("pages are made by Jinja", "jinja2") from error

    class Assets(BaseLoader):
        def get_source(self, environment: Environment, template: str) -> Any:
            if not template.endswith(".html"):
                raise TemplateNotFound(template)
            return asset(template), template, lambda: True

    environment = Environment(
        loader=Assets(),
        autoescape=True,
        # Every text that is inserted passes here, and is escaped for HTML afterwards.
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"address": address, "sentence": sentence, "code": _code}
    environment.tests |= {"long": is_long, "wide": is_wide}
    return environment


def _shown(value: Any) -> Any:
    """A text with its control characters visible; other values, and markup, as they are."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _code(text: str) -> Any:
    """Escaped text in which `words` between backticks are <code>: texts of this package alone."""
    from markupsafe import escape

    return _markup(_BACKTICKS.sub(r"<code>\1</code>", str(escape(visible(text)))))


def _markup(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)


def _missing(rule: str, package: str) -> ConfigError:
    return ConfigError(
        rule,
        received=f"{package} is not installed",
        remedy="pip install 'gvpo-offline[report]'",
    )


def _policy(scripts: Any, style: str, *, live: bool) -> str:
    """The Content-Security-Policy: what the page may do. Vega writes `style` attributes."""
    return "; ".join(
        [
            "default-src 'none'",
            "script-src " + " ".join(map(_source_hash, scripts)),
            f"style-src-elem {_source_hash(style)}",
            "style-src-attr 'unsafe-inline'",
            "img-src data:",
            "connect-src 'self'" if live else "connect-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _source_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _check_ids(page: Page) -> None:
    seen = set(_OWN_IDS)
    for section in page.sections:
        blocks = (block for block in section.blocks if isinstance(block, Table | Chart))
        for identifier in (section.id, *(block.id for block in blocks)):
            if not _ID.fullmatch(identifier) or identifier in seen:
                raise ValueError(f"ids have letters, digits and hyphens, once each: {identifier!r}")
            seen.add(identifier)


def _is_chart(block: Block) -> bool:
    return isinstance(block, Chart)


def _links(kind: str, cell: Any, *, known: frozenset[str]) -> bool:
    """Whether a cell of a column of this kind is a link to a group of the page."""
    return kind == "group" and cell is not None and visible(str(cell)) in known


def _chart_json(chart: Chart) -> Any:
    return _script_json(
        {
            "spec": chart.spec,
            "title": chart.title,
            "height": chart.height,
            "rows": [dict(row) for row in chart.rows],
        }
    )


def _script_json(value: Any) -> Any:
    """`value` as JSON that is safe within a <script>."""
    text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _markup(text.translate(_ESCAPES))


def _plain(value: Any) -> Any:
    """`value` with visible texts; numbers that JSON lacks as NUL and their name.

    No visible text begins with NUL, so the page's scripts tell them from texts.
    """
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "\0" + str(value)
    if isinstance(value, Mapping):
        return {visible(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    return value
