"""Ending a run by a signal: at the next step boundary, with a complete checkpoint.

Job schedulers send a signal some time before they kill a job. While a run trains, a signal is noted
and `train.guarded` ends the run after the step. Before the first step nothing is there to be
saved, and a signal ends the run at once. While the trained policy is saved, a signal is noted only:
the save completes.

A launcher that dies, such as a killed `torchrun`, leaves its ranks behind. They notice that their
parent process has changed, and end as by a signal. Loads no torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from gvpo_offline.errors import ConfigError

logger = logging.getLogger(__name__)
_NEVER = {"SIGKILL", "SIGSTOP"}  # the system does not let a process handle them
# torchrun and `accelerate launch` set it for their ranks.
_LAUNCHED = "TORCHELASTIC_RUN_ID"
_WATCH_SECONDS = 1.0
# A rank whose peers are dead may wait for them in a collective and never reach a step boundary.
_ORPHAN_SECONDS = 300.0


class RunStopped(SystemExit):
    """A signal ended a run; its newest checkpoint is complete.

    A script that does not catch it exits with status 128 + the number of the signal, as shells and
    job schedulers expect, and runs nothing after `train`.

    Attributes:
        number: number of the signal.
        step: optimizer steps done; None before the first step.
        checkpoint: the newest complete checkpoint of the run; None if there is none.
    """

    def __init__(self, number: int, step: int | None, checkpoint: Path | None) -> None:
        super().__init__(128 + number)
        self.number, self.step, self.checkpoint = number, step, checkpoint

    @property
    def signal_name(self) -> str:
        """Name of the signal, such as SIGTERM."""
        return signal.Signals(self.number).name

    def __str__(self) -> str:
        when = "before its first step" if self.step is None else f"after step {self.step:,}"
        kept = (
            "no checkpoint was written"
            if self.checkpoint is None
            else f"{self.checkpoint} is complete"
        )
        return f"{self.signal_name} ended the run {when}: {kept}"


def signal_numbers(names: Sequence[str]) -> list[int]:
    """The numbers of signals, by names such as SIGTERM or TERM.

    Raises:
        ConfigError: a signal does not exist, or cannot be handled.
    """
    known = {own.name: int(own) for own in signal.Signals}
    found = []
    for name in names:
        full = name.upper() if name.upper().startswith("SIG") else f"SIG{name.upper()}"
        if full not in known or full in _NEVER:
            raise ConfigError(
                "stop_signals are names of signals that a process can handle",
                received=name,
                remedy="name signals such as SIGTERM, SIGUSR1 and SIGUSR2",
            )
        found.append(known[full])
    return found


class StopRequests:
    """The signals that a run has received; of this process alone.

    Attributes:
        number: number of the first signal; 0: none.
        waits: whether a signal is noted, for the end of the step; otherwise it ends the run at
            once, since there is nothing to save.
    """

    def __init__(self) -> None:
        self.number = 0
        self.waits = False

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """The handler of a signal.

        Raises:
            RunStopped: the run has not begun its first step.
        """
        # Launchers and schedulers may both send it, so that a second one says nothing new.
        self.number = self.number or number
        if not self.waits:
            self.waits = True
            raise RunStopped(number, None, None)


_active: StopRequests | None = None


@contextlib.contextmanager
def stop_requests(names: Sequence[str]) -> Iterator[StopRequests]:
    """A context in which some signals are requests to stop.

    An inner context has the requests of the outer one. A signal for which the program has set a
    handler of its own keeps it, and so has each signal outside of Python's main thread.

    Args:
        names: as `signal_numbers`, which raises its errors.
    """
    global _active
    numbers = signal_numbers(names)
    if _active is not None:
        yield _active
        return
    found = StopRequests()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        default = (signal.SIG_DFL, signal.default_int_handler)
        before = {own: signal.getsignal(own) for own in numbers}
        before = {own: held for own, held in before.items() if held in default}
    ended = threading.Event()
    _active = found
    try:
        for number in before:
            signal.signal(number, found.receive)
        if os.environ.get(_LAUNCHED):
            _watch_parent(found, ended)
        yield found
    finally:
        _active = None
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch_parent(requests: StopRequests, ended: threading.Event) -> None:
    """Request a stop when the parent process, which launched this rank, is gone."""
    parent = os.getppid()

    def watch() -> None:
        while not ended.wait(_WATCH_SECONDS):
            if os.getppid() == parent:
                continue
            logger.warning("the process that launched this rank is gone: the run stops")
            if not requests.waits:
                os.kill(os.getpid(), signal.SIGTERM)
            requests.number = requests.number or int(signal.SIGTERM)
            if not ended.wait(_ORPHAN_SECONDS):
                os._exit(128 + signal.SIGTERM)
            return

    threading.Thread(target=watch, name="gvpo-launcher-watch", daemon=True).start()


def ignore_signals(numbers: Sequence[int], worker: int = 0) -> None:
    """Let a worker process ignore signals, which a scheduler sends to all processes of a job.

    Args:
        numbers: of the signals.
        worker: number of the worker; not used.
    """
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
