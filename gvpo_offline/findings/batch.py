"""One row group of a dataset as arrays, without its tokens; and examples of what was found."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gvpo_offline.errors import DataError
from gvpo_offline.findings.finding import Place
from gvpo_offline.store.arrow import as_numpy, column_array, list_offsets
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.prompts import PROMPT_HASH
from gvpo_offline.store.row_groups import PrefetchedRowGroups, summary_columns
from gvpo_offline.store.schema import SUMMARY_COLUMNS

MOST_EXAMPLES = 5
LIGHT_COLUMNS = (
    *SUMMARY_COLUMNS,
    PROMPT_HASH,
    "source",
    "sampler_seq_logprobs",
    "rewards",
    "components",
    "ref_seq_logprobs",
)
"""What the light checks read; where a sidecar is not joined, its columns are absent."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclass
class SamplerNames:
    """The samplers so far, numbered in the order of their first response."""

    numbers: dict[str, int] = field(default_factory=dict)

    def codes(self, column: pa.ListArray) -> Ints:
        """The number of each response's sampler: (N,) int64."""
        encoded = column.flatten().dictionary_encode()
        names = encoded.dictionary.to_pylist()
        own = [self.numbers.setdefault(name, len(self.numbers)) for name in names]
        numbers: Ints = np.array(own, np.int64)[as_numpy(encoded.indices)]
        return numbers

    @property
    def names(self) -> list[str]:
        """The names, by number."""
        return list(self.numbers)


