"""The columns that a predicate may name, as polars frames.

These are the stored columns without tokens, statistics of each group, and the keys of the metadata
as `metadata.<key>`. A key has one type in the whole dataset, inferred from all rows, so that
results do not depend on how the dataset is cut into files.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from gvpo_offline.errors import DataError
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.row_groups import PrefetchedRowGroups, summary_columns
from gvpo_offline.store.schema import (
    GROUPS_COLUMNS,
    REFERENCE_COLUMNS,
    REWARDS_COLUMNS,
    arrow_schema,
)

if TYPE_CHECKING:
    import polars as pl

METADATA = "metadata"
KEY_PREFIX = METADATA + "."
# Each column, and the stored columns that it is computed from.
COLUMNS: dict[str, tuple[str, ...]] = {
    "group_id": (),
    "source": ("source",),
    "n_tokens": ("prompt_length", "response_lengths"),
    "prompt_length": ("prompt_length",),
    "group_size": ("response_lengths",),
    "response_lengths": ("response_lengths",),
    "response_length_min": ("response_lengths",),
    "response_length_max": ("response_lengths",),
    "samplers": ("samplers",),
    "truncated": ("truncated",),
    "rewards": ("rewards",),
    "reward_mean": ("rewards",),
    "reward_min": ("rewards",),
    "reward_max": ("rewards",),
    "reward_std": ("rewards",),
    "reward_gap": ("rewards",),
    "has_rewards": ("rewards",),
    "ref_seq_logprobs": ("ref_seq_logprobs",),
    "has_reference": ("ref_seq_logprobs",),
}
_INT64 = range(-(2**63), 2**63)
MetadataTypes = dict[str, "type[pl.DataType]"]


class LightColumns:
    """Some columns of a dataset as frames, one per row group.

    Args:
        dataset: the dataset.
        names: keys of `COLUMNS`, `metadata.<key>`, or `metadata`: a struct of all keys.

    Attributes:
        types: the type of every key of the metadata; empty if no name needs the metadata.

    Raises:
        DataError: a row's metadata is not a JSON object.
    """

    def __init__(self, dataset: GroupDataset, names: Iterable[str]) -> None:
        self._dataset = dataset
        self._names = tuple(dict.fromkeys(["group_id", *names]))
        stored = {part for name in self._names for part in COLUMNS.get(name, (METADATA,))}
        self._stored = sorted(stored)
        self.types = metadata_types(dataset) if METADATA in stored else {}

    @property
    def schema(self) -> pl.Schema:
        """Names and types of the frames."""
        known = (*GROUPS_COLUMNS, *REWARDS_COLUMNS[1:], *REFERENCE_COLUMNS[1:])
        wanted = [column for column in known if column.name in {"group_id", *self._stored}]
        return self._framed(arrow_schema(wanted).empty_table(), []).schema

    @property
    def numbers(self) -> PrefetchedRowGroups:
        """The dataset's row groups, in order."""
        return PrefetchedRowGroups(self._dataset, [*self._stored, "response_lengths"])

    def frame(self, row_group: int) -> pl.DataFrame:
        """The columns of one row group: (n, names)."""
        table = summary_columns(self._dataset, row_group, self._stored)
        keys = _metadata(self._dataset, row_group, table) if self.types else []
        return self._framed(table, keys)

    def _framed(self, table: pa.Table, metadata: list[dict[str, Any]]) -> pl.DataFrame:
        import polars as pl

        frame = pl.DataFrame(table).with_columns(
            pl.Series(KEY_PREFIX + key, [_value(row.get(key), kind) for row in metadata], kind)
            for key, kind in self.types.items()
        )
        keys = [pl.col(KEY_PREFIX + key).alias(key) for key in self.types]
        made = _expressions() | ({METADATA: pl.struct(keys)} if keys else {})
        return frame.select(made.get(name, pl.col(name)).alias(name) for name in self._names)


