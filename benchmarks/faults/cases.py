"""Cases: a command or a function in a forked process, with signals, a deadline and limits.

The driver imports everything once and starts no threads; each case is a fork of it, so that a case
costs milliseconds to start. A child is a process group of its own.
"""

from __future__ import annotations

import gc
import importlib
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CRASHED = 70  # exit status of a child with an uncaught exception
# Exceptions that a command may end with after Ctrl-C are no tracebacks to a user.
_TRACEBACK = "Traceback (most recent call last)"
_RAW_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_POLL_S = 0.004
_SECOND_SIGNAL_S = 0.1
_WRITES = {"os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
# Memory that a case may take beyond what is loaded already: a bomb ends with MemoryError, not with
# the machine.
MEMORY_BYTES = 3 * 2**30
_PRELOADED = (
    "jsonargparse",
    "openai",
    "huggingface_hub",
    "transformers.models.qwen3.modeling_qwen3",
    "gvpo_offline.cli",
    "gvpo_offline.commands.evaluate",
    "gvpo_offline.commands.train",
    "gvpo_offline.commands.tune",
    "gvpo_offline.commands.validate",
    "gvpo_offline.commands.report",
    "gvpo_offline.commands.datasets",
    "gvpo_offline.commands.sharing",
    "gvpo_offline.hub.pull",
    "gvpo_offline.hub.push",
    "gvpo_offline.importing.importer",
    "gvpo_offline.merging.stages",
    "gvpo_offline.reference.score",
    "gvpo_offline.report.report",
    "gvpo_offline.rewards.stage",
    "gvpo_offline.sampling.run",
    "gvpo_offline.sampling.server",
    "gvpo_offline.stream.selecting.predicate",
)


def load_everything() -> None:
    """Import the modules of all commands, which takes seconds, without starting a thread."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in _PRELOADED:
        importlib.import_module(name)
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("qwen3")  # compiles a thousand patterns, once a process
    # A case that collects garbage would go through all that was imported, and copy its pages.
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Kill:
    """When and how a case is killed.

    Attributes:
        signal: SIGKILL, SIGTERM or SIGINT.
        after: seconds after its start; None: before an event.
        event: number, from 1, of the change of a file (open for writing, rename, link, removal,
            folder) before which the process signals itself.
        twice: send it again a moment later.
    """

    signal: signal.Signals
    after: float | None = None
    event: int | None = None
    twice: bool = False


@dataclass
class Outcome:
    """How a case ended.

    Attributes:
        status: exit status, or minus the number of the signal.
        output: standard output and error.
        hung: it was stopped at its deadline.
        seconds: its duration.
        peak_mb: its largest resident memory, in 2^20 bytes.
        changes: changes of files that it made (see `Kill.event`), if it ended by itself.
        left_processes: processes of its group lived on for more than two seconds.
    """

    status: int
    output: str
    hung: bool = False
    seconds: float = 0.0
    peak_mb: float = 0.0
    changes: int = 0
    left_processes: bool = False

    @property
    def traceback(self) -> str | None:
        """The last lines of an uncaught exception, or the signal of a crash; None without one."""
        if _TRACEBACK in self.output:
            return "\n".join(self.output.rstrip().splitlines()[-4:])
        if self.status == CRASHED:
            return "an uncaught exception"
        if -self.status in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS):
            return f"ended by {signal.Signals(-self.status).name}"
        return None

    @property
    def raw_controls(self) -> list[str]:
        """Control characters other than tab, line feed and carriage return in the output."""
        return sorted(set(_RAW_CONTROL.findall(self.output)))


@dataclass(frozen=True)
class Limits:
    """What a case may take: seconds until it counts as hung, and bytes beyond what is loaded."""

    seconds: float = 60.0
    memory: int = MEMORY_BYTES


@dataclass
class _Changes:
    kill: Kill | None
    count: int = 0

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & _WRITING
        if not (event in _WRITES or writes):
            return
        if event == "open" and str(args[0]).startswith(("/dev", "/proc")):
            return
        self.count += 1
        if self.kill and self.kill.event == self.count:
            os.kill(os.getpid(), self.kill.signal)


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def command(argv: Sequence[str]) -> Callable[[], int]:
    """`gvpo-offline argv`, as the work of a case."""

    def work() -> int:
        from gvpo_offline import cli

        return cli.main(list(argv))

    return work


def run_case(
    work: Callable[[], int | None],
    folder: Path,
    *,
    kill: Kill | None = None,
    limits: Limits = Limits(),
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run `work` in a forked child whose working folder is `folder`; its log lies beside it.

    Returns:
        The outcome; a child that does not end in time is killed with all of its group.
    """
    return finish_case(start_case(work, folder, kill=kill, limits=limits, environment=environment))


@dataclass
class Running:
    """A case that has been started."""

    pid: int
    log: Path
    count: Path
    kill: Kill | None
    limits: Limits
    started: float = field(default_factory=time.monotonic)


def start_case(
    work: Callable[[], int | None],
    folder: Path,
    *,
    kill: Kill | None = None,
    limits: Limits = Limits(),
    environment: Mapping[str, str] | None = None,
) -> Running:
    """Start a case; arguments as for `run_case`."""
    number = time.monotonic_ns()
    log = folder.with_name(f"{folder.name}.{number}.log")
    count = folder.with_name(f"{folder.name}.{number}.changes")
    pid = os.fork()
    if pid == 0:
        _child(work, folder, log, count, kill, limits, environment or {})
    return Running(pid, log, count, kill, limits)


def _child(
    work: Callable[[], int | None],
    folder: Path,
    log: Path,
    count: Path,
    kill: Kill | None,
    limits: Limits,
    environment: Mapping[str, str],
) -> None:
    status = CRASHED
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        written = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(written, 1)
        os.dup2(written, 2)
        # The driver's own may write elsewhere, as under pytest.
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False, encoding="utf-8")
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, encoding="utf-8")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if limits.memory:
            size = _virtual_bytes() + limits.memory
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
        os.environ.update(environment)
        os.chdir(folder)
        changes = _Changes(kill)
        sys.addaudithook(changes)
        status = work() or 0
        count.write_text(str(changes.count))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def _virtual_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


def finish_case(running: Running) -> Outcome:
    """Wait for a case, and send its signals."""
    kill, pid = running.kill, running.pid
    signals: list[float] = []
    if kill and kill.after is not None:
        signals = [kill.after] + ([kill.after + _SECOND_SIGNAL_S] if kill.twice else [])
    hung = False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        age = time.monotonic() - running.started
        if signals and kill and age >= signals[0]:
            signals.pop(0)
            os.kill(pid, kill.signal)
        elif age >= running.limits.seconds and not hung:
            hung = True
            os.killpg(pid, signal.SIGKILL)
        else:
            time.sleep(_POLL_S)
    seconds = time.monotonic() - running.started
    left = end_group(pid)
    changes = int(running.count.read_text()) if running.count.exists() else 0
    output = running.log.read_text(encoding="utf-8", errors="surrogateescape")
    running.log.unlink()
    running.count.unlink(missing_ok=True)
    peak = usage.ru_maxrss / 1024
    code = os.waitstatus_to_exitcode(status)
    return Outcome(code, output, hung, seconds, peak, changes, left)


def end_group(group: int) -> bool:
    """End what a case left running; whether some of it lived for two more seconds."""
    until = time.monotonic() + 2.0
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return False
        if time.monotonic() >= until:
            os.killpg(group, signal.SIGKILL)
            return True
        time.sleep(0.02)
