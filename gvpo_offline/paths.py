"""Values of nested columns by path: `request.messages`, `choices[0].message.content`.

A path is a name, followed by names of fields (`.name`) and positions in lists (`[0]` or `.0`, and
`[-1]` for the last). A name that contains dots or brackets is found as it is written, at every
level, and before any shorter name: in `attributes.llm.model` the record `attributes` may have a
field `llm.model`, or a record `llm` with a field `model`. A field of a record that is null is null.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np

from gvpo_offline.json_text import kind_of

__all__ = ["MISSING", "has", "top_level_names", "value_at"]

MISSING: Final = object()
"""What `value_at` returns for a path that leads to nothing."""

_STEP = re.compile(r"\[(-?\d+)\]|\.?([^.\[\]]+)")
_POSITION = re.compile(r"-?\d+")


@functools.lru_cache(maxsize=4096)
def _cuts(path: str) -> tuple[tuple[str, str], ...]:
    """The ways to cut a path into a name and a rest, the longest name first."""
    cuts = [(path, "")]
    for at in range(len(path) - 1, 0, -1):
        if path[at] in ".[":
            cuts.append((path[:at], path[at + 1 :] if path[at] == "." else path[at:]))
    return tuple(cuts)


def value_at(record: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or of a field in it.

    Returns:
        The value; None if a record on the path is null; `MISSING` if a name or a position on the
        path does not exist.
    """
    if path and isinstance(record, dict) and path in record:
        return record[path]
    value: Any = record
    rest = path
    while rest:
        if value is None:
            return None
        if isinstance(value, Mapping):
            found = next(((n, after) for n, after in _cuts(rest) if n in value), None)
            if found is None:
                return MISSING
            value, rest = value[found[0]], found[1]
            continue
        value, rest = _entry(value, rest)
        if value is MISSING:
            return MISSING
    return value


def _entry(value: Any, path: str) -> tuple[Any, str]:
    """The entry of a list that the first step of a path names, and the rest of the path."""
    step = _STEP.match(path)
    index = step and (step.group(1) or step.group(2))
    if step is None or not index or not _POSITION.fullmatch(index):
        return MISSING, ""
    if not isinstance(value, list | tuple | np.ndarray):
        return MISSING, ""
    if not -len(value) <= int(index) < len(value):
        return MISSING, ""
    entry = value[int(index)]
    if isinstance(entry, np.generic):
        entry = entry.item()
    return entry, path[step.end() :].removeprefix(".")


def nearest(record: Mapping[str, Any], path: str) -> str:
    """Where a path that leads to nothing leaves a record: the last value on it, and its fields.

    Empty if already the path's first name is no column.
    """
    for at in range(len(path) - 1, 0, -1):
        value = value_at(record, path[:at]) if path[at] in ".[" else MISSING
        if isinstance(value, Mapping):
            return f"{path[:at]} with the fields {', '.join(map(str, value)) or 'none'}"
        if value is not MISSING:
            kind = f"a list of {len(value)}" if isinstance(value, list) else None
            return f"{path[:at]}, {kind or f'of type {kind_of(value)}'}"
    return ""


def has(record: Mapping[str, Any], path: str) -> bool:
    """Whether a record has the column or the nested field."""
    return path in record or value_at(record, path) is not MISSING


def top_level_names(paths: Iterable[str]) -> list[str]:
    """The names of columns that hold the values of `paths`, whichever of them exist.

    For `a.b[0]` these are `a.b[0]`, `a.b` and `a`, since each may be the name of a column.
    """
    return list(dict.fromkeys(name for path in paths for name, _ in _cuts(path)))
