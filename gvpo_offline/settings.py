"""Names of losses and checks of settings, which several rooms share.

Each room has its dataclasses in its own `settings` module. Loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

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


LossType = Literal[
    "gvpo", "pmd_mean", "rebel", "ipo", "dpo", "listwise", "rft", "awr", "grpo", "rloo", "topr"
]


def check_loss(loss_type: str, *, anchor: float, weighted: bool) -> None:
    """Raise ConfigError unless there is such a loss, and it knows the settings that are set."""
    if loss_type not in get_args(LossType):
        raise ConfigError(
            f"loss_type is one of {', '.join(get_args(LossType))}", received=loss_type
        )
    if loss_type != "gvpo" and (anchor or weighted):
        raise ConfigError(
            "anchor and response weights are GVPO's",
            received=f"loss_type {loss_type}",
            remedy="leave them out, or set loss_type to gvpo",
        )
