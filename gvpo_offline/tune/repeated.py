"""Messages and bars that each trial of a search would repeat."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

# The search itself says its progress; whatever else is said of a trial is the same for each.
_OWN = ("gvpo_offline.tune", "gvpo_offline.commands")


class _Once(logging.Filter):
    """Passes each message of this package and of transformers once; those of a search always."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[tuple[int, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter.filter`."""
        room = record.name.split(".")[0]
        if room not in ("gvpo_offline", "transformers") or record.name.startswith(_OWN):
            return True
        message = (record.levelno, record.getMessage())
        new = message not in self._said
        self._said.add(message)
        return new


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """A context in which a message that trainers log is printed once, however many there are."""
    loggers = [logging.getLogger(name) for name in (None, "gvpo_offline", "transformers")]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    handlers += [logging.lastResort] if logging.lastResort else []
    # Each handler has a filter of its own: a message reaches several.
    filters = [(handler, _Once()) for handler in handlers]
    for handler, own in filters:
        handler.addFilter(own)
    try:
        yield
    finally:
        for handler, own in filters:
            handler.removeFilter(own)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """A context in which transformers shows no bars, such as that of the loading of weights."""
    from transformers.utils import logging as theirs

    shown = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            theirs.enable_progress_bar()
