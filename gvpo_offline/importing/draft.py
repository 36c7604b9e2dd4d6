"""Groups that are being built from their fragments."""

from __future__ import annotations

from dataclasses import dataclass

from gvpo_offline.group import BoolArray, Int32Array
from gvpo_offline.importing.fragment import Fragment


@dataclass(frozen=True)
class InputNames:
    """Names of an input: in messages, in `Group.source`, and as the default sampler."""

    label: str
    file_name: str
    sampler: str


@dataclass(slots=True)
class DraftResponse:
    """One response of a group that is being built; see `Fragment` for the fields."""

    fragment: Fragment
    text: str | None
    ids: Int32Array | None
    mask: BoolArray | None
    reward: float | None
    components: list[float | None]
    sampler: str
    truncated: bool
    response_id: str | None
    sampler_logprob: float | None
    messages: str | None = None
    stopped_by_string: bool = False

    @property
    def ended(self) -> bool:
        """Whether the policy ended it with an end token."""
        return not (self.truncated or self.stopped_by_string)


@dataclass(slots=True)
class Draft:
    """A group that is being built; `reduced` if broken rows of it were dropped."""

    group_id: str
    first: Fragment
    prompt_ids: Int32Array | None
    responses: list[DraftResponse]
    logged: int
    reduced: bool = False
