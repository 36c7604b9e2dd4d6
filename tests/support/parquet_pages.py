"""Byte positions of the pages of a Parquet file, with a minimal Thrift compact protocol reader."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

_CRC_FIELD, _COMPRESSED_SIZE_FIELD = 4, 3


@dataclass(frozen=True)
class Page:
    """Byte offsets of a page's header, data and end; and its checksum, or None."""

    column: str
    header: int
    data: int
    end: int
    crc: int | None


class _Reader:
    def __init__(self, content: bytes, position: int) -> None:
        self.content = content
        self.position = position

    def byte(self) -> int:
        self.position += 1
        return self.content[self.position - 1]

    def varint(self) -> int:
        value, shift = 0, 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def integer(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def value(self, kind: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self.byte()
        if kind in (4, 5, 6):
            return self.integer()
        if kind == 8:
            length = self.varint()
            self.position += length
            return None
        if kind == 12:
            return self.struct()
        raise NotImplementedError(kind)

    def struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while (head := self.byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self.integer()
            fields[number] = self.value(head & 0x0F)
        return fields


def pages(path: Path) -> list[Page]:
    """All pages of a file, in the order of row groups and columns."""
    content = path.read_bytes()
    metadata = pq.read_metadata(path)
    found = []
    for i in range(metadata.num_row_groups):
        for j in range(metadata.num_columns):
            chunk = metadata.row_group(i).column(j)
            position = chunk.dictionary_page_offset or chunk.data_page_offset
            end = position + chunk.total_compressed_size
            while position < end:
                reader = _Reader(content, position)
                header = reader.struct()
                data, size = reader.position, header[_COMPRESSED_SIZE_FIELD]
                crc = header.get(_CRC_FIELD)
                found.append(Page(chunk.path_in_schema, position, data, data + size, crc))
                position = data + size
    return found
