"""Printing of what commands report: texts of a log never control the terminal."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from gvpo_offline.interrupts import was_interrupted
from gvpo_offline.secret_settings import without_credentials
from gvpo_offline.visible import visible


class OutputClosed(BrokenPipeError):  # noqa: N818
    """Standard output is a pipe that nobody reads any more, as after `| head -1`."""


def say(*lines: str) -> None:
    """Print lines, each on one line of its own; control characters are printed as escapes."""
    for line in lines:
        emit(visible(without_credentials(line), keep="\t"))


def say_to_programs(line: str) -> None:
    """Print a line that programs read, unless standard output is a terminal.

    There it would hide what is meant for people; the folder or `output_file` has the same.
    """
    if not sys.stdout.isatty():
        say(line)


def emit(line: str) -> None:
    """Print a line whose texts are visible already, with the styles that it holds."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(line.encode(encoding, "backslashreplace").decode(encoding))
    except BrokenPipeError as error:
        raise OutputClosed from error


def has_styles() -> bool:
    """Whether standard output is a terminal that shows styles (https://no-color.org)."""
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return not plain and sys.stdout.isatty()


def flush_output() -> None:
    """Write what is printed and still buffered.

    Raises:
        OutputClosed: nobody reads it.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise OutputClosed from error


def drop_output() -> None:
    """Let what is left to print go nowhere, so that Python does not complain at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(text: str) -> None:
    """Print an error to standard error, on lines of its own beside progress bars."""
    _write(text, sys.stderr)


def _write(text: str, stream: TextIO) -> None:
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(text, file=stream)
    else:  # no bar can be shown
        print(text, file=stream)


class LogHandler(logging.StreamHandler[TextIO]):
    """Writes log records to standard error, each on lines of its own beside progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`; not what asyncio says of tasks that Ctrl-C has ended."""
        if record.name == "asyncio" and was_interrupted():
            return
        try:
            _write(self.format(record), self.stream)
            self.flush()
        except Exception:
            self.handleError(record)


class VisibleFormatter(logging.Formatter):
    """Log records whose control characters are printed as escapes, without credentials of URLs."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        return visible(without_credentials(super().format(record)))
