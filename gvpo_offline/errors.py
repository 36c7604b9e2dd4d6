"""The errors that users can cause and correct: invalid data, settings, files or checkpoints.

Every error states the rule that was broken, the value that was received and the remedy, and names
the file, row and group if there is one. Rows are counted from 0, and a message that names one says
so. Bugs of this package raise ordinary exceptions with a
traceback instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Self

from gvpo_offline.secret_settings import without_credentials
from gvpo_offline.visible import visible

__all__ = [
    "ConfigError",
    "DataError",
    "GVPOError",
    "IntegrityError",
    "NonFiniteError",
    "ResumeError",
    "ServerError",
    "StorageError",
    "WorkerError",
    "label_path",
    "labelled",
]

_SHOWN_CHARACTERS = 200
_ROW = re.compile(r"\brow \d")
# What begins a remedy and stays as it is written: the name of a setting, or a command.
_AS_WRITTEN = re.compile(r"\w+_\w+|\w+:|pip ")


# Paths that messages call by another name.
_LABELS: dict[str, str] = {}
_ARGUMENTS = ("rule", "received", "remedy", "file", "row", "group", "more")


def label_path(path: Any, label: str) -> None:
    """Let errors call a path `label`: a temporary file that holds an object of the caller."""
    _LABELS[str(path)] = label


def labelled(text: Any) -> str:
    """`text` with the labels of `label_path` for the paths, and URLs without credentials."""
    found = without_credentials(str(text))
    for path, label in _LABELS.items():
        found = found.replace(path, label)
    return found


def _shown(value: Any) -> str:
    """`value` as quoted in a message: its repr (a string unchanged), shortened if long."""
    text = repr(value) if not isinstance(value, str) else value
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


def _sentence(text: str) -> str:
    """`text` with a capital at its begin, unless that is a name, and a mark at its end."""
    first = text[0] if _AS_WRITTEN.match(text) else text[0].upper()
    found = first + text[1:].rstrip(".")
    return found if found.endswith("?") else f"{found}."


class GVPOError(Exception):
    """Base class: input, settings or files break a rule.

    Args:
        rule: what must hold, as a full clause ("a group needs at least 2 responses").
        received: the value that broke the rule; quoted in the message, shortened if long.
        remedy: what the user can do about it.
        file: path of the file in question.
        row: zero-based row (or line) within `file`.
        group: id of the group in question.
        more: further lines of the message, such as other faults that were found with this one.
    """

    def __init__(
        self,
        rule: str,
        *,
        received: Any = None,
        remedy: str | None = None,
        file: Any = None,
        row: int | None = None,
        group: str | None = None,
        more: Sequence[str] = (),
    ) -> None:
        self.rule = rule
        self.received = received
        self.remedy = remedy
        self.file = None if file is None else labelled(file)
        self.row = row
        self.group = group
        self.more = tuple(map(visible, more))
        super().__init__("\n  ".join([self._message(), *self.more]))

    def replaced(self, **changes: Any) -> Self:
        """A copy with other arguments, named as in the constructor, and the same cause."""
        kept = {name: getattr(self, name) for name in _ARGUMENTS}
        copy = type(self)(**{**kept, **changes})
        copy.__cause__ = self.__cause__
        return copy

    def lines(self) -> list[str]:
        """The message and the lines of `more`, each in one line even if it quotes several."""
        return [" ".join(text.split()) for text in (self._message(), *self.more)]

    def _message(self) -> str:
        place = [
            text
            for text in (
                self.file,
                None if self.row is None else f"row {self.row}",
                None if self.group is None else f"group {self.group!r}",
            )
            if text is not None
        ]
        message = (", ".join(place) + ": " if place else "") + self.rule
        if self.received is not None:
            message += f"; received {_shown(self.received)}"
        message += "" if message.endswith(".") else "."
        if self.remedy:
            message += f" {_sentence(self.remedy)}"
        if self.row is not None or _ROW.search(f"{self.received} {self.remedy}"):
            message += " Rows are counted from 0."
        # Values of a log may hold control characters, and messages go to terminals.
        return visible(labelled(message))

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors are pickled between processes (data loader workers); the default would lose the
        # keyword arguments. Other attributes, such as notes, are restored from `state`.
        state = self.__dict__.copy()
        return (_rebuild, (type(self), {name: state[name] for name in _ARGUMENTS}), state)


def _rebuild(kind: type[GVPOError], keywords: dict[str, Any]) -> GVPOError:
    return kind(**keywords)


class DataError(GVPOError, ValueError):
    """Logged data whose shape or values are not valid for a group."""


class NonFiniteError(DataError):
    """Training diverged: log-probs, a gradient or weights are not finite."""


class ConfigError(GVPOError, ValueError):
    """A setting, or a combination of settings, that is not valid."""


class ServerError(ConfigError):
    """A server that cannot be reached, or that refuses every request."""


class IntegrityError(GVPOError):
    """A file is missing, truncated or altered, or belongs to another dataset, model or run."""


class StorageError(GVPOError, OSError):
    """The file system refused a write: no space, no permission, or a file-size limit."""


class ResumeError(GVPOError):
    """A checkpoint from which this run cannot continue exactly."""


class WorkerError(GVPOError):
    """A worker process died."""
