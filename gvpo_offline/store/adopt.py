"""Opens Parquet files of other programs, and in-memory tables, as a dataset.

Such a file follows `schemas/training_file.schema.json` and has tokens, `rewards` and
`ref_seq_logprobs` in one file. It is not copied: the manifest exists in memory only. All groups
are checked first, because the file was not written by this package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gvpo_offline.errors import ConfigError, DataError, label_path
from gvpo_offline.hashing import sha256_file, sha256_json
from gvpo_offline.store.check import check_groups
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.location import RemoteSettings, is_url, local_path
from gvpo_offline.store.manifest import (
    BaseFile,
    Manifest,
    ReferenceFamily,
    RewardFamily,
    Sidecar,
)
from gvpo_offline.store.parquet import footer_sha256, open_parquet
from gvpo_offline.store.row_group_sizes import RowGroups
from gvpo_offline.store.schema import GROUPS_COLUMNS, TRAINING_COLUMNS
from gvpo_offline.store.sidecar_choice import RewardChoice, WeightedReward

# Columns of a training file that a dataset keeps in sidecars.
_INLINE = ("rewards", "ref_seq_logprobs")


def adopt_parquet(
    paths: Sequence[str | Path], *, need: Sequence[str] = (), checked: bool = True
) -> GroupDataset:
    """Open Parquet files with the columns of a groups file as one dataset, without copying them.

    Args:
        paths: files with at least the required columns of `schemas/groups.schema.json`.
        need: further required columns: `rewards`, `ref_seq_logprobs`.
        checked: hash the files and check every group. False, for a look at a few groups of one
            file: neither is done, and the file is not read as a whole.

    Raises:
        DataError: a column is missing, or a group breaks a rule; names file, row and group.
        IntegrityError: a file cannot be read.
    """
    files = [Path(path).resolve() for path in paths]
    if not files:
        raise ConfigError("a dataset is at least one file", received="none")
    required = [column.name for column in GROUPS_COLUMNS if column.required] + list(need)
    bases, names = [], set(_INLINE)
    for path in files:
        present, base = _base_file(path, hashed=checked)
        missing = [name for name in required if name not in present]
        if missing:
            raise DataError(
                "a training file has the columns of schemas/training_file.schema.json"
                if need
                else "a groups file has the columns of schemas/groups.schema.json",
                received=f"no column {', '.join(missing)}",
                remedy="write the missing columns, or convert the file with `gvpo-offline import`",
                file=path,
            )
        names &= present
        bases.append(base)
    dataset = _in_memory(files, bases, names)
    if checked:
        check_groups(dataset, [*TRAINING_COLUMNS, "response_ids", *_INLINE])
    return dataset


def _base_file(path: Path, *, hashed: bool) -> tuple[set[str], BaseFile]:
    """The column names of a file, and its manifest entry."""
    with open_parquet(path) as file:
        metadata = file.metadata
        entry = BaseFile(
            path=str(path),
            sha256=sha256_file(path) if hashed else "",
            bytes=path.stat().st_size,
            row_groups=RowGroups(
                metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)
            ),
            footer_sha256=footer_sha256(path),
            n_responses=0,
            n_tokens=0,
        )
        return set(file.schema_arrow.names), entry


def _in_memory(files: list[Path], bases: list[BaseFile], names: set[str]) -> GroupDataset:
    # The file is its own sidecar.
    inline = [Sidecar(base_sha256=base.sha256, file=base) for base in bases]
    rewards = RewardFamily(name="rewards", files=inline) if "rewards" in names else None
    reference = None
    if "ref_seq_logprobs" in names:
        reference = ReferenceFamily(
            fingerprint=sha256_json([base.sha256 for base in bases]),
            model_name_or_path="unknown: the file does not say",
            weights_sha256="",
            model_class="",
            dtype="unknown",
            autocast_dtype=None,
            attn_implementation="unknown",
            tokenizer_fingerprint=None,
            files=inline,
        )
    manifest = Manifest(
        groups=bases,
        rewards=[rewards] if rewards else [],
        references=[reference] if reference else [],
    )
    return GroupDataset(
        files[0].parent, manifest, [WeightedReward(rewards)] if rewards else (), reference
    )


def open_for_training(
    path: str | Path,
    *,
    reward: RewardChoice = None,
    reference: str | None = None,
    version: int | None = None,
    remote: RemoteSettings | None = None,
) -> GroupDataset:
    """Open a dataset's folder or URL, or a training file in Parquet, with reward and reference.

    Args:
        path: of the dataset or file.
        reward, reference, version, remote: as in `open_dataset`; a file has one reward and one
            reference.

    Raises:
        DataError, ConfigError, IntegrityError: as `open_dataset` and `adopt_parquet`.
    """
    if not is_url(path) and local_path(path).is_file():
        if isinstance(reward, Mapping):
            raise ConfigError(
                "only the rewards of a dataset can be combined",
                received=f"{dict(reward)} of a file with the one column `rewards`",
                remedy="leave reward out, or convert the file with `gvpo-offline import`",
                file=path,
            )
        return adopt_parquet([local_path(path)], need=("rewards", "ref_seq_logprobs"))
    return open_dataset(path, reward=reward, reference=reference, version=version, remote=remote)


def resolve_dataset(data: Any, scratch: Path) -> GroupDataset:
    """Open any supported kind of training dataset.

    Args:
        data: a `GroupDataset`; the path or URL of a dataset; the path of a training file in
            Parquet; or a `datasets.Dataset` with the columns of one.
        scratch: folder to write an in-memory dataset to; created if needed.

    Raises:
        ConfigError: `data` is none of these, or lacks rewards or reference log-probs.
        DataError, IntegrityError: as `open_dataset` and `adopt_parquet`.
    """
    if isinstance(data, str | Path):
        return open_for_training(data)
    if hasattr(data, "to_parquet"):
        scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = scratch / "in-memory.parquet"
        data.to_parquet(str(path))
        for place in (path, scratch):
            label_path(place, f"the {type(data).__name__} in memory")
        return open_for_training(path)
    if not isinstance(data, GroupDataset):
        raise ConfigError(
            "a dataset is a folder or its URL, a Parquet file or datasets.Dataset with the columns "
            "of schemas/training_file.schema.json, or the result of open_dataset",
            received="none" if data is None else f"an object of class {type(data).__name__}",
            remedy="pass the folder that `gvpo-offline import` wrote",
        )
    if not data.rewards or data.reference is None:
        raise ConfigError(
            "training needs rewards and reference log-probs",
            received=f"a dataset opened without its {'reference' if data.rewards else 'rewards'}",
            remedy="open it with open_dataset(path)",
            file=data.root,
        )
    return data
