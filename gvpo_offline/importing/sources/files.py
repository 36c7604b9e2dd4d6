"""The inputs of an import: hashes of their content, and streams of their rows.

Every input is read sequentially in batches of bounded size, so memory use does not depend on its
length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from gvpo_offline.errors import DataError, IntegrityError
from gvpo_offline.hashing import sha256_file, sha256_json
from gvpo_offline.importing.sources.columnar import bad_names, check_names, rows_of_batch
from gvpo_offline.importing.sources.compressed import (
    FACTOR,
    damage_named,
    decompressed,
    is_compressed,
)
from gvpo_offline.importing.sources.rows import Row
from gvpo_offline.json_text import kind_of
from gvpo_offline.limits import Limits, bounded_lines, parse_json
from gvpo_offline.system_errors import raise_translated

if TYPE_CHECKING:
    from datasets import Dataset

Advance = Callable[[int], Any]
OnRefused = Callable[[DataError, Mapping[str, Any] | None], None]
"""Called with the error of a row, which names file and row, and the row if it was parsed."""

_BATCH_BYTES = 4 << 20
_MAX_BATCH_ROWS = 4096
_REPORT_LINES = 256


class Source(ABC):
    """An input of an import: a file, or a data set of `datasets`.

    Attributes:
        label: the input as the user named it, for messages.
        name: name without folder and suffix; the default name of the sampler.
        size: length in bytes, in the unit of the progress bar.
        text_bytes: approximate length of the rows in bytes, uncompressed.
        columns: names of the columns, or None if each row names its own.
        floats: names of the columns with floating-point numbers, or None if `columns` is None.
        on_refused: called by `refuse` instead of raising; set while an import reads the rows.
        limits: bounds on what the input may hold.
    """

    on_refused: OnRefused | None = None
    limits: Limits = Limits()

    def __init__(self, label: str, name: str, files: Sequence[Path]) -> None:
        self.label = label
        self.name = name
        self.files = list(files)
        self.size = sum(path.stat().st_size for path in self.files)
        self.text_bytes = self.size
        self.columns: list[str] | None = None
        self.floats: list[str] | None = None
        self._stamp = self._stat()

    @property
    def file_name(self) -> str:
        """The last part of the label."""
        return Path(self.label).name or self.label

    def _describe(self, schema: pa.Schema) -> None:
        self.columns = list(schema.names)
        self.floats = [field.name for field in schema if pa.types.is_floating(field.type)]

    def _stat(self) -> list[tuple[int, int]]:
        return [(s.st_size, s.st_mtime_ns) for s in (path.stat() for path in self.files)]

    def sha256(self, advance: Advance) -> str:
        """SHA-256 of the content."""
        digests = []
        for path in self.files:
            digests.append(sha256_file(path))
            advance(path.stat().st_size)
        return digests[0] if len(digests) == 1 else sha256_json(digests)

    def check_unchanged(self) -> None:
        """Raise DataError if a file of the input has changed since it was opened."""
        if self._stat() != self._stamp:
            raise DataError(
                "an input does not change while it is imported",
                received="a size or modification time that differs from the start",
                remedy="wait until the program that writes it ends, then import again",
                file=self.label,
            )

    def refuse(self, error: DataError, record: Mapping[str, Any] | None = None) -> None:
        """Refuse one row of the input; when it returns, reading goes on with the next row.

        Readers of rows call it instead of raising an error that concerns one row only, so that
        `on_error` decides what a broken row does.

        Args:
            error: the rule that the row breaks; names file and row.
            record: the row, or None if it could not be parsed.

        Raises:
            DataError: `error`, unless `on_refused` is set; else what `on_refused` raises.
        """
        if self.on_refused is None:
            raise error
        self.on_refused(error, record)

    def column_names(self) -> Sequence[str] | None:
        """The columns, or those of the first row that can be parsed; None if there is no row.

        Raises:
            DataError: the file as a whole cannot be parsed.
            IntegrityError: the file is damaged.
        """
        if self.columns is not None:
            return self.columns
        before, self.on_refused = self.on_refused, lambda _, __: None
        try:
            return next((list(record) for _, record in self.rows(None, lambda _: None)), None)
        finally:
            self.on_refused = before

    def dependencies(self) -> Mapping[str, str]:
        """Further values that the rows depend on, by name, such as hashes of other files."""
        return {}

    def left_out(self) -> Mapping[str, int]:
        """Numbers of rows that were read and left out so far, by reason."""
        return {}

    @abstractmethod
    def rows(self, columns: Sequence[str] | None, advance: Advance) -> Iterator[Row]:
        """Yield row numbers and rows, with at least the columns of `columns` that exist.

        Args:
            columns: names of columns; None: all. Names that the input does not have are ignored.
            advance: called with the number of bytes read, for the progress bar.

        Raises:
            DataError: a row cannot be parsed.
            IntegrityError: the file is damaged or ends early.
        """


class JsonLines(Source):
    """A file of JSON objects, one per line, optionally compressed."""

    def __init__(self, label: str, name: str, path: Path, limits: Limits | None = None) -> None:
        super().__init__(label, name, [path])
        self.limits = limits or self.limits
        self._compressed = is_compressed(path)
        self.text_bytes = self.size * (FACTOR if self._compressed else 1)

    def rows(self, columns: Sequence[str] | None, advance: Advance) -> Iterator[Row]:
        """See `Source.rows`. Blank lines are skipped, but the numbering counts them."""
        with self.files[0].open("rb") as raw:
            read = reported = 0
            for number, line in self._lines(raw):
                read += len(line)
                if not line.isspace() and (record := self._parsed(number, line)) is not None:
                    yield number, record
                if number % _REPORT_LINES == 0:
                    position = raw.tell() if self._compressed else read
                    advance(position - reported)
                    reported = position
            advance(self.size - reported)

    def _lines(self, raw: IO[bytes]) -> Iterator[tuple[int, bytes]]:
        suffix, row = self.files[0].suffix, [0]
        with damage_named(self.label, suffix, row):
            stream = decompressed(raw, suffix, self.limits, self.label)
            lines = bounded_lines(stream, self.limits.row_bytes, self.label)
            for number, line in enumerate(lines):
                row[0] = number + 1
                yield number, line

    def _parsed(self, number: int, line: bytes) -> dict[str, Any] | None:
        """The object of a line, or None if the line was refused."""
        try:
            return self._parse(number, line)
        except DataError as error:
            self.refuse(error)
        return None

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            text = line.decode("utf-8-sig" if number == 0 else "utf-8")
            record = parse_json(text, nesting=self.limits.nesting)
        except DataError as error:
            raise error.replaced(file=self.label, row=number) from error
        except ValueError as error:
            raise DataError(
                "each line is one JSON object in UTF-8",
                received=f"{_beginning(line)} ({error})",
                remedy="correct or remove the line",
                file=self.label,
                row=number,
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                "each line is one JSON object",
                received=f"{kind_of(record)}: {_beginning(line)}",
                remedy="write one object per line",
                file=self.label,
                row=number,
            )
        return record


def _beginning(line: bytes) -> str:
    """The beginning of a line, in quotes."""
    return repr(line.rstrip(b"\r\n")[:80].decode("utf-8", "backslashreplace"))


class ParquetRows(Source):
    """A Parquet file."""

    def __init__(self, label: str, name: str, path: Path, limits: Limits | None = None) -> None:
        super().__init__(label, name, [path])
        self.limits = limits or self.limits
        with self._open() as file:
            self.limits.check_columns(len(file.schema_arrow), label)
            self._describe(file.schema_arrow)
            check_names(file.schema_arrow.names, label)
            metadata = file.metadata
            self.n_rows = metadata.num_rows
            self.text_bytes = sum(
                metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)
            )

    def _open(self) -> pq.ParquetFile:
        try:
            # With a buffer, a row group of any size is decoded page by page.
            return pq.ParquetFile(
                self.files[0], page_checksum_verification=True, buffer_size=1 << 20
            )
        except UnicodeDecodeError as error:
            raise bad_names(error, self.label) from error
        except (OSError, pa.ArrowException) as error:
            raise_translated(error, self.label)
            raise self._damaged(error, None) from error

    def _damaged(self, error: Exception, row: int | None) -> IntegrityError:
        return IntegrityError(
            "an input with this suffix is a complete Parquet file",
            received=str(error),
            remedy="copy or write the file again",
            file=self.label,
            row=row,
        )

    def rows(self, columns: Sequence[str] | None, advance: Advance) -> Iterator[Row]:
        """See `Source.rows`."""
        assert self.columns is not None
        wanted = [c for c in self.columns if columns is None or c in columns]
        width = max(1, self.text_bytes // max(1, self.n_rows))
        batch_rows = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // width))
        done = 0
        with self._open() as file:
            batches = file.iter_batches(batch_rows, columns=wanted, use_threads=False)
            while True:
                try:
                    batch = next(batches, None)
                except (OSError, pa.ArrowException) as error:
                    raise_translated(error, self.label)
                    raise self._damaged(error, done) from error
                if batch is None:
                    break
                if wanted:
                    yield from rows_of_batch(batch, done, self.label)
                else:  # none of the requested columns exists: the format raises the error
                    yield from ((done + i, {}) for i in range(batch.num_rows))
                done += batch.num_rows
                advance(self.size * batch.num_rows // max(1, self.n_rows))


class DatasetRows(Source):
    """A `datasets.Dataset`, read from its Arrow files."""

    def __init__(self, label: str, name: str, dataset: Dataset, *, whole: bool = True) -> None:
        files = [Path(entry["filename"]) for entry in dataset.cache_files]
        super().__init__(label, name, files)
        self._describe(dataset.data.schema)
        self._dataset = dataset
        # The files are not the data set if it is in memory, has row indices, or is a slice.
        self._direct = whole and bool(files) and dataset._indices is None
        if not self._direct:
            self.size = self.text_bytes = int(dataset.data.nbytes)

    def sha256(self, advance: Advance) -> str:
        """SHA-256 of the Arrow files, or of the data set's fingerprint if it has no files."""
        if self._direct:
            return super().sha256(advance)
        advance(self.size)
        return sha256_json([self._dataset._fingerprint, len(self._dataset)])

    def rows(self, columns: Sequence[str] | None, advance: Advance) -> Iterator[Row]:
        """See `Source.rows`."""
        assert self.columns is not None
        wanted = [c for c in self.columns if columns is None or c in columns]
        total, done = max(1, len(self._dataset)), 0
        for batch in self._batches():
            rows = batch.select(wanted) if wanted else batch
            yield from rows_of_batch(rows, done, self.label)
            done += batch.num_rows
            advance(self.size * batch.num_rows // total)
        if done != len(self._dataset):
            raise IntegrityError(
                f"the data set has {len(self._dataset)} rows",
                received=f"{done} in its Arrow files",
                remedy="save the data set again",
                file=self.label,
            )

    def _batches(self) -> Iterator[pa.RecordBatch]:
        if not self._direct:
            table = self._dataset.with_format("arrow")
            for start in range(0, len(table), _REPORT_LINES):
                yield from table[start : start + _REPORT_LINES].combine_chunks().to_batches()
            return
        for path in self.files:
            # Not memory-mapped: mapped pages would count as memory of this process.
            try:
                with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
                    for batch in reader:
                        # An IPC stream has no checksums: a damaged offset would be followed.
                        batch.validate(full=True)
                        yield batch
            except (OSError, pa.ArrowException) as error:
                raise_translated(error, path)
                raise IntegrityError(
                    "the Arrow files of a saved data set are complete",
                    received=str(error),
                    remedy="save the data set again",
                    file=path,
                ) from error
