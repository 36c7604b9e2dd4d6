"""Curves of a metric over the steps of runs, as charts.

A chart has at most `MOST_ROWS` rows. A longer curve is thinned: its steps are divided into
intervals with the same number of logged values, and the least and the largest value of each
interval are kept, with their steps. So no peak is lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gvpo_offline.report.page.blocks import Cell, Chart
from gvpo_offline.report.run.files import TRAINING, Run
from gvpo_offline.report.run.words import short, step_of

MOST_ROWS = 2000
_MOST_PINS = 60
_POINTS_UP_TO = 120  # values of a curve whose points are drawn
_STEP = {"field": "step", "type": "quantitative", "title": "step", "scale": {"zero": False}}
_PADDING = 0.08
Values = Sequence[tuple[int, float]]
Row = dict[str, Cell]
Encoding = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """A curve of a chart.

    Attributes:
        run: name of the run.
        groups: "training", "held out" or "held out (dataset)"; or what else the curve is of.
        values: (step, value) in ascending order of step.
        errors: standard error of each value; () for none.
    """

    run: str
    groups: str
    values: Values
    errors: Sequence[float] = ()


@dataclass(frozen=True)
class Band:
    """The values of a metric outside of which a run warns.

    Attributes:
        low: its lower bound; None: none.
        high: its upper bound; None: none.
    """

    low: float | None = None
    high: float | None = None

    def text(self) -> str:
        """In words."""
        if self.low is None:
            return f"up to {self.high:g}"
        return f"from {self.low:g} on" if self.high is None else f"{self.low:g} to {self.high:g}"


def curves_of(
    runs: Sequence[Run], metric: str, *, training: bool = True, held_out: bool = True
) -> list[Curve]:
    """The curves of a metric: of each run, and each set of groups that has it."""
    found = []
    for run in runs:
        for prefix, groups in run.parts.items():
            if (groups == TRAINING and training) or (groups != TRAINING and held_out):
                values = run.values(prefix + metric)
                if values:
                    found.append(Curve(run.name, groups, values))
    return found


def thinned(values: Values, most: int) -> list[tuple[int, float]]:
    """At most `most` of the finite values: the least and the largest of each interval."""
    finite = [(step, value) for step, value in values if math.isfinite(value)]
    most = max(most, 2)
    if len(finite) <= most:
        return finite
    n = max(most // 2, 1)
    kept = []
    for i in range(n):
        part = finite[i * len(finite) // n : (i + 1) * len(finite) // n]
        low, high = (choose(part, key=lambda own: own[1]) for choose in (min, max))
        kept += sorted({low, high})
    return kept


def thinning_note(curves: Sequence[Curve], most: int) -> str:
    """How curves were thinned to `most` values each; "" if none was."""
    longest = max((len(curve.values) for curve in curves), default=0)
    if longest <= most:
        return ""
    return (
        f" Of {longest:,} values of a curve, {most:,} are drawn: the least and the largest of each "
        f"of {most // 2:,} intervals."
    )


def curve_chart(
    identifier: str,
    title: str,
    curves: Sequence[Curve],
    *,
    unit: str = "",
    band: Band | None = None,
    pins: Sequence[tuple[str, int, str]] = (),
) -> Chart | None:
    """A chart of curves over steps; None without a finite value.

    Args:
        identifier: of the chart.
        title: its caption.
        curves: of one metric.
        unit: of the values, for the axis.
        band: shaded.
        pins: (run, step, text) of warnings, drawn as vertical lines.
    """
    pins = pins[:_MOST_PINS]
    most = (MOST_ROWS - len(pins)) // max(len(curves), 1)
    rows = [row for curve in curves for row in _rows(curve, most)]
    if not rows:
        return None
    several = len({curve.run for curve in curves}) > 1
    values = [value for row in rows for value in (row["value"], row.get("low"), row.get("high"))]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    y: Encoding = {
        "type": "quantitative",
        "title": unit or title,
        "scale": {"zero": False, "nice": False, "domain": _domain(numbers, band)},
    }
    layers = [_band_layer(band, numbers, y)] if band else []
    if any(curve.errors for curve in curves):
        layers += _error_layers(several, y)
    layers.append(_line_layer(several, y, points=len(rows) / len(curves) <= _POINTS_UP_TO))
    layers += [_PIN_LAYER] if pins else []
    rows += [_pin(*pin, n_keys=rows[0]) for pin in pins]
    summary = _summary(curves, band) + thinning_note(curves, most)
    return Chart(identifier, title, summary, {"layer": layers}, rows)


def _rows(curve: Curve, most: int) -> list[Row]:
    base: Row = {"run": curve.run, "groups": curve.groups}
    kept = thinned(curve.values, most)
    if not curve.errors:
        return [{**base, "step": step, "value": value, "warning": None} for step, value in kept]
    errors = {
        step: error if math.isfinite(error) else 0.0
        for (step, _), error in zip(curve.values, curve.errors, strict=True)
    }
    return [
        {
            **base,
            "step": step,
            "value": value,
            "low": value - errors[step],
            "high": value + errors[step],
            "warning": None,
        }
        for step, value in kept
    ]


def _pin(run: str, step: int, text: str, n_keys: Mapping[str, Cell]) -> Row:
    empty: Row = dict.fromkeys(n_keys)
    return {**empty, "run": run, "step": step, "warning": short(text)}


def _domain(values: Sequence[float], band: Band | None) -> list[float]:
    """The values with a margin, and the nearest bound of a band that holds none of them."""
    low, high = min(values), max(values)
    if band is not None and band.low is not None:
        high = max(high, band.low)
    if band is not None and band.high is not None:
        low = min(low, band.high)
    margin = _PADDING * ((high - low) or abs(high) or 1.0)
    return [low - margin, high + margin]


def _band_layer(band: Band, values: Sequence[float], y: Encoding) -> dict[str, Any]:
    least, most = _domain(values, band)
    low = least if band.low is None else min(max(band.low, least), most)
    high = most if band.high is None else max(min(band.high, most), least)
    return {
        # One row: a rectangle for each row of the chart would add up to an opaque one.
        "data": {"values": [{}]},
        "mark": {"type": "rect", "style": "band"},
        "encoding": {"y": {**y, "datum": low}, "y2": {"datum": high}},
    }


def _colour(several: bool) -> Encoding:
    return {
        "field": "run" if several else "groups",
        "type": "nominal",
        "title": "run" if several else "groups",
        "sort": None,  # in the order of the rows
    }


def _line_layer(several: bool, y: Encoding, *, points: bool) -> dict[str, Any]:
    names = (("run", "nominal"), ("groups", "nominal"), ("step", "quantitative"))
    tooltip: list[Encoding] = [{"field": name, "type": kind} for name, kind in names]
    dashes = {"strokeDash": {"field": "groups", "type": "nominal", "sort": None}}
    return {
        "transform": _WITH_VALUE,
        "mark": {"type": "line", "point": points},
        "encoding": {
            "x": _STEP,
            "y": {**y, "field": "value"},
            "color": _colour(several),
            **(dashes if several else {}),
            "tooltip": [*tooltip, {"field": "value", "type": "quantitative", "format": ".5g"}],
        },
    }


def _error_layers(several: bool, y: Encoding) -> list[dict[str, Any]]:
    interval = {
        "x": _STEP,
        "y": {**y, "field": "low"},
        "y2": {"field": "high"},
        "color": _colour(several),
    }
    detail = {"detail": {"field": "groups", "type": "nominal"}}
    return [
        {
            "transform": _WITH_VALUE,
            "mark": {"type": "area", "opacity": 0.15, "line": False, "tooltip": None},
            "encoding": {**interval, **detail},
        },
        {
            "transform": _WITH_VALUE,
            "mark": {"type": "rule", "opacity": 0.7, "tooltip": None},
            "encoding": interval,
        },
    ]


_WITH_VALUE = [{"filter": {"field": "value", "valid": True}}]
_PIN_LAYER: dict[str, Any] = {
    "transform": [{"filter": "isValid(datum.warning)"}],
    "mark": {"type": "rule", "style": "warning", "strokeDash": [4, 3], "size": 2},
    "encoding": {
        "x": _STEP,
        "tooltip": [
            {"field": "step", "type": "quantitative"},
            {"field": "run", "type": "nominal"},
            {"field": "warning", "type": "nominal"},
        ],
    },
}


def _summary(curves: Sequence[Curve], band: Band | None) -> str:
    """The first and last value of up to six curves, and the band."""
    several = len({curve.run for curve in curves}) > 1
    parts = []
    for curve in curves[:6]:
        finite = [(step, value) for step, value in curve.values if math.isfinite(value)]
        if finite:
            (first, start), (last, end) = finite[0], finite[-1]
            name = f"{curve.run}, {curve.groups}" if several else curve.groups
            begun = f"{start:.4g} at {step_of(first)}, " if last > first else ""
            parts.append(f"{name}: {begun}{end:.4g} at {step_of(last)}")
    more = f" and {len(curves) - 6} more curves" if len(curves) > 6 else ""
    shaded = f" Shaded: {band.text()}; outside of it a run warns." if band else ""
    return f"{'; '.join(parts)}{more}.{shaded}"
