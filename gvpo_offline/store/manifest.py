"""The manifest: the files of a dataset, their hashes, and how they were made.

Manifests are numbered and immutable (`manifest-000001.json` …). A stage that adds to a dataset
creates the next one, never overwriting. The highest number is the current version; older versions
can still be opened.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import Field

from gvpo_offline.errors import DataError, IntegrityError, StorageError
from gvpo_offline.files import storage_errors
from gvpo_offline.store.records import Record, WithoutDefaults
from gvpo_offline.store.reference_selection import ReferenceSelection
from gvpo_offline.store.row_group_sizes import RowGroupSizes, n_rows
from gvpo_offline.store.schema import PARTIAL_SCHEMA_VERSION, SCHEMA_VERSION
from gvpo_offline.store.schema_versions import MANIFEST_RULE, refuse_newer
from gvpo_offline.store.sealed import parse_json, sealed_text, unsealed
from gvpo_offline.store.within import check_entries, read_regular

Result = TypeVar("Result")

_NAME = re.compile(r"^manifest-(\d{6,})\.json$")
RESTORE = "restore the file from a copy"


class FileEntry(Record):
    """One Parquet file of the dataset."""

    path: str = Field(description="Path relative to the dataset's folder.")
    sha256: str = Field(description="SHA-256 of the file's bytes, hexadecimal.")
    bytes: int = Field(description="Length of the file, in bytes.")
    row_groups: RowGroupSizes = Field(
        description="Rows of each Parquet row group, in order; `[n, times]` stands for `times` row "
        "groups of n rows each."
    )
    footer_sha256: str | None = Field(
        default=None,
        description="SHA-256 of the Parquet footer: the file's last 8 + n bytes, n being the "
        "little-endian number in the first 4 of the last 8. No page checksum covers the footer, so "
        "it is compared whenever the file is opened; null: not compared.",
    )

    @property
    def rows(self) -> int:
        """Rows of the file: one per group."""
        return n_rows(self.row_groups)

    def check_size(self, size: int, file: Path | str) -> None:
        """Raise IntegrityError unless `size` is the length of the file in the manifest."""
        if size != self.bytes:
            raise damaged(f"the file is {self.bytes} bytes long", f"{size} bytes", file)

    def check_sha256(self, found: str, file: Path | str) -> None:
        """Raise IntegrityError unless `found` is the file's SHA-256 in the manifest."""
        _check_hash("the file's SHA-256", self.sha256, found, file)


def check_footer(expected: str | None, found: str, file: Path | str) -> None:
    """Raise IntegrityError unless a footer's SHA-256 is the expected one; None: any."""
    if expected is not None:
        _check_hash("the SHA-256 of the file's footer", expected, found, file)


def _check_hash(what: str, expected: str, found: str, file: Path | str) -> None:
    if found != expected:
        raise damaged(f"{what} is {expected[:16]}…", f"{found[:16]}…", file)


def missing(file: Path | str) -> IntegrityError:
    """The error about a file that does not exist."""
    return damaged("every file that the manifest names exists", "no such file", file)


def damaged(rule: str, received: object, file: Path | str) -> IntegrityError:
    """An error about a file that is not as it was written; the remedy is a copy of it."""
    return IntegrityError(rule, received=str(received), remedy=RESTORE, file=file)


def read_twice(read: Callable[[], Result]) -> Result:
    """`read()`, called again after an IntegrityError, or where a device fails to read: the bytes
    may have been damaged in transit. What a server refuses is not asked again.

    Raises:
        IntegrityError, StorageError: the second call fails too, or is of no use.
    """
    try:
        return read()
    except IntegrityError:
        return read()
    except StorageError as error:
        if getattr(error.__cause__, "errno", None) != errno.EIO:
            raise
        return read()


class BaseFile(FileEntry):
    """A groups file."""

    n_responses: int = Field(description="Responses in the file.")
    n_tokens: int = Field(description="Prompt and response tokens in the file.")


class Sidecar(WithoutDefaults):
    """A sidecar file, bound to its groups file by that file's hash. Rows correspond one to one."""

    _left_out: ClassVar[tuple[str, ...]] = ("missing_responses", "missing_groups")

    base_sha256: str = Field(description="SHA-256 of the groups file.")
    file: FileEntry
    missing_responses: int = Field(
        default=0,
        description="Of a partial family: responses of the file without a number (NaN). Absent: 0.",
    )
    missing_groups: int = Field(
        default=0, description="Groups of the file with such a response. Absent: 0."
    )


class TokenizerInfo(Record):
    """The tokenizer that made every token id of the dataset."""

    name_or_path: str
    fingerprint: str = Field(
        description="SHA-256 over vocabulary, merges, added tokens and chat template."
    )
    vocab_size: int = Field(description="Number of token ids, added tokens included.")


