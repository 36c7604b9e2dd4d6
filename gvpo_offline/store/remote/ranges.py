"""Byte ranges of the column chunks in a Parquet file, and the requests that fetch them."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow.parquet as pq

# [start, stop), in bytes from the beginning of a file.
Range = tuple[int, int]


def column_ranges(row_group: pq.RowGroupMetaData, columns: Iterable[str]) -> list[Range]:
    """The byte range of each column chunk of some top-level columns, in file order."""
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


def coalesce(ranges: Iterable[Range], *, gap: int, limit: int) -> list[list[Range]]:
    """Group neighbouring ranges into requests.

    Args:
        ranges: non-overlapping, each at most `limit` bytes long.
        gap: largest number of unneeded bytes between two neighbours of one request.
        limit: largest length of a request, in bytes.

    Returns:
        The ranges of each request, which spans from the start of the first to the end of the last.
    """
    requests: list[list[Range]] = []
    for start, stop in sorted(ranges):
        if requests and start - requests[-1][-1][1] <= gap and stop - requests[-1][0][0] <= limit:
            requests[-1].append((start, stop))
        else:
            requests.append([(start, stop)])
    return requests
