"""Upload of a dataset: the files of one version, then its manifest and card.

Commits list their files, so that other files in the dataset's folder stay local. Manifest and card
are in the last commit: until then no reader sees the version. A dataset of many files takes several
commits; what was committed before an interruption is not sent again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gvpo_offline.errors import ConfigError, DataError, IntegrityError
from gvpo_offline.findings.finding import Finding
from gvpo_offline.findings.gate import error_finding, light_checks
from gvpo_offline.hub.card import card
from gvpo_offline.hub.repo import Repo, hub_errors, progress_bars
from gvpo_offline.hub.settings import PushConfig
from gvpo_offline.hub.versions import check_continues, is_partial
from gvpo_offline.store.commit import verify_file
from gvpo_offline.store.location import local_folder
from gvpo_offline.store.manifest import FileEntry, Manifest, load_manifest, manifest_path

CARD = "README.md"
FILES_PER_COMMIT = 100  # as the hub recommends
# What a repository may hold before the first push of a dataset.
_ALLOWED = {CARD, ".gitattributes", "LICENSE", "groups", "rewards", "reference", "incomplete"}


@dataclass(frozen=True)
class PushResult:
    """Result of a push.

    Attributes:
        url: the repository's page.
        version: the version that was pushed.
        files, bytes: number and total length of the data files that were uploaded.
        commits: number of commits; 0 if the repository had the version already.
    """

    url: str
    version: int
    files: int
    bytes: int
    commits: int


def push(config: PushConfig) -> PushResult:
    """Upload one version of a dataset.

    Raises:
        ConfigError: the repository may not be written to, or is public where private was asked for.
        DataError: the repository holds another dataset, or a version that this one does not
            continue; or the dataset is a partial copy.
        IntegrityError: a local file is damaged, or the repository has another file of its name.
        StorageError: the hub does not answer.
    """
    root = local_folder("dataset", config.dataset)
    manifest = manifest_to_push(root, config)
    bars = progress_bars(shown=config.show_progress)
    with bars, hub_errors(config.repo_id, writing=True):
        repo = _open(config)
        url = f"{repo.api.endpoint}/datasets/{config.repo_id}"
        if has_version(repo, manifest):
            return PushResult(url, manifest.version, files=0, bytes=0, commits=0)
        for entry in manifest.files():
            verify_file(root, entry)
        missing = files_to_upload(repo, manifest.files())
        commits = _upload(repo, root, manifest, missing, config)
    n_bytes = sum(entry.bytes for entry in missing)
    return PushResult(url, manifest.version, files=len(missing), bytes=n_bytes, commits=commits)


def manifest_to_push(root: Path, config: PushConfig) -> Manifest:
    """The manifest of the version that is pushed; DataError if the dataset is a partial copy."""
    manifest = load_manifest(root, config.dataset_version)
    if is_partial(manifest):
        raise DataError(
            "only a whole dataset is pushed",
            received="one that was pulled without some of its rewards or references",
            remedy="pull all of it into another folder, and add to that",
            file=root,
        )
    return manifest


def _open(config: PushConfig) -> Repo:
    """The repository at the branch; both are created if they do not exist."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    try:
        main = Repo.open(config.repo_id, "main")
    except RepositoryNotFoundError:
        api.create_repo(config.repo_id, repo_type="dataset", private=config.private)
        main = Repo.open(config.repo_id, "main")
    check_private(main, config)
    if config.revision == "main":
        return main
    try:
        return Repo.open(config.repo_id, config.revision)
    except RevisionNotFoundError:
        api.create_branch(config.repo_id, repo_type="dataset", branch=config.revision)
        return Repo.open(config.repo_id, config.revision)


def check_private(repo: Repo, config: PushConfig) -> None:
    """Raise ConfigError if the repository is public where a private one was asked for."""
    if config.private and not repo.private:
        raise ConfigError(
            "with `private`, the repository is a private one",
            received="a public one, which exists already",
            remedy="make it private in its settings on the hub, or leave out private",
            file=repo.label,
        )


def has_version(repo: Repo, manifest: Manifest) -> bool:
    """Whether the repository has this version.

    Raises:
        DataError: it has a version that this one does not continue, or other files.
    """
    versions = repo.manifest_versions()
    if not versions:
        strangers = sorted({path.partition("/")[0] for path in repo.files} - _ALLOWED)
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
    check_continues(manifest, newest, repo.label, remedy)
    return False


def files_to_upload(repo: Repo, entries: Sequence[FileEntry]) -> list[FileEntry]:
    """The files that the repository lacks; IntegrityError if it has another of the same name."""
    for entry in entries:
        length, digest = repo.files.get(entry.path, (entry.bytes, None))
        if length != entry.bytes or digest not in (None, entry.sha256):
            raise IntegrityError(
                "a file of a dataset never changes",
                received="another file of that name in the repository",
                remedy="choose another repo_id",
                file=f"{repo.label}/{entry.path}",
            )
    return [entry for entry in entries if entry.path not in repo.files]


def _upload(
    repo: Repo, root: Path, manifest: Manifest, missing: Sequence[FileEntry], config: PushConfig
) -> int:
    """Commit the files, the last of them with manifest and card; returns the number of commits.

    Each commit names its parent, so that the hub refuses it if another commit came between.
    """
    from huggingface_hub import CommitOperationAdd

    starts = range(0, max(len(missing), 1), FILES_PER_COMMIT)
    found = card_findings(root, manifest)
    own_card = card(manifest, config.repo_id, _card_there(repo), found).encode()
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


def card_findings(root: Path, manifest: Manifest) -> Sequence[Finding]:
    """What the light checks find; invalid data, which a push does not refuse, is a finding too."""
    try:
        return light_checks(root, manifest).findings
    except (DataError, IntegrityError) as error:
        return [error_finding(error, manifest.n_groups)]


def _card_there(repo: Repo) -> str | None:
    if CARD not in repo.files:
        return None
    with tempfile.TemporaryDirectory() as folder:
        repo.download([CARD], Path(folder))
        return (Path(folder) / CARD).read_text(encoding="utf-8")