_PARTIAL = Field(
    default=False,
    description="Whether responses that a merge added have no number yet (NaN in the sidecars). "
    "Only in manifests of schema version 2. Absent: false.",
)


class RewardFamily(WithoutDefaults):
    """One named, versioned reward for every response of the dataset."""

    _left_out: ClassVar[tuple[str, ...]] = ("partial",)

    name: str
    version: int = 1
    config: dict[str, Any] = Field(default={})
    components: list[str] = Field(
        default=[], description="Names of the parts in the column `components`, in its order."
    )
    partial: bool = _PARTIAL
    files: list[Sidecar]


class ReferenceFamily(WithoutDefaults):
    """The log-probs of every response, or of every selected response, under a reference policy."""

    # Versions that do not know a field read references at its default as before.
    _left_out: ClassVar[tuple[str, ...]] = ("selection", "arithmetic", "partial")

    fingerprint: str = Field(description="SHA-256 over the fields below but `files`.")
    model_name_or_path: str
    weights_sha256: str
    model_class: str
    dtype: str = Field(description="Data type of the weights.")
    autocast_dtype: str | None = Field(description="Data type of the matrix products, if another.")
    attn_implementation: str
    layout: str = Field(default="padded", description="How groups were laid out for the model.")
    tokenizer_fingerprint: str | None
    arithmetic: int = Field(
        default=1,
        description="Version of the arithmetic in bfloat16 and float16; absent: 1. 2: products of "
        "the output layer are float32 on every device.",
    )
    selection: ReferenceSelection | None = Field(
        default=None, description="The responses that have log-probs; null or absent: every one."
    )
    partial: bool = _PARTIAL
    files: list[Sidecar]

    @property
    def described(self) -> str:
        """The model, and the selection if there is one."""
        of = f", of {self.selection.text}" if self.selection else ""
        return f"{self.model_name_or_path}{of}"


class IncompleteGroups(Record):
    """Prompts with one response each, apart from the groups: nothing trains on them.

    They become groups once a merge adds further responses to their prompts.
    """

    files: list[FileEntry] = Field(
        description="Parquet files under `incomplete/`: the columns of a groups file, with one "
        "response per row, and `rewards` and `components` where there is a reward."
    )
    reward: RewardFamily | None = Field(
        default=None,
        description="The reward in the columns `rewards` and `components`; its `files` is empty.",
    )

    @property
    def n_groups(self) -> int:
        """Prompts with one response."""
        return sum(file.rows for file in self.files)


class LineageStep(WithoutDefaults):
    """One command that added to the dataset."""

    # Versions of this package without the field can read a manifest that does not use it.
    _left_out: ClassVar[tuple[str, ...]] = ("details",)

    stage: str
    package_version: str
    config: dict[str, Any]
    inputs: list[dict[str, Any]] = Field(default=[])
    counts: dict[str, int] = Field(default={})
    details: dict[str, Any] = Field(
        default={}, description="Counts by rule and by sampler of what was left out."
    )


class Manifest(Record):
    """One version of a dataset."""

    schema_version: int = SCHEMA_VERSION
    version: int = 1
    tokenizer: TokenizerInfo | None = Field(
        default=None, description="Null where a foreign file does not say."
    )
    samplers: dict[str, dict[str, Any]] = Field(
        default={}, description="Settings of each sampler, by name, as far as the log has them."
    )
    groups: list[BaseFile]
    rewards: list[RewardFamily] = Field(default=[])
    references: list[ReferenceFamily] = Field(default=[])
    incomplete: IncompleteGroups | None = Field(
        default=None, description="Prompts with one response each; left out where there are none."
    )
    lineage: list[LineageStep] = Field(default=[])

    @property
    def n_groups(self) -> int:
        """Groups of the dataset."""
        return sum(file.rows for file in self.groups)

    @property
    def n_incomplete(self) -> int:
        """Prompts with one response, which are not among the groups."""
        return 0 if self.incomplete is None else self.incomplete.n_groups

    def files(self) -> list[FileEntry]:
        """Every file that the version names, once each: groups, rewards, references, incomplete
        groups.
        """
        return list({entry.path: entry for entry in self.entries()}.values())

    def entries(self) -> list[FileEntry]:
        """As `files`, but a file as often as it is named."""
        families = [f.files for f in self.rewards] + [f.files for f in self.references]
        sidecars = [sidecar.file for files in families for sidecar in files]
        waiting = [] if self.incomplete is None else self.incomplete.files
        return [*self.groups, *sidecars, *waiting]


