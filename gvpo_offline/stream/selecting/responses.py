"""Which responses of a group take part: by sampler, at most so many, the most different first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gvpo_offline.errors import ConfigError
from gvpo_offline.group import Group
from gvpo_offline.store.arrow import column_array
from gvpo_offline.store.pick import RESPONSE_AXIS, ResponseIndex, take_responses
from gvpo_offline.store.schema import GROUPS_COLUMNS, REFERENCE_COLUMNS, REWARDS_COLUMNS
from gvpo_offline.stream.selecting.predicate import nearest
from gvpo_offline.stream.settings import ResponseSettings

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_COLUMNS = {c.name: c for c in (*GROUPS_COLUMNS, *REWARDS_COLUMNS[1:], *REFERENCE_COLUMNS[1:])}
_FIELDS = tuple(field.name for field in fields(Group) if field.name in RESPONSE_AXIS)


def takes_all(settings: ResponseSettings) -> bool:
    """Whether every response of every group takes part."""
    return not settings.samplers and settings.max_responses is None


def described(settings: ResponseSettings) -> str:
    """The settings in words."""
    of = f"of {', '.join(settings.samplers)}" if settings.samplers else ""
    few = f"at most {settings.max_responses}, {settings.prefer}" if settings.max_responses else ""
    return "; ".join(part for part in (of, few) if part)


def check_patterns(patterns: Sequence[str], names: Iterable[str], file: Path | str) -> None:
    """Raise ConfigError if a pattern fits none of a dataset's samplers."""
    known = sorted(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ConfigError(
                "responses.samplers names samplers of the dataset, or patterns that fit one",
                received=pattern,
                remedy=nearest(pattern, known),
                file=file,
            )


def choose(table: pa.Table, settings: ResponseSettings) -> ResponseIndex:
    """The responses of each row that take part, in the order in which they are stored.

    First those of the samplers that are asked for; of these at most `max_responses`: the first
    ones, or (spread) the best, the worst, and then again and again the one whose reward is farthest
    from all rewards taken so far. Of equally far ones the one whose reward was taken least often
    comes first, then the one stored first. So rewards of 0 and 1 are taken in turn.

    Args:
        table: rows with `samplers` and, to spread, `rewards`; none of them null.
        settings: what to choose.

    Returns:
        The rows that keep at least one response, as groups.
    """
    sizes = pc.list_value_length(table.column("samplers")).to_numpy()
    rows = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
    items = _ranks(rows)
    kept = np.arange(len(rows), dtype=np.int64)
    if settings.samplers:
        names = column_array(table, "samplers").flatten()
        kept = kept[_of_samplers(names, settings.samplers)]
    if settings.max_responses is not None and settings.prefer == "spread":
        rewards = column_array(table, "rewards").flatten().to_numpy(zero_copy_only=False)
        kept = kept[_spread(rewards[kept], rows[kept], settings.max_responses)]
    elif settings.max_responses is not None:
        kept = kept[_ranks(rows[kept]) < settings.max_responses]
    first, counts = np.unique(rows[kept], return_counts=True)
    return ResponseIndex(first, counts.astype(np.int64), rows[kept], items[kept])


def take_all_columns(table: pa.Table, index: ResponseIndex) -> pa.Table:
    """The groups of an index, with every column of a table: (G,) rows."""
    columns = [_COLUMNS[name] for name in table.column_names]
    return take_responses(table, columns, index)


def with_responses(groups: Sequence[Group], settings: ResponseSettings) -> list[Group]:
    """Groups with the responses that take part; one that keeps none is left as it is.

    The same as `choose` and `take_all_columns` of the table that the groups were read from.
    """
    names = pa.array([group.samplers for group in groups], pa.list_(pa.string()))
    scored = {}
    if settings.prefer == "spread":
        scored["rewards"] = pa.array([group.rewards for group in groups], pa.list_(pa.float64()))
    index = choose(pa.table({"samplers": names, **scored}), settings)
    result = list(groups)
    for row, items in zip(index.first, np.split(index.items, index.starts[1:]), strict=True):
        if len(items) < groups[row].group_size:
            result[row] = _only(groups[row], items.tolist())
    return result


def _only(group: Group, items: Sequence[int]) -> Group:
    """A group with some of its responses."""
    changes: dict[str, Any] = {}
    for name in _FIELDS:
        value = getattr(group, name)
        if isinstance(value, np.ndarray):
            changes[name] = value.take(items, axis=RESPONSE_AXIS[name])
        elif value is not None:
            changes[name] = tuple(value[item] for item in items)
    return replace(group, **changes)


def _of_samplers(names: pa.Array, patterns: Sequence[str]) -> npt.NDArray[np.bool_]:
    encoded = names.dictionary_encode()
    matching = [
        any(fnmatchcase(name, pattern) for pattern in patterns)
        for name in encoded.dictionary.to_pylist()
    ]
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    return np.array(matching, dtype=bool)[codes] if matching else np.zeros(0, dtype=bool)


def _ranks(rows: Indices) -> Indices:
    """The place of each element among those of its row; row numbers ascend. (n,) int64"""
    return np.arange(len(rows), dtype=np.int64) - np.searchsorted(rows, rows)


def _spread(rewards: Floats, rows: Indices, most: int) -> Indices:
    """At most `most` elements of each row, chosen greedily: (n,) int64, ascending.

    One round chooses one element of every row that has one left.

    Args:
        rewards: (n,).
        rows: (n,) ascending row numbers.
        most: rounds.
    """
    distinct, run = np.unique(rows, return_inverse=True)
    places = (run, _ranks(rows))
    shape = (len(distinct), 1 + int(places[1].max(initial=0)))
    value, left = np.zeros(shape), np.zeros(shape, dtype=bool)
    value[places], left[places] = rewards, True
    distance, often = np.full(shape, np.inf), np.zeros(shape)
    for number in range(min(most, shape[1])):
        best = left.copy()
        for score in (distance if number > 1 else value if number == 0 else -value, -often):
            open_score = np.where(best, score, -np.inf)
            best &= open_score == open_score.max(axis=1, keepdims=True)
        at = (np.arange(shape[0]), best.argmax(axis=1))  # of equals the first one
        left[at] = False
        chosen = value[at][:, None]
        with np.errstate(over="ignore"):
            distance = np.minimum(distance, np.abs(value - chosen))
        often += value == chosen
    return np.flatnonzero(~left[places]).astype(np.int64)
