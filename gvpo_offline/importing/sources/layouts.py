"""JSON documents whose format says where their rows are, and which fields belong to every row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gvpo_offline.errors import DataError
from gvpo_offline.importing.sources.compressed import damage_named, decompressed
from gvpo_offline.importing.sources.files import Advance
from gvpo_offline.importing.sources.json_documents import JsonDocuments
from gvpo_offline.importing.sources.json_text import BadJsonError, JsonText, path_steps
from gvpo_offline.importing.sources.rows import Row
from gvpo_offline.limits import Limits

__all__ = ["LAYOUTS", "DocumentRows", "Layout"]


@dataclass(frozen=True)
class Layout:
    """Where the `.json` files of a format hold their rows, unless `rows_at` says so.

    Attributes:
        rows_at: path of the rows.
        beside: fields of the document that each row gets.
    """

    rows_at: str
    beside: tuple[str, ...] = ()


LAYOUTS = {
    "inspect": Layout("samples", ("eval",)),
    "promptfoo": Layout("results.results"),
}
"""Layouts by the name of the format."""


class DocumentRows(JsonDocuments):
    """A JSON document with rows below a field, and fields that belong to all of them."""

    def __init__(
        self, label: str, name: str, path: Path, layout: Layout, limits: Limits | None = None
    ) -> None:
        super().__init__(label, name, path, path_steps(layout.rows_at), limits)
        self._layout = layout

    def rows(self, columns: Sequence[str] | None, advance: Advance) -> Iterator[Row]:
        """See `Source.rows`."""
        common = {field: self._field(field) for field in self._layout.beside}
        for number, record in super().rows(columns, advance):
            yield number, {**common, **record}

    def _field(self, field: str) -> Any:
        """A field of the document; the file is read no further than that."""
        with self.files[0].open("rb") as raw:
            stream = decompressed(raw, self.files[0].suffix, self.limits, self.label)
            text = JsonText(stream, self.limits)
            try:
                with damage_named(self.label, self.files[0].suffix, [0]):
                    return next(text.rows([field]), None)
            except BadJsonError as error:
                raise self._invalid(f"{error} (line {text.line})", 0) from error
            except DataError as error:  # of a limit
                raise error.replaced(file=self.label) from error

    def _invalid(self, received: str, row: int) -> DataError:
        return DataError(
            "a JSON file of this format holds objects below a field, in UTF-8",
            received=received,
            remedy=f"correct the file, which holds its rows at {self._layout.rows_at}; set rows_at "
            "if they are elsewhere",
            file=self.label,
            row=row,
        )