class SealedManifest(Record):
    """What a manifest file holds: the manifest and the hash of its content."""

    sha256: str = Field(
        description="SHA-256 of `manifest` as canonical JSON: sorted keys, no spaces, ASCII."
    )
    manifest: Manifest


def manifest_path(root: Path, version: int) -> Path:
    """The file of one manifest version."""
    return root / manifest_name(version)


def manifest_name(version: int) -> str:
    """The file name of one manifest version."""
    return f"manifest-{version:06d}.json"


def version_of(name: str) -> int | None:
    """The version in the file name of a manifest; None if it is not one."""
    found = _NAME.match(name)
    return None if found is None else int(found.group(1))


def manifest_versions(root: Path) -> list[int]:
    """The versions that exist under `root`, ascending."""
    if not root.is_dir():
        return []
    versions = (version_of(entry.name) for entry in root.iterdir())
    return sorted(version for version in versions if version is not None)


def with_schema_version(manifest: Manifest) -> Manifest:
    """The manifest with the lowest schema version that has all that it says.

    A reward or reference that is partial needs version 2: readers of version 1 take every number
    for finite, and are told to upgrade instead. A version that is not known here is kept.
    """
    partial = [f.partial for f in manifest.rewards] + [f.partial for f in manifest.references]
    needed = PARTIAL_SCHEMA_VERSION if any(partial) else SCHEMA_VERSION
    if manifest.schema_version == needed or manifest.schema_version > PARTIAL_SCHEMA_VERSION:
        return manifest
    return manifest.model_copy(update={"schema_version": needed})


def dump_manifest(manifest: Manifest) -> str:
    """The text of a manifest file."""
    manifest = with_schema_version(manifest)
    # Without the key where there are none, so that other manifests keep their bytes.
    return sealed_text("manifest", manifest, {"incomplete"} if manifest.incomplete is None else ())


def load_manifest(root: Path, version: int | None = None) -> Manifest:
    """Read one version, by default the newest.

    Raises:
        DataError: there is no manifest under `root`.
        IntegrityError: the file cannot be parsed, was altered, or is of a newer schema.
    """
    path = manifest_path(root, choose_version(manifest_versions(root), version, root))
    with storage_errors(path):
        content = read_regular(path)
    return parse_manifest(content, path)


def choose_version(versions: Sequence[int], version: int | None, root: Path | str) -> int:
    """`version` if it exists, by default the newest of `versions`.

    Raises:
        DataError: there is no such version.
    """
    if not versions or (version is not None and version not in versions):
        raise DataError(
            "a dataset is a folder that holds a manifest"
            + ("" if version is None else f" of version {version}"),
            received=f"versions {versions}" if versions else "none",
            remedy="make one with `gvpo-offline import`, or correct the path",
            file=root,
        )
    return max(versions) if version is None else version


def parse_manifest(data: bytes, path: Path | str) -> Manifest:
    """The manifest in the bytes of a file; IntegrityError as `load_manifest`."""
    sealed = parse_json(data, path, MANIFEST_RULE, RESTORE)
    refuse_newer(sealed, path)
    manifest = unsealed(Manifest, "manifest", sealed, path, MANIFEST_RULE, RESTORE)
    check_manifest(manifest, path)
    return manifest


def check_manifest(manifest: Manifest, path: Path | str) -> None:
    """Check what a manifest says of its files and of itself, before anything is opened.

    Args:
        manifest: the manifest.
        path: of its file, whose name has its version.

    Raises:
        IntegrityError: see `within.check_entries`; or the manifest is of another version than its
            file, names a groups file twice, two sidecars of one, or says two things of a file.
    """
    check_entries(manifest.entries(), path)
    named = version_of(str(path).rsplit("/", 1)[-1])
    if named is not None and named != manifest.version:
        raise damaged(
            f"the file holds version {named} of the dataset, as its name says",
            f"version {manifest.version}",
            path,
        )
    for files in ([f.path for f in manifest.groups], [f.sha256 for f in manifest.groups]):
        if len(set(files)) < len(files):
            twice = next(each for each in files if files.count(each) > 1)
            raise damaged("a manifest names each groups file once", f"{twice} twice", path)
    families = [f.files for f in manifest.rewards] + [f.files for f in manifest.references]
    for sidecars in families:
        bases = [sidecar.base_sha256 for sidecar in sidecars]
        if len(set(bases)) < len(bases):
            rule = "a reward or reference has one sidecar for each groups file"
            raise damaged(rule, "two sidecars of one groups file", path)
    said: dict[str, tuple[str, int, int]] = {}
    for entry in manifest.entries():
        what = (entry.sha256, entry.bytes, entry.rows)
        if said.setdefault(entry.path, what) != what:
            rule = "a manifest says one thing of each file"
            raise damaged(rule, f"two hashes or sizes of {entry.path}", path)
