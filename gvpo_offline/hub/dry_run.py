"""What a push would upload, without uploading anything or making a repository."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gvpo_offline.errors import StorageError
from gvpo_offline.hub.card import card
from gvpo_offline.hub.push import (
    CARD,
    FILES_PER_COMMIT,
    card_findings,
    check_private,
    files_to_upload,
    has_version,
    manifest_to_push,
)
from gvpo_offline.hub.repo import Repo, hub_errors
from gvpo_offline.hub.settings import PushConfig
from gvpo_offline.info.text import size_text
from gvpo_offline.store.commit import verify_file
from gvpo_offline.store.location import local_folder
from gvpo_offline.store.manifest import Manifest, manifest_path


@dataclass(frozen=True)
class PushPlan:
    """What a push would do.

    Attributes:
        repo_id, revision: where to.
        version: the version of the dataset.
        upload: length in bytes of each file that would be uploaded, by path in the repository.
        there: the same of files that the repository has already.
        repository: what is known of the repository, in words.
        asked: whether the repository could be asked for its files; if not, `there` is empty.
    """

    repo_id: str
    revision: str
    version: int
    upload: Mapping[str, int]
    there: Mapping[str, int] = field(default_factory=dict)
    repository: str = ""
    asked: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            "repo_id": self.repo_id,
            "revision": self.revision,
            "version": self.version,
            "repository": self.repository,
            "asked": self.asked,
            "upload": dict(self.upload),
            "there": dict(self.there),
            "upload_bytes": sum(self.upload.values()),
        }

    def lines(self) -> list[str]:
        """The plan as lines of text."""
        held = {**{path: ("upload", n) for path, n in self.upload.items()}}
        held |= {path: ("there already", n) for path, n in self.there.items()}
        width = max(map(len, held), default=0)
        total = size_text(sum(self.upload.values()))
        skipped = size_text(sum(self.there.values()))
        where = f"datasets/{self.repo_id}, revision {self.revision}"
        counts = f"{len(self.upload):,} files to upload, {total}"
        return [
            f"dry run: version {self.version} to {where}: {self.repository}",
            *(
                f"  {path:<{width}}  {size_text(n_bytes):>9}  {what}"
                for path, (what, n_bytes) in sorted(held.items())
            ),
            f"{counts}; {len(self.there):,} there already, {skipped}. Nothing was uploaded",
        ]


def plan_push(config: PushConfig) -> PushPlan:
    """What `push` would upload with these settings. It reads the repository's list of files, if it
    can be reached, and changes nothing.

    Presence and size of the local files are checked; `push` also checks their SHA-256.

    Raises:
        ConfigError, DataError, IntegrityError: as `push`, as far as the repository can be read.
    """
    root = local_folder("dataset", config.dataset)
    manifest = manifest_to_push(root, config)
    for entry in manifest.files():
        verify_file(root, entry, content=False)
    try:
        with hub_errors(config.repo_id):
            return _against(_repository(config), root, manifest, config)
    except StorageError as error:
        if error.file != f"datasets/{config.repo_id}":
            raise  # of a local file
        why = f"it could not be asked for its files ({error.received}), so all are listed"
        return _plan(root, manifest, config, {}, why, asked=False)


def _repository(config: PushConfig) -> Repo | str:
    """The repository as it is read; or why there is nothing to read."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        main = Repo.open(config.repo_id, "main")
    except RepositoryNotFoundError:
        kind = "private" if config.private else "public"
        return f"a new {kind} repository, unless you may not read an existing one"
    check_private(main, config)
    try:
        return main if config.revision == "main" else Repo.open(config.repo_id, config.revision)
    except RevisionNotFoundError:
        return main  # of which the branch is made


def _against(repo: Repo | str, root: Path, manifest: Manifest, config: PushConfig) -> PushPlan:
    if isinstance(repo, str):
        return _plan(root, manifest, config, {}, repo)
    kind = "private" if repo.private else "public"
    if has_version(repo, manifest):
        sizes = {path: size for path, (size, _) in repo.files.items()}
        there = {entry.path: entry.bytes for entry in manifest.files()}
        there |= {name: sizes[name] for name in _beside(root, manifest) if name in sizes}
        text = f"a {kind} repository, which has this version already"
        return PushPlan(config.repo_id, config.revision, manifest.version, {}, there, text)
    missing = {entry.path for entry in files_to_upload(repo, manifest.files())}
    there = {e.path: e.bytes for e in manifest.files() if e.path not in missing}
    return _plan(root, manifest, config, there, f"a {kind} repository, which exists")


def _beside(root: Path, manifest: Manifest) -> tuple[str, str]:
    return manifest_path(root, manifest.version).name, CARD


def _plan(
    root: Path,
    manifest: Manifest,
    config: PushConfig,
    there: Mapping[str, int],
    text: str,
    *,
    asked: bool = True,
) -> PushPlan:
    upload = {e.path: e.bytes for e in manifest.files() if e.path not in there}
    commits = max(1, -(-len(upload) // FILES_PER_COMMIT))
    name, own_card = _beside(root, manifest)
    upload[name] = (root / name).stat().st_size
    own = card(manifest, config.repo_id, findings=card_findings(root, manifest))
    upload[own_card] = len(own.encode())  # of a card without other text
    said = f"{text}; {commits} commit{'s' if commits > 1 else ''}"
    return PushPlan(
        config.repo_id, config.revision, manifest.version, upload, there, said, asked=asked
    )
