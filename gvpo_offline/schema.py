"""What a group is: the record that every stage takes and gives, and its columns on disk.

A group is one prompt with k >= 2 responses. Its tokens lie in a *groups* file; what is learned
about it later (rewards, reference log-probs) lies in row-aligned sidecar files. The column tables
below are the single source of the files under `schemas/` and of the Arrow schemas that are read and
written.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SCHEMA_VERSION = 1

Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a file: its Arrow type, whether a file must have it, and what it means."""

    name: str
    type: pa.DataType
    required: bool
    doc: str


_TOKENS = pa.list_(pa.int32())

GROUPS_COLUMNS: tuple[Column, ...] = (
    Column("group_id", pa.string(), True, "Unique id of the group within the dataset."),
    Column("source", pa.string(), False, "Where the group came from, as the user named it."),
    Column("n_tokens", pa.int32(), False, "Prompt and response tokens of the group, in tokens."),
    Column("prompt_length", pa.int32(), False, "Length of the prompt, in tokens."),
    Column(
        "response_lengths",
        pa.list_(pa.int32()),
        False,
        "Length of each response, in tokens. (k,)",
    ),
    Column(
        "samplers", pa.list_(pa.string()), False, "Who wrote each response: a model, a person. (k,)"
    ),
    Column(
        "truncated",
        pa.list_(pa.bool_()),
        False,
        "Whether each response was cut before its end. (k,)",
    ),
    Column("prompt_token_ids", _TOKENS, True, "Token ids of the prompt, template included. (P,)"),
    Column(
        "response_token_ids",
        pa.list_(_TOKENS),
        True,
        "Token ids of each response, its end token included. (k, T_i), T_i >= 1",
    ),
    Column(
        "loss_mask",
        pa.list_(pa.list_(pa.bool_())),
        False,
        "True where the policy wrote the token; false for text it was given, such as tool output. "
        "(k, T_i), or null where every token counts.",
    ),
    Column("prompt", pa.string(), False, "The prompt as text, or null."),
    Column("messages", pa.string(), False, "The prompt as JSON chat messages, or null."),
    Column("responses", pa.list_(pa.string()), False, "Each response as text, or null. (k,)"),
    Column(
        "response_ids", pa.list_(pa.string()), False, "The log's own response ids, or null. (k,)"
    ),
    Column("metadata", pa.string(), False, "Further columns of the log as a JSON object, or null."),
    Column(
        "sampler_seq_logprobs",
        pa.list_(pa.float64()),
        False,
        "log-probability of each response under who wrote it, summed over the tokens that count, "
        "in nats; null where the log does not say for all of them. (k,)",
    ),
)

REWARDS_COLUMNS: tuple[Column, ...] = (
    Column("group_id", pa.string(), True, "The id of the same row in the groups file."),
    Column("rewards", pa.list_(pa.float64()), True, "One finite reward per response. (k,)"),
    Column(
        "components",
        pa.list_(pa.list_(pa.float64())),
        False,
        "What the rewards were made of: C parts, named in the manifest, each with one number per "
        "response, NaN where a response has no such part. (C, k)",
    ),
)

REFERENCE_COLUMNS: tuple[Column, ...] = (
    Column("group_id", pa.string(), True, "The id of the same row in the groups file."),
    Column(
        "ref_seq_logprobs",
        pa.list_(pa.float64()),
        True,
        "log pi_ref(response | prompt), summed over the tokens that count, in nats. (k,)",
    ),
    Column(
        "ref_token_logprobs",
        pa.list_(pa.list_(pa.float32())),
        False,
        "log pi_ref of every response token, in nats. (k, T_i)",
    ),
)

# What training reads; text, ids of responses and per-token log-probs stay on disk.
TRAINING_COLUMNS: tuple[str, ...] = (
    "group_id",
    "samplers",
    "truncated",
    "prompt_token_ids",
    "response_token_ids",
    "loss_mask",
    "sampler_seq_logprobs",
)
SUMMARY_COLUMNS: tuple[str, ...] = (
    "group_id",
    "samplers",
    "truncated",
    "prompt_length",
    "response_lengths",
)