@dataclass(frozen=True)
class Batch:
    """A row group of G groups with N responses.

    Attributes:
        table: its light columns.
        row_group: its number.
        missing: the columns that the file does not store for all groups: they were computed from
            the tokens where that is possible.
        sizes, starts: (G,) responses of each group, and the offset of its first one.
        lengths: (N,) tokens of each response.
        samplers: (N,) the number of its sampler.
        truncated: (N,) whether it was cut.
        rewards: (N,) float64, NaN where a partial reward has none; None if no reward is joined.
        reference: (N,) float64, nats, NaN where it was not scored; None if none is joined.
        rows: (G,) row of each group in the row group; None: all of its rows.
    """

    table: pa.Table
    row_group: int
    missing: tuple[str, ...]
    sizes: Ints
    starts: Ints
    lengths: Ints
    samplers: Ints
    truncated: Flags
    rewards: Floats | None
    reference: Floats | None
    rows: Ints | None = None

    @property
    def group_of(self) -> Ints:
        """(N,) the group of each response, as a row number."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def any(self, flags: Flags) -> Flags:
        """(G,) whether some response of each group has a flag, of (N,) flags."""
        return np.logical_or.reduceat(flags, self.starts)

    def all(self, flags: Flags) -> Flags:
        """(G,) whether every response of each group has a flag, of (N,) flags."""
        return np.logical_and.reduceat(flags, self.starts)

    def only(self, groups: Flags) -> Batch | None:
        """The groups with a flag, of (G,) flags; None if there is none."""
        if not groups.any():
            return None
        responses = np.repeat(groups, self.sizes)
        sizes = self.sizes[groups]
        return replace(
            self,
            table=self.table.filter(pa.array(groups)).combine_chunks(),
            rows=np.flatnonzero(groups),
            sizes=sizes,
            starts=np.cumsum(sizes) - sizes,
            lengths=self.lengths[responses],
            samplers=self.samplers[responses],
            truncated=self.truncated[responses],
            rewards=None if self.rewards is None else self.rewards[responses],
            reference=None if self.reference is None else self.reference[responses],
        )

    def centered(self, values: npt.NDArray[Any]) -> Floats:
        """(N,) float64 values minus the mean of their group."""
        means = np.add.reduceat(values, self.starts, dtype=np.float64) / self.sizes
        return np.asarray(values - np.repeat(means, self.sizes), np.float64)


def batches(
    dataset: GroupDataset, names: SamplerNames, progress: Progress | None = None
) -> Iterator[Batch]:
    """The row groups of a dataset, with the sidecars that are joined.

    Raises:
        IntegrityError, DataError: as `summary_columns`.
    """
    numbers: Iterable[int] = PrefetchedRowGroups(dataset, LIGHT_COLUMNS)
    for row_group in progress(numbers) if progress else numbers:
        batch = batch_of(dataset, row_group, dataset.table(row_group, LIGHT_COLUMNS), names)
        if batch is not None:
            yield batch


def batch_of(
    dataset: GroupDataset, row_group: int, table: pa.Table, names: SamplerNames
) -> Batch | None:
    """A row group whose LIGHT_COLUMNS are among those of `table`; None if it has no rows.

    Raises:
        IntegrityError, DataError: as `summary_columns`.
    """
    missing = tuple(
        name
        for name in (*SUMMARY_COLUMNS, PROMPT_HASH)
        if name not in table.column_names or table.column(name).null_count
    )
    if missing:
        table = summary_columns(dataset, row_group, LIGHT_COLUMNS)
    if not table.num_rows:
        return None
    _check_sizes(dataset, row_group, table)
    return _batch(table, row_group, names, missing)


def _check_sizes(dataset: GroupDataset, row_group: int, table: pa.Table) -> None:
    """Raise DataError unless each group has responses, and one sampler and flag for each."""
    sizes = np.diff(list_offsets(column_array(table, "response_lengths")))
    for name in ("response_lengths", "samplers", "truncated"):
        own = np.diff(list_offsets(column_array(table, name)))
        wrong = (own != sizes) | (own == 0)
        if wrong.any():
            row = int(wrong.argmax())
            raise DataError(
                f"a group has at least one response, and {name} one value for each",
                received=f"{own[row]} for {sizes[row]} responses",
                remedy=f"correct the column {name}, or leave the group out of the log",
                **dataset.location(row_group).of_row(table, row),
            )


def _batch(table: pa.Table, row_group: int, names: SamplerNames, missing: tuple[str, ...]) -> Batch:
    lengths = column_array(table, "response_lengths")
    starts = list_offsets(lengths)
    cut = pc.fill_null(column_array(table, "truncated").flatten(), False)

    def joined(name: str) -> Floats | None:
        if name not in table.column_names:
            return None
        return np.asarray(as_numpy(column_array(table, name).flatten()), np.float64)

    return Batch(
        table,
        row_group,
        missing,
        sizes=np.diff(starts),
        starts=starts[:-1] - starts[0],
        lengths=as_numpy(lengths.flatten()).astype(np.int64),
        samplers=names.codes(column_array(table, "samplers")),
        truncated=as_numpy(cut),
        rewards=joined("rewards"),
        reference=joined("ref_seq_logprobs"),
    )


class Rows(Protocol):
    """What examples are taken from: a row group with its table."""

    @property
    def table(self) -> pa.Table: ...

    @property
    def row_group(self) -> int: ...


@dataclass
class Examples:
    """The first groups of which something is true, or those with the largest number."""

    _kept: list[tuple[float, int, int, str]] = field(default_factory=list)

    def clear(self) -> None:
        """Forget them."""
        self._kept.clear()

    @property
    def full(self) -> bool:
        """Whether there is no room for more of `add`."""
        return len(self._kept) >= MOST_EXAMPLES

    def add(self, batch: Rows, flags: Flags) -> None:
        """Keep groups of a batch, by (G,) flags, as long as there is room."""
        if not self.full and flags.any():
            for row in np.flatnonzero(flags)[: MOST_EXAMPLES - len(self._kept)].tolist():
                own = _group_id(batch.table, row)
                self._kept.append((0.0, batch.row_group, _row(batch, row), own))

    def add_largest(self, batch: Rows, values: npt.NDArray[Any], flags: Flags) -> None:
        """Keep the groups with the largest of all (G,) values so far, among those with a flag."""
        rows = np.flatnonzero(flags)
        for row in rows[np.argsort(-values[rows], kind="stable")][:MOST_EXAMPLES].tolist():
            own = _group_id(batch.table, row)
            place = (float(values[row]), batch.row_group, _row(batch, row), own)
            self._kept = heapq.nsmallest(
                MOST_EXAMPLES, [*self._kept, place], key=lambda kept: (-kept[0], *kept[1:3])
            )

    def above(self, bound: float) -> Examples:
        """Those of `add_largest` whose value is larger than `bound`."""
        return Examples([kept for kept in self._kept if kept[0] > bound])

    @property
    def largest(self) -> float:
        """The largest value of `add_largest`; nan if there is none."""
        return max((kept[0] for kept in self._kept), default=math.nan)

    def places(self, dataset: GroupDataset) -> list[Place]:
        """Files, rows and ids of the groups."""
        return [place_of(dataset, row_group, row, name) for _, row_group, row, name in self._kept]


def _row(batch: Rows, row: int) -> int:
    """The number in the row group of a row of a batch, which may hold some of the rows alone."""
    rows = batch.rows if isinstance(batch, Batch) else None
    return row if rows is None else int(rows[row])


def _group_id(table: pa.Table, row: int) -> str:
    found: str = table.column("group_id")[row].as_py()
    return found


def place_of(dataset: GroupDataset, row_group: int, row: int, group_id: str) -> Place:
    """The place of a group in its groups file."""
    location = dataset.location(row_group)
    return Place(str(location.file), location.first_row + row, group_id)


def places_of(dataset: GroupDataset, numbers: Sequence[int]) -> list[Place]:
    """The places of groups by their numbers in the order of the dataset."""
    starts = np.cumsum([0, *dataset.row_group_sizes])
    found = []
    for number in numbers:
        row_group = int(np.searchsorted(starts, number, side="right")) - 1
        row = int(number - starts[row_group])
        table = dataset.table(row_group, ["group_id"])
        found.append(place_of(dataset, row_group, row, _group_id(table, row)))
    return found
