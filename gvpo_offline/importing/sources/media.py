"""Pictures, films and sounds beside a text: columns that no import of texts may ignore."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gvpo_offline.errors import DataError
from gvpo_offline.importing.sources.files import Advance, Source
from gvpo_offline.importing.sources.rows import Row

MEDIA = ("images", "image", "videos", "video", "audios", "audio")


def text_rows(
    source: Source,
    columns: Sequence[str] | None,
    advance: Advance,
    *,
    media: Sequence[str] = MEDIA,
) -> Iterator[Row]:
    """The rows of a source, as `Source.rows`, checked to have no pictures, films or sounds.

    Args:
        source: the source.
        columns: the columns that are read, or None for all.
        advance: called with the number of bytes read.
        media: the columns that hold pictures, films or sounds.

    Raises:
        DataError: as `Source.rows`; or a column of `media` has a value: the model would be trained
            on a prompt without what the prompt speaks of.
    """
    wanted = None if columns is None else list(dict.fromkeys([*columns, *media]))
    for row, record in source.rows(wanted, advance):
        for name in media:
            value = record.get(name)
            if value is not None and not _is_empty(value):
                error = DataError(
                    "prompts and responses are text; pictures, films and sounds are not imported",
                    received=f"a value in the column {name!r}",
                    remedy="remove such rows; or, if the texts do not need it, remove the column",
                    file=source.label,
                    row=row,
                )
                source.refuse(error, record)
                break
        else:
            yield row, record


def _is_empty(value: Any) -> bool:
    """Whether a value holds nothing, as in the text rows of a log that mixes both."""
    if isinstance(value, str | bytes | dict):
        return not value or (isinstance(value, dict) and all(v is None for v in value.values()))
    try:
        return all(entry is None for entry in value)
    except TypeError:
        return False
