"""Settings of `merge` and `compact`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from gvpo_offline.errors import ConfigError
from gvpo_offline.ranges import check_ranges
from gvpo_offline.settings import ErrorOrDrop, required

MIB = 2**20
IncompleteRule = Literal["error", "drop", "keep"]


@dataclass
class RewriteSettings:
    """Settings that `merge` and `compact` share."""

    dataset: str = ""
    """Folder of the dataset. It gets a new version; older versions stay readable."""
    duplicates: Literal["keep", "drop", "count"] = "keep"
    """Responses of a group with the same token ids: keep them; drop all but the first; or keep and
    count them. With drop and count, the number of duplicates with another reward is printed."""
    singletons: ErrorOrDrop = "error"
    """A group with a single response after duplicates are dropped: error, or drop it and report the
    number."""
    shard_bytes: int = 256 * MIB
    """Approximate maximum size of a groups file, in bytes."""
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
        check_ranges(self)


@dataclass
class MergeConfig(RewriteSettings):
    """Adds the groups and responses of other datasets to a dataset."""

    add: list[str] | str = field(default_factory=list)
    """Folders of the datasets to add. They are not changed."""
    match: Literal["group_id", "prompt"] = "group_id"
    """Groups to join: those with the same id, or those whose prompts have the same token ids (for
    logs that number their groups independently). A joined group keeps the first id."""
    incomplete: IncompleteRule = "error"
    """A reward or reference that only some of the responses have: error; drop it from the new
    version; or keep it for those that have it, until `reward` or `reference` scores the others
    (only_missing: true). Missing values are never filled in."""
    response_ids: Literal["error", "drop"] = "error"
    """Two responses of a group with the same response id: error, or drop the response ids of that
    group."""

    # Frozen; see `identity`.
    always_in_identity: ClassVar[str] = "add match incomplete response_ids"

    def __post_init__(self) -> None:
        super().__post_init__()
        required("add", self.add)


@dataclass
class RetokeniseConfig:
    """Writes the texts of a dataset as token ids of another tokenizer, into a new dataset."""

    dataset: str = ""
    """Folder of the dataset, whose prompts and responses are kept as texts or messages. It is not
    changed."""
    output_dir: str = ""
    """Folder of the new dataset: new, empty, or that of an interrupted run of the same command."""
    tokenizer_name_or_path: str = ""
    """Tokenizer of the new policy: a folder or a hub name."""
    chat_template: str | None = None
    """Path of a Jinja template, instead of the tokenizer's own."""
    old_tokenizer_name_or_path: str | None = None
    """The tokenizer that made the dataset, if it is no longer at the path that the manifest names.
    It tells which responses ended with an end token."""
    rows_per_row_group: int = 256
    """Groups in one Parquet row group, the unit of reading."""

    def __post_init__(self) -> None:
        for name in ("dataset", "output_dir", "tokenizer_name_or_path"):
            required(name, getattr(self, name))
        check_ranges(self)


@dataclass
class CompactConfig(RewriteSettings):
    """Rewrites a dataset as few files of similar size, with full row groups, in hash order."""

    remove_old: bool = False
    """Remove all older versions and the files that only they use. Do not use it while a program
    reads them: a training run that started on an older version could not continue."""

    # Frozen; see `identity`.
    always_in_identity: ClassVar[str] = "remove_old"
