"""One row group of a dataset as arrays, with its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gvpo_offline.findings.batch import Flags, Ints
from gvpo_offline.store.arrow import as_numpy, column_array, list_offsets
from gvpo_offline.store.dataset import GroupDataset

TOKEN_COLUMNS = ("response_token_ids", "loss_mask", "samplers", "truncated")


@dataclass(frozen=True)
class TokenBatch:
    """A row group of G groups, N responses and T response tokens.

    Attributes:
        table: the columns that were read.
        row_group: its number.
        sizes, starts: (G,) responses of each group, and the offset of its first one.
        tokens: (T,) int32 ids of the responses' tokens.
        begins, ends: (N,) offsets of each response into `tokens`.
        truncated: (N,) whether it was cut.
        samplers: (N,) names.
        counted: (T,) whether the loss mask counts the token.
        masked: (G,) whether the group has a loss mask.
    """

    table: pa.Table
    row_group: int
    sizes: Ints
    starts: Ints
    tokens: npt.NDArray[np.int32]
    begins: Ints
    ends: Ints
    truncated: Flags
    samplers: Sequence[str]
    counted: Flags
    masked: Flags

    @property
    def last(self) -> npt.NDArray[np.int32]:
        """(N,) the last id of each response."""
        return self.tokens[self.ends - 1]

    def any(self, flags: Flags) -> Flags:
        """(G,) whether some response of each group has a flag, of (N,) flags."""
        return np.logical_or.reduceat(flags, self.starts)

    def token_counts(self, flags: Flags) -> Ints:
        """(N,) tokens of each response that have a flag, of (T,) flags."""
        return np.add.reduceat(flags, self.begins, dtype=np.int64)


def token_batch(dataset: GroupDataset, row_group: int, columns: Sequence[str]) -> TokenBatch:
    """A row group; `columns` include TOKEN_COLUMNS.

    Raises:
        IntegrityError, DataError: as `GroupDataset.table`.
    """
    return token_batch_of(dataset.table(row_group, columns), row_group)


def token_batch_of(table: pa.Table, row_group: int) -> TokenBatch:
    """A row group that was read, with TOKEN_COLUMNS among its columns."""
    nested = column_array(table, "response_token_ids")
    outer = list_offsets(nested)
    responses = nested.flatten()
    inner = list_offsets(responses)
    tokens = as_numpy(responses.values)[inner[0] : inner[-1]]
    n_responses, sizes = len(responses), np.diff(outer)
    counted, masked = _counted(table, inner - inner[0], outer - outer[0])
    cut = np.zeros(n_responses, np.bool_)
    names: Sequence[str] = ["unknown"] * n_responses
    if _whole(table, "truncated"):
        cut = as_numpy(pc.fill_null(column_array(table, "truncated").flatten(), False))
    if _whole(table, "samplers"):
        names = column_array(table, "samplers").flatten().to_pylist()
    return TokenBatch(
        table,
        row_group,
        sizes,
        outer[:-1] - outer[0],
        tokens,
        inner[:-1] - inner[0],
        inner[1:] - inner[0],
        cut,
        names,
        counted,
        masked,
    )


def _whole(table: pa.Table, name: str) -> bool:
    return name in table.column_names and not table.column(name).null_count


def _counted(table: pa.Table, inner: Ints, outer: Ints) -> tuple[Flags, Flags]:
    """(T,) whether a token counts, and (G,) whether a group has a mask."""
    n_groups = table.num_rows
    counted = np.ones(int(inner[-1]), np.bool_)
    if "loss_mask" not in table.column_names:
        return counted, np.zeros(n_groups, np.bool_)
    column = column_array(table, "loss_mask")
    masked = as_numpy(column.is_valid())
    if masked.any():
        # The masks of the groups that have one, one after the other.
        flags = as_numpy(column.flatten().flatten())
        spans = np.diff(inner[outer])
        counted[np.repeat(masked, spans)] = flags
    return counted, masked
