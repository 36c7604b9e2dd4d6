"""A dataset repository of the hub at one commit, and the errors of huggingface_hub."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from gvpo_offline.errors import ConfigError, DataError, GVPOError, IntegrityError, StorageError
from gvpo_offline.store.manifest import Manifest, load_manifest, manifest_path, version_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_TYPE = "dataset"
_LOG_IN = "log in (`hf auth login`, or HF_TOKEN) with a token that may "


@dataclass(frozen=True)
class Repo:
    """A dataset repository at one commit.

    Attributes:
        api: the client.
        repo_id: owner/name.
        commit: the commit that everything is read from.
        private: whether the repository is private.
    """

    api: HfApi
    repo_id: str
    commit: str
    private: bool

    @classmethod
    def open(cls, repo_id: str, revision: str) -> Repo:
        """The repository at the newest commit of `revision`."""
        from huggingface_hub import HfApi

        api = HfApi()
        found = api.dataset_info(repo_id, revision=revision)
        assert found.sha is not None  # the hub always returns it
        return cls(api, repo_id, found.sha, bool(found.private))

    @property
    def label(self) -> str:
        """The repository's name in messages."""
        return f"datasets/{self.repo_id}"

    @cached_property
    def files(self) -> dict[str, tuple[int, str | None]]:
        """Length in bytes and SHA-256 of each file, by path; None for files outside LFS."""
        from huggingface_hub.hf_api import RepoFile

        entries = self.api.list_repo_tree(
            self.repo_id, recursive=True, revision=self.commit, repo_type=_TYPE
        )
        return {
            entry.path: (entry.size, entry.lfs.sha256 if entry.lfs else None)
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def manifest_versions(self) -> list[int]:
        """The versions of the dataset that the repository holds, ascending."""
        return sorted(version for version in map(version_of, self.files) if version is not None)

    def manifest(self, version: int, folder: Path) -> Manifest:
        """Download one version's manifest into `folder`, and read it.

        Raises:
            IntegrityError: it is damaged after a second download, or of a newer schema.
        """
        name = manifest_path(folder, version).name
        for again in (False, True):
            self.download([name], folder, again=again)
            try:
                return load_manifest(folder, version)
            except IntegrityError as error:
                damage = error
        raise IntegrityError(
            damage.rule, received=damage.received, remedy=damage.remedy, file=f"{self.label}/{name}"
        ) from damage

    def download(self, paths: Sequence[str], folder: Path, *, again: bool = False) -> None:
        """Download files into `folder`, under their paths.

        Args:
            paths: files of the repository.
            folder: where an interrupted download continues.
            again: download files anew that are there already.
        """
        self.api.snapshot_download(
            self.repo_id,
            repo_type=_TYPE,
            revision=self.commit,
            local_dir=folder,
            allow_patterns=[glob.escape(path) for path in paths],
            force_download=again,
        )


@contextmanager
def progress_bars(*, shown: bool) -> Iterator[None]:
    """huggingface_hub's own progress bars, or none."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    hide = not shown and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


@contextmanager
def hub_errors(repo_id: str, *, writing: bool = False) -> Iterator[None]:
    """Translate the exceptions of huggingface_hub.

    Raises:
        ConfigError: no such repository or revision, or no permission.
        DataError: another commit came between those of a push.
        StorageError: the hub does not answer, or refuses for another reason.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    known = (HfHubHTTPError, HFValidationError, _transport_error(), OSError)
    try:
        yield
    except GVPOError:
        raise
    except (*known, RuntimeError) as error:
        # A thread's upload that failed is the cause of a RuntimeError.
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, known) or getattr(cause, "filename", None) is not None:
            raise  # a fault of the program, or an error of a local file
        raise _translated(cause, repo_id, writing=writing) from error


def _transport_error() -> type[Exception]:
    """The base class of errors of huggingface_hub's HTTP library, which differs by version."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


def _translated(error: BaseException, repo_id: str, *, writing: bool) -> GVPOError:
    from huggingface_hub import errors

    kind: type[GVPOError] = ConfigError
    received: str | None = None
    remedy: str | None = None
    status = getattr(getattr(error, "response", None), "status_code", None)
    access = "write to" if writing else "read"
    if isinstance(error, errors.HFValidationError):
        rule, received = "repo_id is owner/name, as the hub names repositories", repo_id
    elif isinstance(error, errors.GatedRepoError):
        rule = "a gated repository is read by users who were granted access"
        remedy = f"ask for access on its page, and {_LOG_IN}read it"
    elif isinstance(error, errors.RepositoryNotFoundError):
        rule, received = "the repository exists and you may read it", "no such dataset repository"
        remedy = f"correct repo_id, or, if it is private, {_LOG_IN}read it"
    elif isinstance(error, errors.RevisionNotFoundError):
        rule = "the revision is a branch, tag or commit of the repository"
        received = "no such revision"
    elif status in (401, 403):
        rule = f"you may {access} the repository"
        received, remedy = f"status {status}", f"{_LOG_IN}{access} it"
    elif status in (409, 412):
        kind, rule = DataError, "no other commit is made to the repository during a push"
        received, remedy = f"status {status}", "run the same command again"
    else:
        kind = StorageError
        rule = (
            "the hub answers, and sends all of a file"
            if status is None
            else "the hub accepts the request"
        )
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        received = lines[0] if lines else type(error).__name__
        remedy = "run the same command again, which continues where it stopped"
    return kind(rule, received=received, remedy=remedy, file=f"datasets/{repo_id}")
