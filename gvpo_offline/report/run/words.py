"""Numbers of a run in words."""

from __future__ import annotations

_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_KILO = 1000.0


def step_of(step: int | None) -> str:
    """ "step 1,000"."""
    return "no step" if step is None else f"step {step:,}"


def steps_text(step: int, steps: int | None) -> str:
    """ "20 of 100 steps"."""
    return f"{step:,} steps" if steps is None else f"{step:,} of {steps:,} steps"


def signed_change(change: float) -> str:
    """ "0.02 more than at first"."""
    return f"{abs(change):.2g} {'more' if change > 0 else 'less'} than at first"


def duration(seconds: float) -> str:
    """Seconds in the units that a person would use: "1 h 5 min"."""
    if seconds < _MINUTE:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE} s"
    if whole < _DAY:
        return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"
    return f"{whole // _DAY} d {whole % _DAY // _HOUR} h"


def size_text(size: float) -> str:
    """Bytes in decimal units: "1.2 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < _KILO:
            return f"{size:.3g} {unit}"
        size /= _KILO
    return f"{size:.3g} TB"


def short(text: str, most: int = 200) -> str:
    """A text in one line, cut."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
