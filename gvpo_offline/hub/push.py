"""A dataset to the hub: the files of one version, then its manifest and card.

Commits are made of named files rather than of a folder: what lies in a dataset's folder without
being named by its manifest stays at home, and manifest and card come last, with or after all that
they name. A dataset of few files is one commit. A larger one is several, as the hub recommends, and
what was committed before an interruption is not uploaded again; files without a manifest are seen
by no reader.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gvpo_offline.errors import ConfigError, DataError, IntegrityError
from gvpo_offline.hub.card import card
from gvpo_offline.hub.repo import Repo, hub_errors, progress_bars
from gvpo_offline.hub.settings import PushConfig
from gvpo_offline.hub.versions import check_goes_on, is_partial
from gvpo_offline.store.commit import verify_file
from gvpo_offline.store.location import local_folder
from gvpo_offline.store.manifest import (
    FileEntry,
    Manifest,
    load_manifest,
    manifest_path,
    version_of,
)

CARD = "README.md"
FILES_PER_COMMIT = 100  # as the hub recommends
_ASKED_AT_ONCE = 500
# What a repository may hold before the first push of a dataset.
_HARMLESS = {CARD, ".gitattributes", "LICENSE", "groups", "rewards", "reference"}


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        url: the repository's page.
        version: the version that is there now.
        files, bytes: data files that were uploaded, and their length; 0 where all was there.
        commits: commits that were made; 0 where the version was there already.
    """

    url: str
    version: int
    files: int
    bytes: int
    commits: int


def push(config: PushConfig) -> Pushed:
    """Upload one version of a dataset.

    Raises:
        ConfigError: the repository may not be written to, or is public where private was asked for.
        DataError: the hub has another dataset, or a version that this one does not go on from; or a
            partial copy.
        IntegrityError: a file is damaged here, or another one has its name there.
        StorageError: the hub does not answer.
    """
    root = local_folder("dataset", config.dataset)
    manifest = load_manifest(root, config.dataset_version)
    if is_partial(manifest):
        raise DataError(
            "a dataset that is pushed is whole",
            received="one that was pulled with some rewards or references left out",
            remedy="pull all of it into another folder, and add to that",
            file=root,
        )
    bars = progress_bars(shown=config.show_progress)
    with bars, hub_errors(config.repo_id, writing=True):
        repo = _open(config)
        url = f"{repo.api.endpoint}/datasets/{config.repo_id}"
        if _is_there(repo, manifest):
            return Pushed(url, manifest.version, files=0, bytes=0, commits=0)
        for entry in manifest.files():
            verify_file(root, entry)
        missing = _missing(repo, manifest.files())
        commits = _upload(repo, root, manifest, missing, config)
    n_bytes = sum(entry.bytes for entry in missing)
    return Pushed(url, manifest.version, files=len(missing), bytes=n_bytes, commits=commits)


def _open(config: PushConfig) -> Repo:
    """The repository and branch, made if there is none."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    try:
        main = Repo.open(config.repo_id, "main")
    except RepositoryNotFoundError:
        api.create_repo(config.repo_id, repo_type="dataset", private=config.private)
        main = Repo.open(config.repo_id, "main")
    if config.private and not main.private:
        raise ConfigError(
            "with `private`, the repository is a private one",
            received="a public one, which exists already",
            remedy="make it private in its settings on the hub, or leave out private",
            file=main.label,
        )
    if config.revision == "main":
        return main
    try:
        return Repo.open(config.repo_id, config.revision)
    except RevisionNotFoundError:
        api.create_branch(config.repo_id, repo_type="dataset", branch=config.revision)
        return Repo.open(config.repo_id, config.revision)


def _is_there(repo: Repo, manifest: Manifest) -> bool:
    """Whether the repository has this version; DataError if it has one that this does not go on
    from.
    """
    names = repo.top_names()
    versions = sorted(v for v in map(version_of, names) if v is not None)
    if not versions:
        strangers = sorted(set(names) - _HARMLESS)
        if strangers:
            raise DataError(
                "the repository is empty or holds a dataset of this package",
                received=", ".join(strangers[:5]),
                remedy="choose another repo_id",
                file=repo.label,
            )
        return False
    with tempfile.TemporaryDirectory() as folder:
        newest = repo.manifest(versions[-1], Path(folder))
    if newest == manifest:
        return True
    remedy = "pull that one into another folder and add to it, or choose another repo_id"
    check_goes_on(manifest, newest, repo.label, remedy)
    return False


def _missing(repo: Repo, entries: Sequence[FileEntry]) -> list[FileEntry]:
    """The files that the repository lacks; IntegrityError if it has another of the same name."""
    missing = []
    for start in range(0, len(entries), _ASKED_AT_ONCE):
        asked = entries[start : start + _ASKED_AT_ONCE]
        held = repo.lengths_and_hashes([entry.path for entry in asked])
        for entry in asked:
            length, digest = held.get(entry.path, (None, None))
            if length is None:
                missing.append(entry)
            elif length != entry.bytes or digest not in (None, entry.sha256):
                raise IntegrityError(
                    "a file of a dataset never changes",
                    received="another one of that name in the repository",
                    remedy="choose another repo_id",
                    file=f"{repo.label}/{entry.path}",
                )
    return missing


def _upload(
    repo: Repo, root: Path, manifest: Manifest, missing: Sequence[FileEntry], config: PushConfig
) -> int:
    """Commit the files, the last of them with manifest and card; how many commits that took.

    Each commit names the one that it follows, so that the hub refuses it if somebody else's came
    between.
    """
    from huggingface_hub import CommitOperationAdd

    starts = range(0, max(len(missing), 1), FILES_PER_COMMIT)
    own_card = card(manifest, config.repo_id, _card_there(repo)).encode()
    name = manifest_path(root, manifest.version).name
    beside = [CommitOperationAdd(name, root / name), CommitOperationAdd(CARD, own_card)]
    title = f"Version {manifest.version} of the dataset"
    head = repo.commit
    for number, start in enumerate(starts, 1):
        batch = missing[start : start + FILES_PER_COMMIT]
        operations = [CommitOperationAdd(entry.path, root / entry.path) for entry in batch]
        last = number == len(starts)
        head = repo.api.create_commit(
            config.repo_id,
            operations=[*operations, *beside] if last else operations,
            commit_message=title if last else f"{title}: files, part {number}",
            repo_type="dataset",
            revision=config.revision,
            parent_commit=head,
        ).oid
    return len(starts)


def _card_there(repo: Repo) -> str | None:
    if CARD not in repo.top_names():
        return None
    with tempfile.TemporaryDirectory() as folder:
        return repo.download(CARD, Path(folder)).read_text(encoding="utf-8")
