"""A dataset repository of the hub at one commit, and what may go wrong on the way to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gvpo_offline.errors import ConfigError, DataError, GVPOError, IntegrityError, StorageError
from gvpo_offline.store.manifest import Manifest, load_manifest, manifest_path, version_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_TYPE = "dataset"
_AGAIN = "run the same command again, which goes on where it stopped"
_LOG_IN = "log in (`hf auth login`, or HF_TOKEN) with a token that may "


@dataclass(frozen=True)
class Repo:
    """A dataset repository as it was at one commit.

    Attributes:
        api: the client.
        repo_id: owner/name.
        commit: the commit that everything is read from.
        private: whether only its members see it.
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
        assert found.sha is not None  # the hub always says
        return cls(api, repo_id, found.sha, bool(found.private))

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"datasets/{self.repo_id}"

    def top_names(self) -> list[str]:
        """Names of the files and folders at the top."""
        entries = self.api.list_repo_tree(
            self.repo_id, recursive=False, revision=self.commit, repo_type=_TYPE
        )
        return [entry.path for entry in entries]

    def manifest_versions(self) -> list[int]:
        """The versions of the dataset that are there, ascending."""
        versions = map(version_of, self.top_names())
        return sorted(version for version in versions if version is not None)

    def manifest(self, version: int, folder: Path) -> Manifest:
        """Download one version's manifest into `folder`, and read it.

        Raises:
            IntegrityError: it is damaged, fetched twice, or of a newer schema.
        """
        name = manifest_path(folder, version).name
        for again in (False, True):
            self.download(name, folder, again=again)
            try:
                return load_manifest(folder, version)
            except IntegrityError as error:
                damage = error
        raise IntegrityError(
            damage.rule, received=damage.received, remedy=damage.remedy, file=f"{self.label}/{name}"
        ) from damage

    def download(self, path: str, folder: Path, *, again: bool = False) -> Path:
        """Download one file into `folder`, under its path; `again`: even if it is there."""
        found: Any = self.api.hf_hub_download(
            self.repo_id,
            path,
            repo_type=_TYPE,
            revision=self.commit,
            local_dir=folder,
            force_download=again,
        )
        return Path(found)

    def lengths_and_hashes(self, paths: list[str]) -> dict[str, tuple[int, str | None]]:
        """Length in bytes and SHA-256 of the files that exist among `paths`; what lies in git
        itself has no SHA-256.
        """
        from huggingface_hub.hf_api import RepoFile

        entries = self.api.get_paths_info(
            self.repo_id, paths, revision=self.commit, repo_type=_TYPE
        )
        return {
            entry.path: (entry.size, entry.lfs.sha256 if entry.lfs else None)
            for entry in entries
            if isinstance(entry, RepoFile)
        }


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
    """Turn what huggingface_hub raises into errors that say what to do.

    Raises:
        ConfigError: no such repository or revision, or no permission.
        DataError: a file that is not there.
        StorageError: the hub does not answer, or refuses for a reason of its own.
    """
    from huggingface_hub import errors

    place = f"datasets/{repo_id}"
    try:
        yield
    except GVPOError:
        raise
    except errors.LocalEntryNotFoundError as error:  # which says that nobody answered
        raise _no_answer(error, place) from error
    except errors.HFValidationError as error:
        raise ConfigError(
            "repo_id is owner/name, as the hub names repositories", received=repo_id
        ) from error
    except errors.GatedRepoError as error:
        raise ConfigError(
            "a gated repository is open to those who were let in",
            remedy=f"ask for access on its page, and {_LOG_IN}read it",
            file=place,
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            "the repository exists, and its reader may see it",
            received="no such dataset repository",
            remedy="correct repo_id, or, if it is private, " + _LOG_IN + "read it",
            file=place,
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(
            "the revision is a branch, tag or commit of the repository",
            received="no such revision",
            file=place,
        ) from error
    except errors.EntryNotFoundError as error:
        raise DataError(
            "every file that the manifest names is in the repository",
            received=_first_line(error),
            remedy="push the dataset again",
            file=place,
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refused(error, place, writing=writing) from error
    except RuntimeError as error:  # of a thread that uploads
        if not isinstance(error.__cause__, (_transport_error(), OSError)):
            raise
        raise _no_answer(error.__cause__, place) from error
    except (_transport_error(), OSError) as error:
        if getattr(error, "filename", None) is not None:
            raise  # of this machine
        raise _no_answer(error, place) from error


def _no_answer(error: Exception, place: str) -> StorageError:
    return StorageError(
        "the hub answers, and sends all of a file",
        received=_first_line(error),
        remedy=_AGAIN,
        file=place,
    )


def _refused(error: Any, place: str, *, writing: bool) -> GVPOError:
    status = error.response.status_code if error.response is not None else None
    if status in (401, 403):
        return ConfigError(
            "you may write to the repository" if writing else "you may read the repository",
            received=f"status {status}",
            remedy=_LOG_IN + ("write to it" if writing else "read it"),
            file=place,
        )
    if status in (409, 412):
        return DataError(
            "nobody else commits to the repository during a push",
            received=f"status {status}",
            remedy="run the same command again",
            file=place,
        )
    return StorageError(
        "the hub does what it is asked",
        received=_first_line(error),
        remedy=_AGAIN,
        file=place,
    )


def _transport_error() -> type[Exception]:
    """What the HTTP library under huggingface_hub, which changes, raises without an answer."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
