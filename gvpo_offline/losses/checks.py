"""Checks of values on a device, which a training step reads once, and not once a micro-batch.

A check that raises an error has to be read on the host, which waits for the device meanwhile. On
the CPU it is read at once. Within `deferred_checks` those of another device are collected, and read
together at the end of the step.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

from torch import Tensor

_waiting: contextvars.ContextVar[list[Tensor] | None] = contextvars.ContextVar(
    "waiting", default=None
)


def require(sound: Tensor, fail: Callable[[], None]) -> None:
    """Call `fail`, which raises an error, unless all values are true; now, or see
    `deferred_checks`.

    Args:
        sound: bool, of any shape.
        fail: raises the error that names the first value at fault.
    """
    waiting = _waiting.get()
    if waiting is not None and sound.device.type != "cpu":
        waiting.append(sound.all())
    elif not bool(sound.all()):
        fail()


@contextlib.contextmanager
def deferred_checks() -> Iterator[list[Tensor]]:
    """Within it, checks of values that are not on the CPU are collected.

    Yields:
        Scalar bools on their device, filled in as checks are made. Where one is false, the same
        call outside this context raises the error.
    """
    found: list[Tensor] = []
    token = _waiting.set(found)
    try:
        yield found
    finally:
        _waiting.reset(token)
