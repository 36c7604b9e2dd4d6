"""A worker process that handles one request at a time, can be killed, and reports its death.

The standard library's pools report only that some worker died, and cannot kill one that hangs. The
backend `local` and scorers that may hang need both.
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
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from gvpo_offline.interrupts import interrupts_held_back
from gvpo_offline.workers.progress import reporting

_CONTEXT = multiprocessing.get_context("spawn")  # forking a process with threads is not safe
_GRACE_S = 1.0
_READY = "ready"
MAIN_GUARD = "put the code of a script that starts workers under `if __name__ == '__main__':`"
Handler = Callable[[Any], Any]


class WorkerDeathError(Exception):
    """The process ended without a reply; a negative `exitcode` is minus the signal's number."""

    def __init__(self, exitcode: int | None) -> None:
        self.exitcode = exitcode
        killed = exitcode is not None and exitcode < 0
        by = f"killed by {signal.Signals(-exitcode).name}" if exitcode and killed else "exited"
        super().__init__(f"{by} (exit status {exitcode})")


class WorkerProcess:
    """A spawned process.

    Args:
        prepare: called once in the process; returns the handler of requests. Picklable.

    Attributes:
        connection: readable when there is a reply, or when the process died.
    """

    # `counted` is a number in shared memory: a message would have to be told from a reply.

    def __init__(self, prepare: Callable[[], Handler]) -> None:
        self.connection, child = _CONTEXT.Pipe()
        self._counted = _CONTEXT.RawValue("d", 0.0)
        self._process = _CONTEXT.Process(target=_serve, args=(child, prepare, self._counted))
        resource_tracker.ensure_running()  # which would let signals through again
        with interrupts_held_back():
            self._process.start()
        child.close()  # so that the connection closes when the process ends

    @property
    def counted(self) -> float:
        """What the process has counted with `progress.advance`, over all requests."""
        return float(self._counted.value)

    def send(self, request: Any) -> None:
        """Send a request; exactly one `receive` follows."""
        # If the process died, `receive` raises.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(request)

    def receive(self, timeout_s: float | None = None) -> Any:
        """The reply to the oldest request; before all others "ready", once the process is.

        Raises:
            TimeoutError: there was none within `timeout_s` seconds.
            WorkerDeathError: the process ended.
            Exception: as the handler raised it, with its traceback as a note.
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
        """End the process at once (SIGKILL)."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, prepare: Callable[[], Handler], counted: Any) -> None:
    # A keyboard interrupt reaches the whole process group; the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # A parent that ended while this process began reads nothing any more.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _answer(connection, prepare, counted)


def _answer(connection: Connection, prepare: Callable[[], Handler], counted: Any) -> None:
    try:
        handler = prepare()
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
            with reporting(_adding_to(counted)):
                reply = (True, handler(request))
        except Exception as error:
            reply = (False, _portable(error))
        connection.send(reply)


def _adding_to(counted: Any) -> Callable[[float], None]:
    before = counted.value

    def report(units: float) -> None:
        counted.value = before + units

    return report


def _end_with_parent() -> None:
    """Kill this process when its parent is killed, so that GPU memory is freed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _portable(error: Exception) -> Exception:
    """The error with its traceback as a note; as a RuntimeError if it does not pickle."""
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
