"""One row group of a dataset as flat arrays."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gvpo_offline.errors import DataError
from gvpo_offline.findings.one_pass import CHECKED_COLUMNS
from gvpo_offline.group import BoolArray, FloatArray
from gvpo_offline.hashing import UInt64Array
from gvpo_offline.store.arrow import as_numpy, column_array, list_offsets, prompt_hashes
from gvpo_offline.store.columns import RowGroupLocation
from gvpo_offline.store.dataset import GroupDataset

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]

SHOWN_COLUMNS = (
    *("group_id", "source", "samplers", "truncated", "prompt_hash", "prompt_token_ids"),
    *("response_token_ids", "loss_mask", "prompt", "messages", "rewards", "components"),
    *("ref_seq_logprobs", "ref_token_logprobs"),
)
"""What a group to read needs, of the columns that the dataset has."""
COLUMNS = tuple(dict.fromkeys((*SHOWN_COLUMNS, *CHECKED_COLUMNS)))
UNKNOWN_SAMPLER, OTHER_SAMPLERS = "unknown", "(other samplers)"
MOST_SAMPLERS = 1000


@dataclass
class SamplerCodes:
    """Numbers of samplers. From the 1,001st name on, samplers share one number.

    Attributes:
        names: by number.
        merged: whether some samplers share the number of `OTHER_SAMPLERS`.
    """

    names: list[str] = field(default_factory=list)
    merged: bool = False
    _codes: dict[str, int] = field(default_factory=dict)

    def code(self, name: str) -> int:
        """The number of a sampler."""
        if name not in self._codes and len(self.names) >= MOST_SAMPLERS:
            self.merged = True
            name = OTHER_SAMPLERS
        if name not in self._codes:
            self._codes[name] = len(self.names)
            self.names.append(name)
        return self._codes[name]


@dataclass(frozen=True, eq=False)
class RowGroupLogprobs:
    """Reference log-probs of all response tokens of a row group, one response after the other.

    Attributes:
        values: (T,) float32, nats.
        counted: (T,) bool: whether the token counts; None: every token does.
        starts, stops: (N,) offsets of each response; equal where it has none stored.
    """

    values: npt.NDArray[np.float32]
    counted: BoolArray | None
    starts: Int64Array
    stops: Int64Array


@dataclass(frozen=True, eq=False)
class ReportBatch:
    """G groups with N responses in all; the responses of a group are neighbours.

    Attributes:
        row_group: its number.
        location: its file and first row.
        table: the columns that were read.
        group_ids: G ids.
        sizes, starts: (G,) responses of each group, and the index of the first.
        prompt_lengths: (G,) tokens.
        prompt_keys: (G,) `prompt_hash`.
        samplers: (N,) numbers of `SamplerCodes`.
        lengths, counted: (N,) tokens, and how many of them the loss mask counts.
        truncated: (N,).
        response_keys: (N,) the first 64 bits of BLAKE2b of each response's token ids.
        rewards: (N,) or None.
        components: (C, N), NaN where missing; None if there are none.
        ref_logprobs: (N,) nats, NaN where not scored; None without a reference.
        token_logprobs: None where they are not stored.
    """

    row_group: int
    location: RowGroupLocation
    table: pa.Table
    group_ids: list[str]
    sizes: Int64Array
    starts: Int64Array
    prompt_lengths: Int64Array
    prompt_keys: UInt64Array
    samplers: Int64Array
    lengths: Int64Array
    counted: Int64Array
    truncated: BoolArray
    response_keys: UInt64Array
    rewards: FloatArray | None
    components: FloatArray | None
    ref_logprobs: FloatArray | None
    token_logprobs: RowGroupLogprobs | None


def read_batch(
    dataset: GroupDataset, row_group: int, names: SamplerCodes, n_components: int
) -> ReportBatch | None:
    """Read one row group; None if it has no rows.

    Args:
        dataset: with the reward and reference to describe.
        row_group: its number.
        names: of all samplers so far; new ones are added.
        n_components: C, number of components of the reward.

    Raises:
        IntegrityError, DataError: as `GroupDataset.table`; or a group has no responses, a response
            no tokens, a column not one entry for each of them.
    """
    table = dataset.table(row_group, COLUMNS)
    if not table.num_rows:
        return None
    location = dataset.location(row_group)
    prompts = column_array(table, "prompt_token_ids")
    responses = column_array(table, "response_token_ids")
    outer = list_offsets(responses)
    sizes = np.diff(outer)
    inner = list_offsets(responses.values)[outer[0] : outer[-1] + 1]
    lengths = np.diff(inner)
    _check_filled(table, sizes, lengths, location)
    counted_T, counted = _counted(table, sizes, lengths, location)
    return ReportBatch(
        row_group=row_group,
        location=location,
        table=table,
        group_ids=table.column("group_id").to_pylist(),
        sizes=sizes,
        starts=np.cumsum(sizes) - sizes,
        prompt_lengths=np.diff(list_offsets(prompts)),
        prompt_keys=_prompt_keys(table, prompts),
        samplers=_samplers(table, sizes, names, location),
        lengths=lengths,
        counted=counted,
        truncated=_truncated(table, sizes, location),
        response_keys=_response_keys(responses.values.values, inner),
        rewards=_scalars(table, "rewards"),
        components=_components(table, sizes, n_components),
        ref_logprobs=_scalars(table, "ref_seq_logprobs"),
        token_logprobs=_token_logprobs(table, sizes, lengths, counted_T, location),
    )


def _check_filled(
    table: pa.Table, sizes: Int64Array, lengths: Int64Array, location: RowGroupLocation
) -> None:
    empty = np.flatnonzero(sizes == 0)
    if len(empty):
        raise DataError(
            "a group has at least one response",
            received="none",
            remedy="leave the group out of the log",
            **location.of_row(table, int(empty[0])),
        )
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        raise DataError(
            "a response needs at least 1 token",
            received="0 tokens",
            remedy="drop it (empty_responses: drop) or log the token that ended it",
            **location.of_row(table, _row_of(int(empty[0]), sizes)),
        )


def _row_of(response: int, sizes: Int64Array) -> int:
    return int(np.searchsorted(np.cumsum(sizes), response, side="right"))


def _check_sizes(
    table: pa.Table, name: str, found: Int64Array, sizes: Int64Array, location: RowGroupLocation
) -> None:
    """Raise DataError unless each row of a column has one entry per response."""
    wrong = np.flatnonzero(found != sizes)
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{name} has one entry per response",
            received=f"{found[row]} for {sizes[row]} responses",
            remedy="write the column again for these groups",
            **location.of_row(table, row),
        )


def _filled_column(table: pa.Table, name: str) -> pa.ListArray | None:
    """A list column; None where it is missing, or null in every row."""
    if name not in table.column_names:
        return None
    array = column_array(table, name)
    return None if array.null_count == len(array) else array


def _per_response(
    table: pa.Table, name: str, sizes: Int64Array, default: Any, location: RowGroupLocation
) -> pa.Array:
    """The values of a list column with one entry per response; `default` for null rows."""
    array = _filled_column(table, name)
    if array is None:
        return pa.array([default] * int(sizes.sum()))
    if array.null_count:
        rows = array.to_pylist()
        filled = [[default] * int(k) if row is None else row for row, k in zip(rows, sizes)]  # noqa: B905
        array = pa.array(filled, array.type)
    _check_sizes(table, name, np.diff(list_offsets(array)), sizes, location)
    return array.flatten()


def _samplers(
    table: pa.Table, sizes: Int64Array, names: SamplerCodes, location: RowGroupLocation
) -> Int64Array:
    values = _per_response(table, "samplers", sizes, UNKNOWN_SAMPLER, location)
    encoded = values.dictionary_encode()
    codes = np.array([names.code(name) for name in encoded.dictionary.to_pylist()], np.int64)
    return np.asarray(codes[as_numpy(encoded.indices)])


def _truncated(table: pa.Table, sizes: Int64Array, location: RowGroupLocation) -> BoolArray:
    values = _per_response(table, "truncated", sizes, False, location)
    return np.asarray(as_numpy(pc.fill_null(values, False)), np.bool_)


def _prompt_keys(table: pa.Table, prompts: pa.ListArray) -> UInt64Array:
    if "prompt_hash" in table.column_names and not table.column("prompt_hash").null_count:
        return np.asarray(as_numpy(column_array(table, "prompt_hash")))
    return prompt_hashes(prompts)


def _response_keys(tokens: pa.Array, offsets: Int64Array) -> UInt64Array:
    values = np.ascontiguousarray(as_numpy(tokens), "<i4")
    content = memoryview(values.tobytes())
    digests = b"".join(
        hashlib.blake2b(content[4 * a : 4 * b], digest_size=8).digest()
        for a, b in itertools.pairwise(offsets.tolist())
    )
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def _counted(
    table: pa.Table, sizes: Int64Array, lengths: Int64Array, location: RowGroupLocation
) -> tuple[BoolArray | None, Int64Array]:
    """Whether each token counts, (T,), None where every token does; and counts, (N,)."""
    masks = _filled_column(table, "loss_mask")
    if masks is None:
        return None, lengths
    valid = np.asarray(masks.is_valid().to_numpy(zero_copy_only=False))
    _check_sizes(table, "loss_mask", np.diff(list_offsets(masks))[valid], sizes[valid], location)
    own = np.repeat(valid, sizes)  # responses that have a mask
    stored = masks.flatten()
    found = np.diff(list_offsets(stored))
    wrong = np.flatnonzero(found != lengths[own])
    if len(wrong):
        at = int(wrong[0])
        response = int(np.flatnonzero(own)[at])
        raise DataError(
            "loss_mask has one flag per response token",
            received=f"{found[at]} for {lengths[response]} tokens",
            remedy="write the column again for these groups",
            **location.of_row(table, _row_of(response, sizes)),
        )
    flags = np.ones(int(lengths.sum()), np.bool_)
    flags[np.repeat(own, lengths)] = as_numpy(stored.flatten())
    return flags, np.add.reduceat(flags, np.cumsum(lengths) - lengths, dtype=np.int64)


def _scalars(table: pa.Table, name: str) -> FloatArray | None:
    """One number per response of a joined column, whose sizes the store has checked."""
    if name not in table.column_names:
        return None
    return np.asarray(as_numpy(column_array(table, name).flatten()), np.float64)


def _components(table: pa.Table, sizes: Int64Array, n_components: int) -> FloatArray | None:
    array = _filled_column(table, "components")
    if array is None or not n_components:
        return None
    valid = np.asarray(array.is_valid().to_numpy(zero_copy_only=False))
    inner = array.flatten()  # C lists of each row that is not null
    values = np.asarray(as_numpy(inner.flatten()), np.float64)
    result = np.full((n_components, int(sizes.sum())), np.nan)
    columns = np.flatnonzero(np.repeat(valid, sizes))
    own = sizes[valid]
    first = n_components * (np.cumsum(own) - own)  # of each row among the values
    within = np.arange(len(columns)) - np.repeat(np.cumsum(own) - own, own)
    for number in range(n_components):
        result[number, columns] = values[np.repeat(first + number * own, own) + within]
    return result


def _token_logprobs(
    table: pa.Table,
    sizes: Int64Array,
    lengths: Int64Array,
    counted_T: BoolArray | None,
    location: RowGroupLocation,
) -> RowGroupLogprobs | None:
    array = _filled_column(table, "ref_token_logprobs")
    if array is None:
        return None
    if array.null_count:
        rows = array.to_pylist()
        array = pa.array([r or [[]] * int(k) for r, k in zip(rows, sizes)], array.type)  # noqa: B905
    _check_sizes(table, "ref_token_logprobs", np.diff(list_offsets(array)), sizes, location)
    lists = array.flatten()
    offsets = list_offsets(lists)
    offsets = offsets - offsets[0]
    found = np.diff(offsets)
    wrong = np.flatnonzero((found != lengths) & (found != 0))
    if len(wrong):
        at = int(wrong[0])
        raise DataError(
            "ref_token_logprobs has one number per response token, or none",
            received=f"{found[at]} for {lengths[at]} tokens",
            remedy="score the reference again",
            **location.of_row(table, _row_of(at, sizes)),
        )
    if counted_T is not None and not found.all():
        counted_T = counted_T[np.repeat(found > 0, lengths)]
    if not found.any():
        return None
    values = np.asarray(as_numpy(lists.flatten()), np.float32)
    return RowGroupLogprobs(values, counted_T, offsets[:-1], offsets[1:])
