"""What a format of logs is: rows of one input in, fragments of groups out.

Where each row stands for itself, `per_row` is all the loop that it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from gvpo_offline.errors import DataError
from gvpo_offline.importing.fragment import Fragment, with_location
from gvpo_offline.importing.sources.files import Source
from gvpo_offline.importing.sources.rows import Record, Row


class InputInfo(Protocol):
    """What a format may know about the input that it reads."""

    @property
    def label(self) -> str:
        """The input as the user knows it, for messages."""

    @property
    def columns(self) -> Sequence[str] | None:
        """All columns of the input, or None where each row names its own (JSON lines)."""

    @property
    def floats(self) -> Sequence[str] | None:
        """Those columns that hold floating-point numbers, or None likewise."""


class LogFormat(Protocol):
    """How the rows of one kind of log become fragments."""

    @property
    def columns(self) -> Sequence[str] | None:
        """The columns that are read, or None for all."""

    def read(self, rows: Iterable[Row], source: InputInfo) -> Iterator[Fragment]:
        """Fragments of one input, in the order of its rows; `Fragment.row` is filled in.

        Lists of numbers come as NumPy arrays from columnar files and as lists from JSON.

        Raises:
            DataError: a row is not of this format; names file and row.
        """


@runtime_checkable
class ExtraDependencies(Protocol):
    """A format whose fragments depend on more than rows and settings."""

    def dependencies(self, source: InputInfo) -> Mapping[str, str]:
        """What else the fragments of `source` depend on, by name: a part of its path, the SHA-256
        of a file that is read beside it. Decides, with rows and settings, whether an import is the
        same as an earlier one; recorded in the manifest."""


@runtime_checkable
class DropsResponses(Protocol):
    """A format that may leave responses out."""

    def finish(self) -> Mapping[str, int]:
        """How many responses were left out, by reason; called once, after the last input.

        Raises:
            DataError: some should not have been, as the settings are; names the first.
        """


def per_row(
    rows: Iterable[Row], source: InputInfo, parse: Callable[[Record, InputInfo], Fragment]
) -> Iterator[Fragment]:
    """`parse` on every row; its DataErrors are given their place."""
    for row, record in rows:
        try:
            fragment = parse(record, source)
        except DataError as error:
            raise with_location(error, file=source.label, row=row) from error.__cause__
        fragment.row = row
        yield fragment


@dataclass(frozen=True)
class StageLog:
    """What is imported, where a stage has made it itself.

    Attributes:
        stage: the stage, as the dataset's lineage calls it.
        config: its settings, likewise.
        inputs: what it was made from, likewise.
        sources: its rows.
        format: how they become fragments.
    """

    stage: str
    config: dict[str, Any]
    inputs: list[dict[str, Any]]
    sources: Sequence[Source]
    format: LogFormat
