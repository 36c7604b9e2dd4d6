"""A process that answers requests one at a time: it can be killed, and when it dies, that is seen.

Pools of the standard library say that *some* worker died, and cannot kill one that hangs. This is
what both the local engine and a scorer that may hang need.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_CONTEXT = multiprocessing.get_context("spawn")  # forking a process with threads is not safe
_GRACE_S = 1.0
_READY = "ready"
MAIN_GUARD = "a script of your own starts its work under `if __name__ == '__main__':`"
Answer = Callable[[Any], Any]


class WorkerDeathError(Exception):
    """The process ended without an answer; `exitcode` is minus the signal that killed it."""

    def __init__(self, exitcode: int | None) -> None:
        self.exitcode = exitcode
        killed = exitcode is not None and exitcode < 0
        by = f"killed by {signal.Signals(-exitcode).name}" if exitcode and killed else "it ended"
        super().__init__(f"{by} (exit status {exitcode})")


class Worker:
    """A process of its own.

    Args:
        prepare: called in the process, once; gives the function that answers requests. Picklable.

    Attributes:
        connection: readable when there is an answer, or when the process died.
    """

    def __init__(self, prepare: Callable[[], Answer]) -> None:
        self.connection, child = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(child, prepare))
        self._process.start()
        child.close()  # so that the connection ends when the process does

    def send(self, request: Any) -> None:
        """Ask for something; exactly one `receive` follows."""
        # If it died, `receive` says so.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(request)

    def receive(self, timeout_s: float | None = None) -> Any:
        """The answer to the oldest request; the very first one comes unasked, when it is ready.

        Raises:
            TimeoutError: there was none in `timeout_s` seconds.
            WorkerDeathError: the process ended.
            Exception: whatever the process raised instead of answering, with its traceback as a
                note.
        """
        try:
            if not self.connection.poll(timeout_s):
                raise TimeoutError
            good, value = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(_GRACE_S)
            raise WorkerDeathError(self._process.exitcode) from None
        if good:
            return value
        raise value

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, prepare: Callable[[], Answer]) -> None:
    # An interrupt from the keyboard reaches the whole process group; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer = prepare()
    except Exception as error:
        connection.send((False, _portable(error)))
        return
    connection.send((True, _READY))
    while True:
        try:
            request = connection.recv()
        except EOFError:  # the parent is gone
            return
        try:
            reply = (True, answer(request))
        except Exception as error:
            reply = (False, _portable(error))
        try:
            connection.send(reply)
        except (BrokenPipeError, ConnectionResetError):
            return


def _end_with_parent() -> None:
    """Let no worker, and no memory of a GPU's, outlive a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _portable(error: Exception) -> Exception:
    """The same error with its traceback as a note; what does not pickle, as a RuntimeError."""
    trace = "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
        if not isinstance(copy, type(error)):
            raise TypeError
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(trace)
    kept: Exception = copy
    return kept
