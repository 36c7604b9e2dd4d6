"""The names of the losses, and which settings go with each. Loads no torch."""

from __future__ import annotations

from typing import Literal, get_args

from gvpo_offline.errors import ConfigError

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
