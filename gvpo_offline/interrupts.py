"""Ctrl-C: the first one ends a command in order, the second one at once.

Python raises KeyboardInterrupt wherever the main thread is. In a destructor or a callback of C code
it would be printed and dropped, and the command would go on; here it is raised again.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from gvpo_offline.exit_status import INTERRUPTED

_AT_ONCE = b"\ngvpo-offline: ended at once by a second Ctrl-C\n"
_AGAIN_S = 0.05  # after a dropped interrupt, until the destructor is done


class _State:
    interrupted = False


def was_interrupted() -> bool:
    """Whether Ctrl-C was pressed since the command began."""
    return _State.interrupted


@contextmanager
def two_interrupts() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt once, and end the process at once the second time.

    Nothing is changed in a thread other than the main one, or where another handler is set: a
    program that embeds the package, or a job in the background, which ignores SIGINT.
    """
    _State.interrupted = False
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    dropped = sys.unraisablehook

    def interrupted(number: int, frame: FrameType | None) -> None:
        if _State.interrupted:
            end_at_once()
        _State.interrupted = True
        raise KeyboardInterrupt

    def raise_again(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            dropped(unraisable)
            return
        _State.interrupted = False
        again = threading.Timer(_AGAIN_S, signal.raise_signal, [signal.SIGINT])
        again.daemon = True
        again.start()

    signal.signal(signal.SIGINT, interrupted)
    sys.unraisablehook = raise_again
    try:
        yield
    finally:
        sys.unraisablehook = dropped
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_at_once() -> None:
    """End this process without any clean-up; its workers end with it."""
    try:
        os.write(2, _AT_ONCE)
    finally:
        os._exit(INTERRUPTED)


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Hold SIGINT back in this thread until the block ends, and in processes that it starts.

    A terminal sends Ctrl-C to every process of the group. A worker that is still importing its
    modules would print a traceback; its parent handles the signal.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
