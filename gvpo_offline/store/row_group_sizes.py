"""The sizes of a Parquet file's row groups, as runs of equal sizes.

A manifest of a billion groups names millions of row groups, most of one size. They stay runs in
memory: a manifest of some kilobytes takes some kilobytes, whatever sizes it claims.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, overload

import numpy as np
import numpy.typing as npt
from pydantic import Field, GetPydanticSchema, PlainSerializer, SerializationInfo
from pydantic_core import core_schema

_LONGEST_RUN = 2**24  # more row groups than fit into a Parquet footer
# The densest files that pyarrow writes (two columns, unique ids, constant values, DELTA_BYTE_ARRAY
# and the highest level of zstd or brotli) have 19 rows per byte; and 229 bytes per row group of one
# row. A claim that is 50 times denser, or a quarter as large, is none of a real file.
_MOST_ROWS_PER_BYTE = 1024
_FEWEST_BYTES_PER_ROW_GROUP = 64
_MANY_ROW_GROUPS, _MANY_ROWS = 2**12, 2**21
_MOST_BYTES = 2**50  # so that the rows of 8 files fit into int64; larger than any file


class RowGroups(Sequence[int]):
    """Row group sizes as an immutable sequence; `==` compares with tuples and lists too.

    Args:
        sizes: the sizes, in order.
    """

    __slots__ = ("_ends", "_rows", "_sizes")

    def __init__(self, sizes: Iterable[int] = ()) -> None:
        self._set((size, 1) for size in sizes)

    def _set(self, runs: Iterable[tuple[int, int]]) -> None:
        own: list[int] = []
        ends: list[int] = []  # row groups up to the end of each run
        rows: list[int] = []  # rows up to the end of each run
        count = total = 0
        for size, times in runs:
            count, total = count + times, total + size * times
            if own and own[-1] == size:
                ends[-1], rows[-1] = count, total
            else:
                own.append(size)
                ends.append(count)
                rows.append(total)
        self._sizes, self._ends, self._rows = tuple(own), tuple(ends), tuple(rows)

    @classmethod
    def of_runs(cls, runs: Iterable[tuple[int, int]]) -> RowGroups:
        """From pairs of a size and the number of consecutive row groups that have it."""
        made = cls()
        made._set(runs)
        return made

    def runs(self) -> list[tuple[int, int]]:
        """Pairs of a size and the number of consecutive row groups that have it."""
        starts = (0, *self._ends)[: len(self._ends)]
        return [
            (size, end - start)
            for size, start, end in zip(self._sizes, starts, self._ends, strict=True)
        ]

    @property
    def rows(self) -> int:
        """Sum of the sizes."""
        return self._rows[-1] if self._rows else 0

    @property
    def smallest(self) -> int:
        """The smallest size; 0 without row groups."""
        return min(self._sizes, default=0)

    def rows_before(self, index: int) -> int:
        """Rows of the first `index` row groups."""
        if index >= len(self):
            return self.rows
        run = bisect.bisect_right(self._ends, index)
        start, before = (self._ends[run - 1], self._rows[run - 1]) if run else (0, 0)
        return before + (index - start) * self._sizes[run]

    def array(self) -> npt.NDArray[np.int64]:
        """(n,) int64: the sizes, written out."""
        times = np.array([times for _, times in self.runs()], np.int64)
        return np.repeat(np.array(self._sizes, np.int64), times)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(itertools.repeat(*run) for run in self.runs())

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[int, ...]: ...

    def __getitem__(self, index: int | slice) -> int | tuple[int, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(len(self))[index])
        at = range(len(self))[index]  # IndexError, and negative numbers
        return self._sizes[bisect.bisect_right(self._ends, at)]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, RowGroups):
            return self._sizes == other._sizes and self._ends == other._ends
        if isinstance(other, tuple | list):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    def __hash__(self) -> int:
        return hash((self._sizes, self._ends))

    def __repr__(self) -> str:
        return f"RowGroups.of_runs({self.runs()!r})"


def n_rows(sizes: Sequence[int]) -> int:
    """Sum of row group sizes."""
    return sizes.rows if isinstance(sizes, RowGroups) else sum(sizes)


def rows_before(sizes: Sequence[int], index: int) -> int:
    """Rows of the first `index` row groups."""
    return sizes.rows_before(index) if isinstance(sizes, RowGroups) else sum(sizes[:index])


def size_array(sizes: Sequence[int]) -> npt.NDArray[np.int64]:
    """(n,) int64: row group sizes, written out."""
    return sizes.array() if isinstance(sizes, RowGroups) else np.array(sizes, np.int64)


def are_many(sizes: Sequence[int]) -> bool:
    """Whether one file claims so much that it is looked at before memory is taken for it."""
    return len(sizes) > _MANY_ROW_GROUPS or n_rows(sizes) > _MANY_ROWS


def sizes_problem(sizes: Sequence[int], n_bytes: int) -> str | None:
    """Why a file of `n_bytes` cannot have these row groups; None if it can."""
    if not 0 <= n_bytes <= _MOST_BYTES:
        return f"a file of {n_bytes} bytes"
    if isinstance(sizes, RowGroups) and sizes.smallest < 0:
        return f"a row group of {sizes.smallest} rows"
    if n_rows(sizes) > n_bytes * _MOST_ROWS_PER_BYTE:
        return f"{n_rows(sizes):,} rows in a file of {n_bytes:,} bytes"
    if len(sizes) * _FEWEST_BYTES_PER_ROW_GROUP > n_bytes:
        return f"{len(sizes):,} row groups in a file of {n_bytes:,} bytes"
    return None


@functools.lru_cache(maxsize=256)  # most files of a dataset have the same row group sizes
def _parsed(sizes: tuple[int | tuple[int, int], ...]) -> RowGroups:
    return RowGroups.of_runs((size, 1) if isinstance(size, int) else size for size in sizes)


def _validated(value: Any, parse: Callable[[Any], Any]) -> RowGroups:
    return value if isinstance(value, RowGroups) else _parsed(parse(value))


def _dumped(value: Sequence[int], info: SerializationInfo) -> Any:
    """Run-length encoding in JSON: consecutive equal sizes become `[size, times]`."""
    if info.mode != "json":
        return tuple(value)
    held = value if isinstance(value, RowGroups) else RowGroups(value)
    return [size if times == 1 else (size, times) for size, times in held.runs()]


_Run = tuple[int, Annotated[int, Field(gt=0, le=_LONGEST_RUN)]]
RowGroupSizes = Annotated[
    Sequence[int],
    GetPydanticSchema(
        lambda _, handler: core_schema.no_info_wrap_validator_function(
            _validated, handler(tuple[int | _Run, ...])
        )
    ),
    PlainSerializer(_dumped),
]
