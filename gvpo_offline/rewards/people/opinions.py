"""What people said, read from files and found again in the dataset."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gvpo_offline.errors import DataError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.importing.sources.inputs import find_sources
from gvpo_offline.store.dataset import GroupDataset

Naming = Literal["id", "index", "sampler"]


@dataclass(frozen=True, slots=True)
class Opinion:
    """A row of a file: its values by column, and where it stands."""

    values: dict[str, Any]
    file: str
    row: int

    @property
    def place(self) -> dict[str, Any]:
        """File and row, for errors."""
        return {"file": self.file, "row": self.row}

    def text(self, column: str) -> str:
        """An id or a word.

        Raises:
            DataError: the row has no such column, or it is neither text nor a whole number.
        """
        value = self.values.get(column)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise self._wrong(column, "text or a whole number")
        return str(value)

    def number(self, column: str) -> float:
        """A finite number, which may be written as text.

        Raises:
            DataError: it is none.
        """
        value = self.values.get(column)
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise self._wrong(column, "a finite number")
        return number

    def _wrong(self, column: str, what: str) -> DataError:
        there = column in self.values
        return DataError(
            f"column {column} holds {what} in every row",
            received=repr(self.values[column])
            if there
            else f"the columns {', '.join(self.values)}",
            remedy="correct the row" if there else "name the column in the scorer's settings",
            **self.place,
        )


@dataclass(frozen=True)
class Opinions:
    """All rows of some files.

    Attributes:
        sha256: hash of the files' content, in whatever order they were named.
        by_group: the rows about each group, in order.
    """

    sha256: str
    by_group: dict[str, list[Opinion]]

    @classmethod
    def read(cls, inputs: str | Sequence[str], group_column: str) -> Opinions:
        """Read files, whole.

        Raises:
            DataError: an input names no file, or a row cannot be read or names no group.
            ConfigError: a file of a kind that is not read here.
            IntegrityError: a file is damaged.
        """
        by_group = defaultdict(list)
        digests = []
        for source in find_sources(inputs, csv=True):
            digests.append(source.sha256(_no_progress))
            for row, values in source.rows(None, _no_progress):
                opinion = Opinion(dict(values), source.label, row)
                by_group[opinion.text(group_column)].append(opinion)
            source.check_unchanged()
        return cls(sha256_json(sorted(digests)), dict(by_group))


def _no_progress(n_bytes: int) -> None:
    """These files are small."""


Names = dict[str, list[str]]


def response_names(dataset: GroupDataset, row_group: int, by: Naming) -> Names:
    """What the responses of each group of a row group are called, in order.

    Raises:
        DataError: the log has no ids of responses, and `by` asks for them.
    """
    column = {"id": "response_ids", "index": "response_lengths", "sampler": "samplers"}[by]
    table = dataset.table(row_group, [column])
    found: Names = {}
    groups = table.column("group_id").to_pylist()
    missing = [None] * len(groups)
    rows = table.column(column).to_pylist() if column in table.column_names else missing
    for row, (group, values) in enumerate(zip(groups, rows, strict=True)):
        if values is None:
            place = dataset.location(row_group)
            raise DataError(
                "responses that are called by their id have one in the dataset",
                received="a group without response ids",
                remedy="set response_by: index, or sampler",
                file=place.file,
                row=place.first_row + row,
                group=group,
            )
        found[group] = [str(i) for i in range(len(values))] if by == "index" else values
    return found


def position(opinion: Opinion, name: str, names: Sequence[str], group: str) -> int:
    """Which response of a group is meant.

    Raises:
        DataError: none of them, or several.
    """
    found = [i for i, other in enumerate(names) if other == name]
    if len(found) != 1:
        raise DataError(
            "what people judged is one response of the group",
            received=f"{name!r}, which is {'several' if found else 'none'} of {', '.join(names)}",
            remedy="correct the row, or response_by",
            **opinion.place,
            group=group,
        )
    return found[0]
