"""Settings of `push` and `pull`."""

from __future__ import annotations

from dataclasses import dataclass

from gvpo_offline.settings import required


@dataclass
class PushConfig:
    """A dataset's files, its manifest and a card, into a dataset repository of the hub."""

    dataset: str = ""
    """The dataset's folder."""
    repo_id: str = ""
    """The repository, as owner/name; it is made if there is none."""
    private: bool = False
    """Make the repository a private one. A public repository that exists already is refused."""
    revision: str = "main"
    """The branch to push to; it is made if there is none."""
    dataset_version: int | None = None
    """Which version of the dataset. Null: the newest."""
    show_progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        required("dataset", self.dataset)
        required("repo_id", self.repo_id)


@dataclass
class PullConfig:
    """A dataset from the hub into a folder; nothing of it is seen there before all of it is whole.

    The same command again goes on where it stopped, and restores files that were damaged.
    """

    repo_id: str = ""
    """The repository, as owner/name."""
    output_dir: str = ""
    """Folder of the dataset: empty, or one that holds an older version of the same dataset."""
    revision: str = "main"
    """Branch, tag or commit to pull from."""
    dataset_version: int | None = None
    """Which version of the dataset. Null: the newest that the revision has."""
    rewards: list[str] | str | None = None
    """Only these rewards, as `name` or `name@version`; []: none. Null: all of them."""
    references: list[str] | str | None = None
    """Only these references, by the first digits of their fingerprints; []: none. Null: all of
    them."""
    show_progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        required("repo_id", self.repo_id)
        required("output_dir", self.output_dir)
        self.rewards = [self.rewards] if isinstance(self.rewards, str) else self.rewards
        self.references = [self.references] if isinstance(self.references, str) else self.references
