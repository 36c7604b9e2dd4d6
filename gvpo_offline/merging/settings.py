"""Settings of `merge` and `compact`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from gvpo_offline.errors import ConfigError
from gvpo_offline.settings import OnFew, required

MIB = 2**20


@dataclass
class RewriteSettings:
    """What merging and compacting have in common."""

    dataset: str = ""
    """The dataset's folder; it gets a new version, and the older ones still open."""
    duplicates: Literal["keep", "drop", "count"] = "keep"
    """Responses of a group with the same token ids: keep them; drop all but the first, and say how
    many had another reward than the one that stays; or keep and count them."""
    singletons: OnFew = "error"
    """A group that dropped duplicates leave with a single response: stop, or drop it and say how
    many."""
    shard_bytes: int = 256 * MIB
    """Bytes of a file of groups, at most and about."""
    rows_per_row_group: int = 256
    """Groups in one Parquet row group, the unit of reading."""
    show_progress: bool = True
    """Show progress bars."""

    # Frozen; see `identity`.
    always_in_identity: ClassVar[str] = (
        "dataset duplicates singletons shard_bytes rows_per_row_group show_progress"
    )

    def __post_init__(self) -> None:
        required("dataset", self.dataset)
        for name in ("shard_bytes", "rows_per_row_group"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is positive", received=getattr(self, name))


@dataclass
class MergeConfig(RewriteSettings):
    """Responses of other datasets join the groups of a dataset; groups that it lacks are added."""

    add: list[str] | str = field(default_factory=list)
    """Folders of the datasets whose groups are to join. They stay as they are."""
    match: Literal["group_id", "prompt"] = "group_id"
    """Which groups are one: those with the same id, or those whose prompts have the same tokens
    (for ids that each log made up for itself). A joined group keeps the id that came first."""
    incomplete: OnFew = "error"
    """A reward or reference that only some of the datasets have: stop, or leave it out of the new
    version. It is never filled in."""
    response_ids: Literal["error", "drop"] = "error"
    """Two responses of a group with one response id: stop, or leave out that group's response
    ids."""

    # Frozen; see `identity`.
    always_in_identity: ClassVar[str] = "add match incomplete response_ids"

    def __post_init__(self) -> None:
        super().__post_init__()
        required("add", self.add)


@dataclass
class CompactConfig(RewriteSettings):
    """A dataset's files written anew: few, of one size, with full row groups, in hash order."""

    remove_old: bool = False
    """Remove all older versions, and the files that only they need. Not while something reads
    them: a training run that began on one could not go on."""

    # Frozen; see `identity`.
    always_in_identity: ClassVar[str] = "remove_old"
