"""Settings of `push` and `pull`."""

from __future__ import annotations

from dataclasses import dataclass

from gvpo_offline.ranges import check_ranges
from gvpo_offline.settings import required


@dataclass
class PushConfig:
    """Upload a dataset's files, its manifest and a card to a dataset repository of the hub."""

    dataset: str = ""
    """The dataset's folder."""
    repo_id: str = ""
    """The repository, as owner/name; it is created if it does not exist."""
    private: bool = False
    """Create a private repository. An existing public repository is refused."""
    revision: str = "main"
    """The branch to push to; it is created if it does not exist."""
    dataset_version: int | None = None
    """Which version of the dataset. Null: the newest."""
    dry_run: bool = False
    """List the files that would be uploaded, with their sizes, and those that the repository has
    already; upload and make nothing."""
    show_progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        required("dataset", self.dataset)
        required("repo_id", self.repo_id)
        check_ranges(self)


@dataclass
class PullConfig:
    """Download a dataset from the hub to a folder. Readers see it once all files are verified.

    The same command again continues an interrupted download and restores damaged files.
    """

    repo_id: str = ""
    """The repository, as owner/name."""
    output_dir: str = ""
    """Folder of the dataset: empty, or with an older version of the same dataset."""
    revision: str = "main"
    """Branch, tag or commit to pull from."""
    dataset_version: int | None = None
    """Which version of the dataset. Null: the newest of the revision."""
    rewards: list[str] | str | None = None
    """Download only these rewards, as `name` or `name@version`; []: none. Null: all."""
    references: list[str] | str | None = None
    """Download only these references, by the first digits of their fingerprints; []: none. Null:
    all."""
    show_progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        required("repo_id", self.repo_id)
        required("output_dir", self.output_dir)
        self.rewards = [self.rewards] if isinstance(self.rewards, str) else self.rewards
        self.references = [self.references] if isinstance(self.references, str) else self.references
        check_ranges(self)
