"""Log records of a command that shows a progress bar."""

from __future__ import annotations

import io
import logging

from tqdm import tqdm

from gvpo_offline.commands.console import LogHandler


def test_a_warning_is_on_a_line_of_its_own() -> None:
    """The bar is erased by carriage return and spaces, and drawn again behind the message."""
    stream = io.StringIO()
    handler = LogHandler(stream)
    record = logging.LogRecord("x", logging.WARNING, "", 0, "read %s", ("this",), None)
    with tqdm(total=2, file=stream, desc="rows", mininterval=0):
        handler.emit(record)
    before, _, after = stream.getvalue().partition("read this\n")
    assert before.startswith("\rrows:   0%|")
    assert before.endswith("\r")
    assert before.rsplit("\r", 2)[1].strip() == ""
    assert after.startswith("\rrows:   0%|")


def test_without_a_bar() -> None:
    stream = io.StringIO()
    LogHandler(stream).emit(logging.LogRecord("x", logging.INFO, "", 0, "done", (), None))
    assert stream.getvalue() == "done\n"
