"""Warnings of this package while a trainer is made and trains, for the run's events."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

_ROOT = logging.getLogger("gvpo_offline")
Method = TypeVar("Method", bound=Callable[..., Any])


class _Ear(logging.Handler):
    """Passes each warning on. It prints nothing, and keeps nothing from being printed."""

    def __init__(self, hear: Callable[[logging.LogRecord], object]) -> None:
        super().__init__(logging.WARNING)
        self._hear = hear

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        self._hear(record)
        if not _has_other_handlers(logging.getLogger(record.name)) and logging.lastResort:
            # Python prints a warning that has no handler. This handler must not prevent that.
            logging.lastResort.handle(record)


def _has_other_handlers(logger: logging.Logger | None) -> bool:
    while logger is not None:
        if any(not isinstance(handler, _Ear) for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


@contextlib.contextmanager
def hearing(hear: Callable[[logging.LogRecord], object]) -> Iterator[None]:
    """A context in which `hear` gets each warning and error that this package logs."""
    ear = _Ear(hear)
    _ROOT.addHandler(ear)
    try:
        yield
    finally:
        _ROOT.removeHandler(ear)


def hears_warnings(method: Method) -> Method:
    """Decorator of a trainer's method: `self.record.hear` gets the warnings logged meanwhile."""

    @functools.wraps(method)
    def listening(self: Any, *args: Any, **kwargs: Any) -> Any:
        with hearing(self.record.hear):
            return method(self, *args, **kwargs)

    return cast(Method, listening)


def ends_record(method: Method) -> Method:
    """Decorator of a trainer's `train`: as `hears_warnings`, and `self.record` notes its end."""

    @functools.wraps(method)
    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        with hearing(self.record.hear):
            try:
                result = method(self, *args, **kwargs)
            except BaseException as error:
                self.record.end(error)
                raise
            self.record.end()
            return result

    return cast(Method, recorded)
