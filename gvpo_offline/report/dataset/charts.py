"""Charts of a dataset's report: Vega-Lite specifications over small aggregated rows.

The page adds data, width and the colours of its theme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_offline.report.dataset.numbers import interval, plain
from gvpo_offline.report.page.blocks import Chart

Rows = Sequence[Mapping[str, Any]]
Channel = dict[str, Any]
MOST_ROWS = 2000
UPRIGHT = {"labelAngle": 0, "labelOverlap": "greedy"}
"""Of an axis whose labels have an order: where they do not fit, some are left out."""


def quantity(field: str, title: str, **options: Any) -> Channel:
    """A channel of numbers; `scale`, `stack` and `axis` as in Vega-Lite."""
    return {"field": field, "type": "quantitative", "title": title, **options}


def category(field: str, title: str, **options: Any) -> Channel:
    """A channel of names, in the order of the rows unless `sort` says otherwise."""
    return {"field": field, "type": "nominal", "title": title, "sort": None, **options}


def bar(
    x: Channel,
    y: Channel,
    *,
    tooltip: Sequence[str] = (),
    color: Channel | None = None,
) -> dict[str, Any]:
    """Bars; horizontal if `y` is a category."""
    return {"mark": {"type": "bar"}, "encoding": _encoding(x, y, color, tooltip)}


def line(
    x: Channel, y: Channel, *, color: Channel | None = None, tooltip: Sequence[str] = ()
) -> dict[str, Any]:
    """Lines with points."""
    mark = {"type": "line", "point": True}
    return {"mark": mark, "encoding": _encoding(x, y, color, tooltip)}


def point(
    x: Channel, y: Channel, *, color: Channel | None = None, tooltip: Sequence[str] = ()
) -> dict[str, Any]:
    """Points."""
    mark = {"type": "point", "filled": True}
    return {"mark": mark, "encoding": _encoding(x, y, color, tooltip)}


def bins(
    edges: Sequence[float], counts: Sequence[int], value: str, count: str
) -> list[dict[str, Any]]:
    """The rows of `histogram`: the bounds of each bin, as `low` and `high`, and as a text."""
    return [
        {
            value: interval(plain(float(low)), plain(float(high))),
            "low": float(low),
            "high": float(high),
            count: int(n),
        }
        for low, high, n in zip(edges, edges[1:], counts, strict=False)
    ]


def histogram(
    name: str, title: str, summary: str, value: str, axis_title: str, rows: Rows
) -> Chart:
    """Bars over the bins of a numeric axis; the last field of `rows` is what is counted."""
    count = list(rows[0])[-1]
    x = quantity("low", axis_title, bin={"binned": True}, axis=UPRIGHT)
    spec = bar(x, quantity(count, count), tooltip=(value, count))
    spec["encoding"]["x2"] = {"field": "high"}
    return chart(name, title, summary, spec, rows)


def heat(x: Channel, y: Channel, value: Channel, *, tooltip: Sequence[str] = ()) -> dict[str, Any]:
    """A table of coloured cells; `value`: what the colour shows."""
    return {"mark": {"type": "rect"}, "encoding": _encoding(x, y, value, tooltip)}


def band(x: Channel, low: str, high: str, title: str, opacity: float) -> dict[str, Any]:
    """The area between two fields."""
    return {
        "mark": {"type": "area", "opacity": opacity, "clip": True},
        "encoding": {"x": x, "y": quantity(low, title), "y2": {"field": high}},
    }


def whiskers(x: Channel, low: str, high: str, title: str) -> dict[str, Any]:
    """Vertical lines between two fields."""
    return {
        "mark": {"type": "rule"},
        "encoding": {"x": x, "y": quantity(low, title), "y2": {"field": high}},
    }


def layers(*specs: Mapping[str, Any]) -> dict[str, Any]:
    """Several marks on the same axes."""
    return {"layer": list(specs)}


def _encoding(
    x: Channel, y: Channel, color: Channel | None, tooltip: Sequence[str]
) -> dict[str, Channel | list[Channel]]:
    encoding: dict[str, Channel | list[Channel]] = {"x": x, "y": y}
    if color is not None:
        encoding["color"] = color
    if tooltip:
        encoding["tooltip"] = [{"field": name} for name in tooltip]
    return encoding


def chart(
    name: str, title: str, summary: str, spec: Mapping[str, Any], rows: Rows, height: int = 240
) -> Chart:
    """A chart; ValueError if its rows are too many to be aggregated ones."""
    if len(rows) > MOST_ROWS:
        raise ValueError(f"a chart has at most {MOST_ROWS} rows, and {name} has {len(rows)}")
    return Chart(id=name, title=title, summary=summary, spec=spec, rows=rows, height=height)
