"""Run the command line and send it SIGINT at a call of a function, as Ctrl-C would."""

from __future__ import annotations

import importlib
import signal
import sys
from typing import Any


def run() -> None:
    """The command `sys.argv[3:]`, interrupted as `sys.argv[1:3]` say, in place of `gvpo-offline`.

    The first is `module:name` of a function; SIGINT comes at the start of its call number n. The
    second is `n`, or `n+` for a second SIGINT while the
    first one is handled.
    """
    place, times = sys.argv[1:3]
    # A test run in the background of a shell inherits that SIGINT is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _interrupt_at(place, int(times.rstrip("+")), twice=times.endswith("+"))
    from gvpo_offline.cli import main

    sys.argv = ["gvpo-offline", *sys.argv[3:]]
    sys.exit(main())


def _interrupt_at(place: str, number: int, *, twice: bool) -> None:
    module, _, name = place.partition(":")
    holder: Any = importlib.import_module(module)
    *parents, name = name.split(".")
    for parent in parents:
        holder = getattr(holder, parent)
    function, calls = getattr(holder, name), 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                if twice:
                    signal.raise_signal(signal.SIGINT)
        return function(*args, **kwargs)

    setattr(holder, name, counting)


if __name__ == "__main__":
    run()
