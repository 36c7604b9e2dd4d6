"""Selection of responses within groups: by sampler, by number, by spread of rewards."""

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
from gvpo_offline.store.response_index import RESPONSE_AXIS, Indices, ResponseIndex, take_responses
from gvpo_offline.store.schema import GROUPS_COLUMNS, REFERENCE_COLUMNS, REWARDS_COLUMNS
from gvpo_offline.stream.selecting.predicate import suggestion
from gvpo_offline.stream.settings import ResponseSettings

Floats = npt.NDArray[np.float64]
_COLUMNS = {c.name: c for c in (*GROUPS_COLUMNS, *REWARDS_COLUMNS[1:], *REFERENCE_COLUMNS[1:])}
_FIELDS = tuple(field.name for field in fields(Group) if field.name in RESPONSE_AXIS)


def keeps_all_responses(settings: ResponseSettings) -> bool:
    """Whether the settings select every response."""
    return not settings.samplers and settings.max_responses is None


def response_summary(settings: ResponseSettings) -> str:
    """The settings, as log lines show them."""
    names = ", ".join(name.removeprefix("!") for name in settings.samplers)
    of = f"of {'all but ' if settings.excludes else ''}{names}" if names else ""
    few = f"at most {settings.max_responses}, {settings.prefer}" if settings.max_responses else ""
    return "; ".join(part for part in (of, few) if part)


def check_sampler_patterns(patterns: Sequence[str], names: Iterable[str], file: Path | str) -> None:
    """Raise ConfigError if a pattern matches none of a dataset's samplers."""
    known = sorted(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern.removeprefix("!")) for name in known):
            raise ConfigError(
                "responses.samplers holds samplers of the dataset, or patterns that match one",
                received=pattern,
                remedy=suggestion(pattern.removeprefix("!"), known),
                file=file,
            )


def choose(table: pa.Table, settings: ResponseSettings) -> ResponseIndex:
    """The selected responses of each row, in stored order.

    First the responses of the given samplers, or of all but these; of these at most
    `max_responses`: the first ones, or (spread) the best, the worst, and then repeatedly the one
    whose reward is farthest from all rewards selected so far. Ties go to the reward selected least
    often, then to the response stored first. So of rewards 0 and 1 both are selected in turn.

    Args:
        table: rows with `samplers` and, for spread, `rewards`; none of them null.
        settings: which responses to select.

    Returns:
        The rows that keep at least one response, as groups.
    """
    sizes = pc.list_value_length(table.column("samplers")).to_numpy()
    rows = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
    items = _ranks(rows)
    kept = np.arange(len(rows), dtype=np.int64)
    if settings.samplers:
        names = column_array(table, "samplers").flatten()
        kept = kept[_of_samplers(names, settings)]
    if settings.max_responses is not None and settings.prefer == "spread":
        rewards = column_array(table, "rewards").flatten().to_numpy(zero_copy_only=False)
        kept = kept[_spread(rewards[kept], rows[kept], settings.max_responses)]
    elif settings.max_responses is not None:
        kept = kept[_ranks(rows[kept]) < settings.max_responses]
    first, counts = np.unique(rows[kept], return_counts=True)
    return ResponseIndex(first, counts.astype(np.int64), rows[kept], items[kept])


def take_all_columns(table: pa.Table, index: ResponseIndex) -> pa.Table:
    """The selected rows and responses of a table, in all of its columns: (G,) rows."""
    columns = [_COLUMNS[name] for name in table.column_names]
    return take_responses(table, columns, index)


def with_responses(groups: Sequence[Group], settings: ResponseSettings) -> list[Group]:
    """Groups with their selected responses; a group without any is returned unchanged.

    Equal to `choose` and `take_all_columns` on the table that the groups were read from.
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


def _of_samplers(names: pa.Array, settings: ResponseSettings) -> npt.NDArray[np.bool_]:
    patterns = [pattern.removeprefix("!") for pattern in settings.samplers]
    encoded = names.dictionary_encode()
    matching = [
        any(fnmatchcase(name, pattern) for pattern in patterns) != settings.excludes
        for name in encoded.dictionary.to_pylist()
    ]
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    return np.array(matching, dtype=bool)[codes] if matching else np.zeros(0, dtype=bool)


def _ranks(rows: Indices) -> Indices:
    """The index of each element within its row, for ascending row numbers: (n,) int64."""
    return np.arange(len(rows), dtype=np.int64) - np.searchsorted(rows, rows)


def _spread(rewards: Floats, rows: Indices, most: int) -> Indices:
    """At most `most` elements of each row, selected greedily: (n,) int64, ascending.

    One round selects one element of every row that has one left.

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
        at = (np.arange(shape[0]), best.argmax(axis=1))  # of equal ones the first
        left[at] = False
        chosen = value[at][:, None]
        with np.errstate(over="ignore"):
            distance = np.minimum(distance, np.abs(value - chosen))
        often += value == chosen
    return np.flatnonzero(~left[places]).astype(np.int64)
