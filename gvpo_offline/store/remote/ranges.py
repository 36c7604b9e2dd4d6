"""Which bytes of a Parquet file hold some columns of a row group, and how to ask for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pyarrow.parquet as pq

# [start, stop), in bytes from the beginning of a file.
Range = tuple[int, int]


def column_ranges(row_group: pq.RowGroupMetaData, columns: Iterable[str]) -> list[Range]:
    """The bytes of each column chunk of some top-level columns, in the order of the file."""
    wanted = set(columns)
    ranges = []
    for number in range(row_group.num_columns):
        chunk = row_group.column(number)
        if chunk.path_in_schema.split(".")[0] in wanted:
            start = chunk.data_page_offset
            if chunk.has_dictionary_page and chunk.dictionary_page_offset > 0:
                start = min(start, chunk.dictionary_page_offset)
            ranges.append((start, start + chunk.total_compressed_size))
    return sorted(ranges)


def cut(ranges: Iterable[Range], limit: int) -> list[Range]:
    """The ranges, each cut into pieces of at most `limit` bytes."""
    return [
        (at, min(at + limit, stop)) for start, stop in ranges for at in range(start, stop, limit)
    ]


def coalesce(ranges: Sequence[Range], *, gap: int, limit: int) -> list[tuple[Range, list[Range]]]:
    """Join ranges that lie near each other, so that one request brings several.

    Args:
        ranges: none overlaps another, none is longer than `limit`.
        gap: bytes between two neighbours that may be fetched for nothing.
        limit: bytes of one request.

    Returns:
        For each request its range, and those of `ranges` that it brings.
    """
    requests: list[tuple[Range, list[Range]]] = []
    for start, stop in sorted(ranges):
        if requests:
            (first, last), members = requests[-1]
            if start - last <= gap and stop - first <= limit:
                requests[-1] = ((first, stop), [*members, (start, stop)])
                continue
        requests.append(((start, stop), [(start, stop)]))
    return requests
