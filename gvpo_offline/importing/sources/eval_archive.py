"""Inspect's `.eval` logs: zip archives of JSON, one member for each sample.

The members are read one after the other, so memory holds one sample. Python's `zipfile` reads the
directory of the archive; the members are decompressed here, because it has no Zstandard, with which
Inspect compresses them since 2025.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from gvpo_offline.errors import DataError, IntegrityError
from gvpo_offline.importing.sources.compressed import FACTOR
from gvpo_offline.importing.sources.files import Advance, Source
from gvpo_offline.importing.sources.rows import Row
from gvpo_offline.json_text import kind_of
from gvpo_offline.limits import Limits, parse_json, too_long
from gvpo_offline.system_errors import raise_translated

__all__ = ["EvalArchive"]

_SAMPLE = re.compile(r"samples/.+_epoch_\d+\.json", re.DOTALL)
_IN_CHUNKS = re.compile(r"samples/.+_epoch_\d+/sample\.json", re.DOTALL)
# The newest first: a log that is complete, one that is being written, one of 2024.
_HEADERS = ("header.json", "_journal/start.json", "start.json")
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ZSTD = (93, 20)
# What zipfile raises beside BadZipFile for a directory of other bytes.
_BAD_DIRECTORY = (ValueError, NotImplementedError, OverflowError, struct.error)


class EvalArchive(Source):
    """A `.eval` log. A row is a sample, with the log's `eval` (model, task) as a further field.

    A sample that was written several times (a retry) is read once, as it was written last.
    """

    def __init__(self, path: Path, limits: Limits | None = None) -> None:
        super().__init__(str(path), path.stem, [path])
        self.limits = limits or self.limits
        self.text_bytes = self.size * FACTOR

    def rows(self, columns: Sequence[str] | None, advance: Advance) -> Iterator[Row]:
        """See `Source.rows`. Rows are numbered in the order of the archive."""
        with self.files[0].open("rb") as raw:
            members = self._members(raw)
            header = self._header(raw, members)
            samples = [member for name, member in members.items() if _SAMPLE.fullmatch(name)]
            if not samples and any(map(_IN_CHUNKS.fullmatch, members)):
                raise DataError(
                    "a sample of a .eval log is one member of the archive",
                    received="samples in chunks",
                    remedy="convert the log (inspect log convert --to json)",
                    file=self.label,
                )
            reported = 0
            for number, member in enumerate(samples):
                record = self._parsed(raw, member, number)
                if record is not None:
                    yield number, {"eval": header, **record}
                done = min(self.size, reported + member.compress_size)
                advance(done - reported)
                reported = done
            advance(self.size - reported)

    def _members(self, raw: IO[bytes]) -> dict[str, zipfile.ZipInfo]:
        try:
            with zipfile.ZipFile(raw) as archive:
                members = {member.filename: member for member in archive.infolist()}
        except (zipfile.BadZipFile, OSError, *_BAD_DIRECTORY) as error:
            raise_translated(error, self.label)
            raise self._damaged(str(error), None) from error
        # Several entries may name the same bytes, so that the sizes are added up.
        expanded = sum(member.file_size for member in members.values())
        self.limits.check_expansion(expanded, self.size, self.label)
        return members

    def _header(self, raw: IO[bytes], members: Mapping[str, zipfile.ZipInfo]) -> Any:
        name = next((name for name in _HEADERS if name in members), None)
        header = None if name is None else self._json(raw, members[name], None)
        found = header.get("eval") if isinstance(header, dict) else None
        if not isinstance(found, dict):
            raise DataError(
                f"a .eval log has the field eval in {' or '.join(_HEADERS)}",
                received=f"the members {', '.join(list(members)[:10]) or 'none'}",
                remedy="write the log again with Inspect",
                file=self.label,
            )
        return found

    def _parsed(
        self, raw: IO[bytes], member: zipfile.ZipInfo, row: int
    ) -> Mapping[str, Any] | None:
        """The sample of a member, or None if it was refused."""
        try:
            found = self._json(raw, member, row)
            if not isinstance(found, dict):
                raise self._no_object(kind_of(found), member, row)
        except DataError as error:
            self.refuse(error)
            return None
        return found

    def _json(self, raw: IO[bytes], member: zipfile.ZipInfo, row: int | None) -> Any:
        text = self._content(raw, member, row)
        try:
            return parse_json(text, nesting=self.limits.nesting)
        except DataError as error:
            raise error.replaced(file=self.label, row=row) from error
        except ValueError as error:
            raise self._no_object(str(error), member, row) from error

    def _content(self, raw: IO[bytes], member: zipfile.ZipInfo, row: int | None) -> bytes:
        if member.file_size > self.limits.row_bytes:
            raise too_long(self.limits.row_bytes, file=self.label, row=row)
        try:
            raw.seek(member.header_offset)
            signature, name_length, extra_length = _LOCAL_HEADER.unpack(
                raw.read(_LOCAL_HEADER.size)
            )
            if signature != b"PK\x03\x04":
                raise ValueError(f"no member at its place: {member.filename}")
            raw.seek(name_length + extra_length, io.SEEK_CUR)
            data = raw.read(member.compress_size)
            found = _decompressed(data, member.compress_type, member.file_size + 1)
        except (struct.error, ValueError, OSError, zlib.error, pa.ArrowException) as error:
            raise_translated(error, self.label)
            raise self._damaged(str(error), row) from error
        if len(found) != member.file_size or zlib.crc32(found) != member.CRC:
            raise self._damaged(f"another content of {member.filename} than its checksum", row)
        return found

    def _no_object(self, received: str, member: zipfile.ZipInfo, row: int | None) -> DataError:
        return DataError(
            "a sample of a .eval log is a JSON object",
            received=f"{received} in {member.filename}",
            remedy="write the log again with Inspect",
            file=self.label,
            row=row,
        )

    def _damaged(self, received: str, row: int | None) -> IntegrityError:
        return IntegrityError(
            "a .eval log is a complete zip archive",
            received=received,
            remedy="copy the log again",
            file=self.label,
            row=row,
        )


def _decompressed(data: bytes, method: int, most: int) -> bytes:
    """The content, or its first `most` bytes."""
    if method == zipfile.ZIP_STORED:
        return data
    if method == zipfile.ZIP_DEFLATED:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        found = inflate.decompress(data, most)
        if not inflate.eof and len(found) < most:
            raise ValueError("a compressed member that ends early")
        return found
    if method in _ZSTD:
        # A member may have several frames, which the stream reads one after the other.
        with pa.CompressedInputStream(pa.BufferReader(data), "zstd") as stream:
            return bytes(stream.read(most))
    raise ValueError(f"a member compressed by method {method}")