def arrow_schema(columns: Sequence[Column], metadata: dict[str, str] | None = None) -> pa.Schema:
    """The Arrow schema of a file with `columns`; `metadata` goes into the Parquet footer."""
    fields = [
        pa.field(column.name, column.type, nullable=not column.required) for column in columns
    ]
    return pa.schema(fields, metadata=metadata)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One prompt and its k responses; a field that was not read, or was not logged, is None.

    Attributes:
        group_id: unique within a dataset.
        prompt_token_ids: (P,) int32.
        response_token_ids: k arrays of (T_i,) int32, end token included.
        samplers: k names.
        truncated: k flags.
        loss_mask: k arrays of (T_i,) bool, or None where every token counts.
        rewards: (k,) float64.
        components: (C, k) float64, NaN where missing; the reward family names the C parts.
        ref_seq_logprobs: (k,) float64, nats.
        sampler_seq_logprobs: (k,) float64, nats: under whoever wrote each response.
        prompt, messages, responses, response_ids, metadata, source: as in `GROUPS_COLUMNS`.
    """

    group_id: str
    prompt_token_ids: Int32Array
    response_token_ids: tuple[Int32Array, ...]
    samplers: tuple[str, ...]
    truncated: tuple[bool, ...]
    loss_mask: tuple[BoolArray, ...] | None = None
    rewards: FloatArray | None = None
    components: FloatArray | None = None
    ref_seq_logprobs: FloatArray | None = None
    sampler_seq_logprobs: FloatArray | None = None
    source: str = ""
    prompt: str | None = None
    messages: str | None = None
    responses: tuple[str, ...] | None = None
    response_ids: tuple[str, ...] | None = None
    metadata: str | None = None

    @property
    def group_size(self) -> int:
        """k, the number of responses."""
        return len(self.response_token_ids)

    @property
    def response_lengths(self) -> list[int]:
        """Length of each response, in tokens."""
        return list(map(len, self.response_token_ids))

    @property
    def n_tokens(self) -> int:
        """Tokens of the prompt, counted once, and of all responses."""
        return len(self.prompt_token_ids) + sum(self.response_lengths)


def _offsets(lengths: Sequence[int]) -> pa.Array:
    # Arrow checks the range here; a cast of NumPy's would wrap around past 2**31 tokens.
    return pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), type=pa.int32())


def _flat(arrays: Sequence[npt.NDArray[Any]], value_type: pa.DataType) -> pa.Array:
    if not arrays:
        return pa.array([], type=value_type)
    return pa.array(np.concatenate(arrays), type=value_type)


def list_array(rows: Sequence[npt.NDArray[Any]], value_type: pa.DataType) -> pa.ListArray:
    """Rows of numbers as one list column, without a Python object per number."""
    return pa.ListArray.from_arrays(_offsets([len(row) for row in rows]), _flat(rows, value_type))


def nested_list_array(
    rows: Sequence[Sequence[npt.NDArray[Any]] | None], value_type: pa.DataType
) -> pa.ListArray:
    """Rows of lists of numbers as one list-of-lists column; None becomes null."""
    inner = list_array([item for row in rows if row is not None for item in row], value_type)
    offsets = _offsets([0 if row is None else len(row) for row in rows])
    missing = pa.array([row is None for row in rows]) if any(r is None for r in rows) else None
    return pa.ListArray.from_arrays(offsets, inner, mask=missing)


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


def rewards_schema(*, components: bool) -> pa.Schema:
    """The Arrow schema of a rewards sidecar, with or without the column of components."""
    return arrow_schema([c for c in REWARDS_COLUMNS if components or c.required])


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


def as_numpy(array: pa.Array) -> npt.NDArray[Any]:
    """The values of an Arrow array: a read-only view; of bits, and with nulls, a copy."""
    if array.null_count:
        return np.asarray(array.to_numpy(zero_copy_only=False))
    # Not by to_numpy, which imports pandas and takes a quarter of a second for it.
    if pa.types.is_boolean(array.type):
        return np.array(np.from_dlpack(array.cast(pa.uint8())), np.bool_)
    return np.from_dlpack(array)


def column_array(table: pa.Table, name: str) -> pa.Array:
    """A column of a table in one piece."""
    column = table.column(name).combine_chunks()
    return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column


def split_list(array: pa.ListArray) -> list[npt.NDArray[Any]]:
    """A list column as one NumPy view per row."""
    values = as_numpy(array.values)
    return [values[a:b] for a, b in itertools.pairwise(as_numpy(array.offsets).tolist())]


def split_nested_list(array: pa.ListArray) -> list[list[npt.NDArray[Any]] | None]:
    """A list-of-lists column as NumPy views; null rows become None."""
    if array.null_count == len(array):
        return [None] * len(array)
    offsets = as_numpy(array.offsets).tolist()
    items = split_list(array.values)
    valid = array.is_valid().to_pylist()
    return [
        items[a:b] if ok else None
        for (a, b), ok in zip(itertools.pairwise(offsets), valid, strict=True)
    ]


def _repetitive_rows(array: pa.ListArray) -> list[tuple[Any, ...] | None]:
    """A list column whose rows are much alike, as tuples, each distinct one made once."""
    encoded = array.values.dictionary_encode(null_encoding="encode")
    names = encoded.dictionary.to_pylist()
    codes = as_numpy(encoded.indices).astype(np.int32).tobytes()

    @functools.cache
    def row(key: bytes) -> tuple[Any, ...]:
        return tuple(map(names.__getitem__, memoryview(key).cast("i")))

    spans = itertools.pairwise((4 * as_numpy(array.offsets)).tolist())
    valid = array.is_valid().to_pylist()
    return [row(codes[a:b]) if ok else None for (a, b), ok in zip(spans, valid, strict=True)]


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
        return _repetitive_rows(column_array(table, name))
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
