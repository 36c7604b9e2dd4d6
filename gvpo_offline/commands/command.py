"""The record of a subcommand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        summary: its description in one line.
        run: runs it with the values of its settings by name. It imports what it needs itself, so
            that the table of commands loads at once. What it returns is the exit status; None
            is 0.
        settings: the dataclasses whose fields are its flags.
        epilog: text after the flags in `--help`.
        positional: the setting that takes the words before the first flag; "": none.
    """

    summary: str
    run: Callable[[dict[str, Any]], int | None]
    settings: tuple[type, ...]
    epilog: str = ""
    positional: str = ""


def filled(kind: type[Settings], values: dict[str, Any]) -> Settings:
    """An instance of the dataclass `kind`, from those of `values` that are its fields."""
    init = {field.name for field in fields(kind) if field.init}  # type: ignore[arg-type]
    return kind(**{key: value for key, value in values.items() if key in init})
