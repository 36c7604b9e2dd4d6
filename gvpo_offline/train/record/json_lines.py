"""Files of JSON objects, one a line, that a run writes to its folder while it trains."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gvpo_offline.files import owned_file, remove_abandoned

logger = logging.getLogger(__name__)
Line = Mapping[str, Any]


class JsonLinesFile:
    """A file of JSON lines in the folder of a run; nothing is written before `begin`.

    A line is appended in one write. A file that cannot be written does not end the run: a warning
    says so once.

    Args:
        name: the file's name.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._path: Path | None = None
        self.n_lines = 0

    @property
    def is_open(self) -> bool:
        """Whether lines are written."""
        return self._path is not None

    def begin(self, folder: Path, lines: Iterable[Line] = ()) -> None:
        """Replace the file with the given lines: those of the run up to the step it goes on from.

        Args:
            folder: of the run.
            lines: see `json_line`.
        """
        self._path, self.n_lines = folder / self._name, 0
        self._write(list(lines), anew=True)

    def add(self, lines: Iterable[Line]) -> None:
        """Append lines, if the file has begun."""
        self._write(list(lines), anew=False)

    def _write(self, lines: list[Line], *, anew: bool) -> None:
        path = self._path
        if path is None or not (lines or anew):
            return
        text = "".join(json_line(line) + "\n" for line in lines)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not anew:
                with path.open("a", encoding="utf-8") as file:
                    file.write(text)
            elif text:
                # Written beside and renamed: an interruption must not lose the lines of a run.
                remove_abandoned(path.parent, self._name)
                with owned_file(path) as (written, temporary):
                    written.write(text.encode("utf-8"))
                    written.flush()
                    os.fsync(written.fileno())
                    os.replace(temporary, path)
            else:  # a file that nothing is written to does not exist
                path.unlink(missing_ok=True)
            self.n_lines += len(lines)
        except OSError as error:
            self._path = None  # before the warning, which may itself be written to a file of lines
            logger.warning("%s is not written from here on: %s", path, error)


def json_line(values: Line) -> str:
    """A JSON object on one line. Numbers of torch and numpy are as those of Python; a value that is
    not finite is null, since JSON has no other form of it; other objects are texts.
    """
    return json.dumps(_plain(values), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(own) for own in value]
    value = value.item() if callable(getattr(value, "item", None)) else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; [] if there is no such file.

    A line that is no JSON object, such as the last one of a process that was killed, is left out.
    """
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    found = []
    for text in texts:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
