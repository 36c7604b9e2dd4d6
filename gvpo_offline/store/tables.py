"""Groups, rewards and reference log-probs to the tables of a dataset's files, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gvpo_offline.group import FloatArray, Group
from gvpo_offline.store.arrow import (
    column_array,
    list_array,
    nested_list_array,
    repetitive_rows,
    split_list,
    split_nested_list,
)
from gvpo_offline.store.schema import (
    GROUPS_COLUMNS,
    REFERENCE_COLUMNS,
    arrow_schema,
    rewards_schema,
)


def groups_to_table(groups: Sequence[Group]) -> pa.Table:
    """The rows of a groups file for `groups`, in their order."""
    tokens, flags = pa.int32(), pa.bool_()
    values: dict[str, Any] = {
        "group_id": [g.group_id for g in groups],
        "source": [g.source for g in groups],
        "n_tokens": [g.n_tokens for g in groups],
        "prompt_length": [len(g.prompt_token_ids) for g in groups],
        "response_lengths": [g.response_lengths for g in groups],
        "samplers": [g.samplers for g in groups],
        "truncated": [g.truncated for g in groups],
        "prompt_token_ids": list_array([g.prompt_token_ids for g in groups], tokens),
        "response_token_ids": nested_list_array([g.response_token_ids for g in groups], tokens),
        "loss_mask": nested_list_array([g.loss_mask for g in groups], flags),
        "prompt": [g.prompt for g in groups],
        "messages": [g.messages for g in groups],
        "responses": [g.responses for g in groups],
        "response_ids": [g.response_ids for g in groups],
        "metadata": [g.metadata for g in groups],
        "sampler_seq_logprobs": [
            None if g.sampler_seq_logprobs is None else g.sampler_seq_logprobs.tolist()
            for g in groups
        ],
    }
    schema = arrow_schema(GROUPS_COLUMNS)
    arrays = [
        value if isinstance(value, pa.Array) else pa.array(value, type=schema.field(name).type)
        for name, value in values.items()
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def rewards_to_table(
    group_ids: Sequence[str],
    rewards: Sequence[FloatArray],
    components: Sequence[FloatArray] | None = None,
) -> pa.Table:
    """The rows of a rewards sidecar.

    Args:
        group_ids: one id per group.
        rewards: (k,) per group.
        components: (C, k) per group, NaN where missing; None: without the column.
    """
    arrays = [pa.array(group_ids, pa.string()), list_array(rewards, pa.float64())]
    if components is not None:
        arrays.append(nested_list_array([list(parts) for parts in components], pa.float64()))
    return pa.Table.from_arrays(arrays, schema=rewards_schema(components=components is not None))


def reference_to_table(
    group_ids: Sequence[str],
    seq_logprobs: Sequence[FloatArray],
    token_logprobs: Sequence[Sequence[npt.NDArray[np.float32]]],
) -> pa.Table:
    """The rows of a reference sidecar; log-probs in nats."""
    return pa.Table.from_arrays(
        [
            pa.array(group_ids, pa.string()),
            list_array(seq_logprobs, pa.float64()),
            nested_list_array(token_logprobs, pa.float32()),
        ],
        schema=arrow_schema(REFERENCE_COLUMNS),
    )


_NUMBER_LISTS = ("prompt_token_ids", "rewards", "ref_seq_logprobs")
_OPTIONAL_LISTS = ("sampler_seq_logprobs",)
_NESTED_LISTS = ("response_token_ids", "loss_mask", "components")
_REPETITIVE_LISTS = ("samplers", "truncated")


def _column_rows(table: pa.Table, name: str) -> list[Any]:
    """A column's value in each row; None where the table has no such column."""
    if name not in table.column_names:
        return [None] * table.num_rows
    if name in _NESTED_LISTS:
        return split_nested_list(column_array(table, name))
    if name in _NUMBER_LISTS:
        return split_list(column_array(table, name))
    if name in _OPTIONAL_LISTS:
        column = column_array(table, name)
        pairs = zip(split_list(column), column.is_valid().to_pylist(), strict=True)
        return [row if valid else None for row, valid in pairs]
    if name in _REPETITIVE_LISTS:
        return repetitive_rows(column_array(table, name))
    rows: list[Any] = table.column(name).to_pylist()
    return rows


def groups_from_table(table: pa.Table) -> list[Group]:
    """The groups of a table with at least the required columns, in its order.

    Optional columns that the table lacks stay None; samplers and truncation, which training only
    counts, become "unknown" and False.
    """
    columns = {field.name: _column_rows(table, field.name) for field in fields(Group)}
    responses = [tuple(row or ()) for row in columns["response_token_ids"]]
    columns["response_token_ids"] = responses
    for name in ("loss_mask", "responses", "response_ids"):
        columns[name] = [None if row is None else tuple(row) for row in columns[name]]
    for name, unknown in (("samplers", "unknown"), ("truncated", False)):
        pairs = zip(columns[name], responses, strict=True)
        columns[name] = [(unknown,) * len(ids) if row is None else row for row, ids in pairs]
    columns["components"] = [
        None if parts is None else np.array(parts, np.float64) for parts in columns["components"]
    ]
    columns["source"] = [source or "" for source in columns["source"]]
    return list(map(Group, *columns.values()))
