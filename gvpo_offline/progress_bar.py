"""The progress bar of all commands: plain lines where standard error is no terminal."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from gvpo_offline.visible import visible

PLAIN_SECONDS = 30.0  # between two lines, where there is no terminal


class ProgressBar(tqdm):  # type: ignore[type-arg]
    """tqdm's bar on a terminal. Elsewhere one line every 30 s, and one at the end.

    A bar redraws its line with carriage returns, which a log file or the page of a CI run keeps as
    one long line. A line without a terminal has the counts, the times and the rate. Work that ends
    within 30 s has none: commands say at their end what they made.

    Args:
        values: what is iterated; None if `update` is called.
        options: those of tqdm.
    """

    def __init__(self, values: Any = None, **options: Any) -> None:
        stream = options.get("file") or sys.stderr
        self._plain = not stream.isatty()
        if self._plain:
            # A count that tqdm learned would leave out lines of work that slows down.
            options |= {"delay": PLAIN_SECONDS, "mininterval": PLAIN_SECONDS, "miniters": 1}
            options["bar_format"] = _form(values, options)
        if "desc" in options:  # may have a name from a log
            options["desc"] = visible(options["desc"], keep="")
        super().__init__(values, **options)

    @staticmethod
    def status_printer(file: Any) -> Any:
        """tqdm's way to write a state: a line of its own where there is no terminal."""
        if file.isatty():
            return tqdm.status_printer(file)

        def line(text: str) -> None:
            if text:
                file.write(" ".join(text.split()) + "\n")  # tqdm pads the rate
                file.flush()

        return line

    def moveto(self, n: int) -> None:
        """Move to the line of a bar below others; lines have no place."""
        if not self._plain:
            super().moveto(n)

    def clear(self, nolock: bool = False) -> None:
        """Make room for a message; a line is over already."""
        if not self._plain:
            super().clear(nolock)

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> None:
        """Write the state; not a second time after a message, which is what `nolock` means."""
        if not (self._plain and nolock):
            super().refresh(nolock, lock_args)

    def close(self) -> None:
        """End the bar; without a terminal with a last line, if there was one before."""
        if self._plain and not self.disable:
            if self.last_print_t >= self.start_t + PLAIN_SECONDS:
                self.refresh()
            # tqdm would write the state again, and end the line that it redraws.
            self.sp, self.fp = (lambda text: None), _Nowhere()
        super().close()


class _Nowhere:
    """A stream that drops what is written."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        """Drop a text."""
        return len(text)

    def flush(self) -> None:
        """Nothing waits."""


def _form(values: Any, options: dict[str, Any]) -> str:
    """The form of a line: tqdm's fields."""
    total = options.get("total", len(values) if hasattr(values, "__len__") else None)
    unit = options.get("unit", "").strip()
    counts = "{n_fmt}" + ("" if total is None else "/{total_fmt}") + (unit and f" {unit}")
    times = "{elapsed}" + ("" if total is None else ", {remaining} left")
    return "{desc}: " + counts + ", " + times + ", {rate_fmt}"