def _expressions() -> dict[str, pl.Expr]:
    """The columns that are computed from stored ones."""
    import polars as pl

    rewards, prompt = pl.col("rewards").list, pl.col("prompt_length").cast(pl.Int64)
    lengths = pl.col("response_lengths").cast(pl.List(pl.Int64))
    whole = ~rewards.eval(pl.element().is_nan()).list.any()
    return {
        "prompt_length": prompt,
        "response_lengths": lengths,
        "response_length_min": lengths.list.min(),
        "response_length_max": lengths.list.max(),
        "n_tokens": prompt + lengths.list.sum(),
        "group_size": lengths.list.len().cast(pl.Int64),
        # NaN: no number, in a partial reward or reference. Null here: polars takes NaN for the
        # largest number, and a condition would select what was never scored.
        "rewards": rewards.eval(pl.element().fill_nan(None)),
        "ref_seq_logprobs": pl.col("ref_seq_logprobs").list.eval(pl.element().fill_nan(None)),
        "reward_mean": pl.when(whole).then(rewards.mean()),
        "reward_min": pl.when(whole).then(rewards.min()),
        "reward_max": pl.when(whole).then(rewards.max()),
        "reward_std": pl.when(whole).then(rewards.std(ddof=1)),
        "reward_gap": pl.when(whole).then(rewards.max() - rewards.min()),
        "has_rewards": whole,
        "has_reference": ~pl.col("ref_seq_logprobs").list.eval(pl.element().is_nan()).list.any(),
    }


def metadata_types(dataset: GroupDataset, row_groups: Iterable[int] | None = None) -> MetadataTypes:
    """The polars type of every key of the metadata, inferred from all rows.

    Integers are Int64, other numbers Float64, flags Boolean, text String; nulls and NaN are
    ignored. Mixed and nested values and integers beyond 64 bits make a key String: strings as they
    are, all other values as JSON.

    Args:
        dataset: the dataset.
        row_groups: numbers of the row groups to read; by default all.
    """
    found: defaultdict[str, set[str]] = defaultdict(set)
    for row_group in range(dataset.n_row_groups) if row_groups is None else row_groups:
        table = summary_columns(dataset, row_group, [METADATA])
        for row in _metadata(dataset, row_group, table):
            for key, value in row.items():
                found[key].add(_kind(value))
    return {key: _joined(kinds) for key, kinds in sorted(found.items())}


def _metadata(dataset: GroupDataset, row_group: int, table: pa.Table) -> list[dict[str, Any]]:
    """The metadata of each row; an empty dictionary if there is none."""
    if METADATA not in table.column_names:
        return [{}] * table.num_rows
    rows = []
    for number, text in enumerate(table.column(METADATA).to_pylist()):
        try:
            row = {} if text is None else json.loads(text)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise DataError(
                "a group's metadata is a JSON object, or null",
                received=text,
                remedy="rewrite the column, or leave metadata out of `where`",
                **dataset.location(row_group).of_row(table, number),
            )
        rows.append(row)
    return rows


def _kind(value: Any) -> str:
    if _is_nan(value):
        return "NoneType"
    if isinstance(value, int) and not isinstance(value, bool) and value not in _INT64:
        return "large"
    return type(value).__name__


def _joined(kinds: set[str]) -> type[pl.DataType]:
    import polars as pl

    known = kinds - {"NoneType"}
    if known in ({"float"}, {"int", "float"}):
        return pl.Float64
    return {"int": pl.Int64, "bool": pl.Boolean}.get("+".join(known), pl.String)


def _is_nan(value: Any) -> bool:
    """Whether a value is NaN, which is missing; polars would take it for the largest number."""
    return isinstance(value, float) and math.isnan(value)


def _value(value: Any, kind: type[pl.DataType]) -> Any:
    """A value of the metadata, converted to its key's type; None for null and NaN."""
    import polars as pl

    if _is_nan(value):
        return None
    if value is None or isinstance(value, str) or kind != pl.String:
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
