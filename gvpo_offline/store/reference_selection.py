"""What the manifest says of a reference that covers a selection of the responses."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class ReferenceSelection(BaseModel):
    """The responses that a reference was scored for, as settings that `train` has as well.

    The sidecars say which responses these are: `ref_seq_logprobs` is NaN for every other response.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    where: str | None = Field(default=None, description="SQL condition on groups; null: all.")
    responses: dict[str, Any] = Field(
        default={}, description="Settings of `responses` that are not their default; empty: all."
    )
    reward: dict[str, float] | str | None = Field(
        default=None,
        description="The reward, `name@version`, that `where` and `responses` refer to, or several "
        "with weights; null: neither refers to one.",
    )

    @property
    def text(self) -> str:
        """The selection on one line."""
        parts = [f"where {' '.join(self.where.split())}"] if self.where else []
        parts += [f"responses.{name} {_plain(value)}" for name, value in self.responses.items()]
        parts += [f"reward {_plain(self.reward)}"] if self.reward else []
        return "; ".join(parts)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return " + ".join(f"{weight:g} * {name}" for name, weight in value.items())
    return str(value)
