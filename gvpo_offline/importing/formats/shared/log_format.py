"""The interface of a log format: it turns the rows of one input into fragments of groups.

A format that parses each row independently of the others can implement `read` with `per_row`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from gvpo_offline.errors import DataError
from gvpo_offline.importing.fragment import Fragment, with_location
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.files import Source
from gvpo_offline.importing.sources.rows import Record, Row


class InputInfo(Protocol):
    """Properties of an input that a format may use."""

    @property
    def label(self) -> str:
        """The path or address of the input, for messages."""

    @property
    def columns(self) -> Sequence[str] | None:
        """All columns of the input, or None where each row names its own (JSON lines)."""

    @property
    def floats(self) -> Sequence[str] | None:
        """The columns of floating-point numbers, or None where each row names its own columns."""

    def refuse(self, error: DataError, record: Record | None = None) -> None:
        """Refuse one row; see `Source.refuse`. A format calls it, then goes on to the next row."""


class LogFormat(Protocol):
    """Turns the rows of one kind of log into fragments.

    A format whose pictures, films and sounds have other columns than `sources.media.MEDIA` names
    them in an attribute `media_columns`. One that finds the same fragments in an input whatever
    other inputs it has read has an attribute `reads_inputs_apart` that is True: several workers
    then read the inputs.
    """

    @property
    def columns(self) -> Sequence[str] | None:
        """The columns that are read, or None for all."""

    def read(self, rows: Iterable[Row], source: InputInfo) -> Iterator[Fragment]:
        """The fragments of one input, in the order of its rows, with `Fragment.row` set.

        Lists of numbers are NumPy arrays in rows of columnar files and lists in rows of JSON. A row
        that is not of this format goes to `source.refuse`, with an error that names file and row.

        Raises:
            DataError: the whole input is not of this format, or `source.refuse` raised the error.
        """


@runtime_checkable
class ExtraDependencies(Protocol):
    """A format whose fragments depend on more than the rows and the settings."""

    def dependencies(self, source: InputInfo) -> Mapping[str, str]:
        """Further values that the fragments of `source` depend on, by name: for example a part of
        its path, or the SHA-256 of another file that the format reads. They are part of the
        identity of an import, with the rows and settings, and are recorded in the manifest."""


@runtime_checkable
class DropsResponses(Protocol):
    """A format that may drop responses."""

    def finish(self) -> Mapping[str, int]:
        """The number of dropped responses by reason; called once, after the last input.

        Raises:
            DataError: the settings do not allow a response to be dropped; names the first one.
        """


def per_row(
    rows: Iterable[Row], source: InputInfo, parse: Callable[[Record, InputInfo], Fragment]
) -> Iterator[Fragment]:
    """The fragment of each row; a row for which `parse` raises DataError is refused."""
    for row, record in rows:
        try:
            fragment = parse(record, source)
        except DataError as error:
            source.refuse(with_location(error, file=source.label, row=row), record)
            continue
        fragment.row = row
        yield fragment


@runtime_checkable
class FindsColumns(Protocol):
    """A format that uses some columns wherever the log has them."""

    def find_columns(self, sources: Sequence[Source]) -> ImportConfig:
        """The settings with the names of the columns that are used; called once, before `read`."""

    def notes(self) -> Sequence[str]:
        """Lines for the user about the columns that were found."""


@dataclass(frozen=True)
class StageLog:
    """Rows that a stage (such as `sample`) has produced and passes to the importer.

    Attributes:
        stage: name of the stage for the dataset's lineage.
        config: settings of the stage for the lineage.
        inputs: inputs of the stage for the lineage.
        sources: the rows.
        format: the format that turns the rows into fragments.
    """

    stage: str
    config: dict[str, Any]
    inputs: list[dict[str, Any]]
    sources: Sequence[Source]
    format: LogFormat
