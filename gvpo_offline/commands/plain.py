"""Output without a terminal: lines alone."""

from __future__ import annotations

import sys


def lines_without_terminal() -> None:
    """Show no bars of transformers and of the hub's client, unless standard error is a terminal.

    In a file each state of a bar would be a line. The setting is of the process.
    """
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
