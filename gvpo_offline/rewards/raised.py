"""Where the code of a user raised an exception: file, line, function and source."""

from __future__ import annotations

import inspect
import sysconfig
import traceback
from pathlib import Path
from typing import Any

_PACKAGE = str(Path(__file__).resolve().parents[1])
_PATHS = ("stdlib", "platstdlib", "purelib", "platlib")
_INSTALLED = tuple({path for name in _PATHS if (path := sysconfig.get_path(name))})
_FRAMES_SHOWN = 8
_MESSAGE_SHOWN = 1000


def place_of(error: BaseException) -> str:
    """`file, line n, in function`: the last line of the user's code that ran; "" without one.

    Of a file that cannot be parsed, the line at fault.
    """
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{error.filename}, line {error.lineno}"
    frames = _frames(error)
    own = [frame for frame in frames if not frame.filename.startswith(_INSTALLED)]
    if not frames:
        return ""
    frame = (own or frames)[-1]
    where = "" if frame.name == "<module>" else f", in {frame.name}"
    return f"{frame.filename}, line {frame.lineno}{where}"


def described(error: BaseException, called: Any = None) -> str:
    """Place, class and message of an exception of the user's code, on one line.

    Args:
        error: the exception.
        called: the function that was called, whose definition is named if none of its lines ran,
            as with arguments that it does not take.
    """
    place = place_of(error) or _definition(called)
    return f"{place}: {_message(error)}" if place else _message(error)


def trace_lines(error: BaseException) -> list[str]:
    """The frames of the user's code, outermost first, each with its source line, and the message;
    empty if no code of the user ran.
    """
    shown = [
        f"{frame.filename}, line {frame.lineno}, in {frame.name}: {frame.line or ''}".rstrip(": ")
        for frame in _frames(error)[-_FRAMES_SHOWN:]
    ]
    if isinstance(error, SyntaxError):
        shown.append(f"{place_of(error)}: {(error.text or '').strip()}".rstrip(": "))
    return [*shown, _message(error)] if shown else []


def _message(error: BaseException) -> str:
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return " ".join(f"{type(error).__name__}: {message}".split())[:_MESSAGE_SHOWN]


def _definition(function: Any) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    return "" if code is None else f"{code.co_filename}, line {code.co_firstlineno}"


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of an exception without those of this package and of the import system."""
    return [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_PACKAGE, "<frozen importlib"))
    ]
