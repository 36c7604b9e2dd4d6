"""A command in a process that may open few further files; a program for `ForkServer`.

A test's own process is of no use: its other threads and its garbage open and close files meanwhile.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import sys
from collections.abc import Iterator

from gvpo_offline.cli import main as run


@contextlib.contextmanager
def open_files_left(number: int) -> Iterator[None]:
    """Let this process open no more than `number` further files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    handles = []
    most = max(map(int, os.listdir("/proc/self/fd"))) + 1 + number
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                handles.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(number):
            os.close(handles.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for handle in handles:
            os.close(handle)


def main() -> None:
    """Run a command twice, the second time with few open files: the first one imports modules."""
    number, *words = sys.argv[1:]
    with contextlib.redirect_stdout(io.StringIO()):
        assert run(words) == 0
    with open_files_left(int(number)):
        status = run(words)
    sys.exit(status)
