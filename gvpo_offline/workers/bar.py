"""The bar of a run of tasks, which also moves within tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Called with what the running tasks have finished, in units of their sizes; None: no bar is shown,
# so that a backend need not ask its workers.
OnProgress = Callable[[float], None] | None


class TaskBar:
    """Moves a bar of tqdm by committed tasks, and between commits by what running tasks count.

    It never goes back: a task that begins again, after its worker died, first catches up.

    Args:
        bar: the bar, which shows `finished`.
        finished: the sizes of all tasks that are committed already.
    """

    def __init__(self, bar: Any, finished: int) -> None:
        self._bar = bar
        self._finished = finished
        self._shown = finished
        self.on_progress: OnProgress = None if bar.disable else self._running

    def commit(self, size: int) -> None:
        """A task of this size is committed."""
        self._finished += size
        self._move(self._finished)

    def _running(self, units: float) -> None:
        # Rounded down: only a committed task is finished, and a bar counts whole units.
        self._move(self._finished + int(units))

    def _move(self, to: int) -> None:
        if to > self._shown:
            self._bar.update(min(to, self._bar.total) - self._shown)
            self._shown = min(to, self._bar.total)
