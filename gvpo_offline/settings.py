"""Checks of settings that several rooms share. Each room has its dataclasses in its `settings`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from gvpo_offline.errors import ConfigError

OnFew = Literal["error", "drop"]


def positive(name: str, value: float) -> None:
    """Raise ConfigError unless `value` is above zero."""
    if not value > 0:
        raise ConfigError(f"{name} is positive", received=value)


def check_name(setting: str, value: str) -> None:
    """Raise ConfigError unless `value` can name a folder, or a part of something that does."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", value):
        raise ConfigError(
            f"{setting}, which also names a folder, has letters, digits, '_', '-', '.' only",
            received=value,
        )


def required(name: str, value: str | Sequence[Any]) -> None:
    """Raise ConfigError if a setting that has no default was not set."""
    if not value:
        raise ConfigError(f"{name} must be set", received="nothing", remedy=f"pass --{name}")
