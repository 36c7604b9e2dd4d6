"""Progress within a task: a stage counts what it has finished, and the run's bar moves with it.

A stage calls `advance` in units of its tasks' sizes, wherever its work is done. Whoever runs the
task decides what becomes of the count: the backends pass it to the process that shows the bar. A
call outside a task does nothing. Counts never decide anything else, so one that is missing or late
does no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Reporter:
    """The count of the task that this process works on."""

    def __init__(self, report: Callable[[float], None]) -> None:
        self.report = report
        self.done = 0.0
        self.scale = 1.0
        self.limit = float("inf")

    def move(self, to: float) -> None:
        self.done = min(to, self.limit)
        self.report(self.done)


_reporter: _Reporter | None = None


@contextmanager
def reporting(report: Callable[[float], None] | None) -> Iterator[None]:
    """Pass the count of a task to `report`, from 0 on, in units of the task's size.

    Args:
        report: called after each `advance`; None: nobody wants to know.
    """
    global _reporter
    before, _reporter = _reporter, None if report is None else _Reporter(report)
    try:
        yield
    finally:
        _reporter = before


def advance(amount: float = 1.0) -> None:
    """Count finished work of the current task, in units of its size, or of the current `portion`.

    Not for several threads at a time.
    """
    if _reporter is not None:
        _reporter.move(_reporter.done + amount * _reporter.scale)


@contextmanager
def portion(size: float, count: float | None = None) -> Iterator[None]:
    """Work that is worth `size` units of what surrounds it; within, `advance` counts to `count`.

    At its end the whole portion counts as finished, whatever was counted within; after an
    exception it does not.

    Args:
        size: of the portion, in units outside.
        count: of the portion, in units within; default: the same units.
    """
    own = _reporter
    if own is None:
        yield
        return
    scale, limit = own.scale, own.limit
    end = min(own.done + size * scale, limit)
    own.scale, own.limit = (scale * size / count if count else scale), end
    try:
        yield
    finally:
        own.scale, own.limit = scale, limit
    own.move(end)
