"""Foreign Parquet files and in-memory tables in the group shape, opened as a dataset in place.

A file that another program wrote to the contract in `schemas/` holds everything in one place:
tokens, `rewards`, `ref_seq_logprobs`. It is opened where it lies, under a manifest that exists in
memory only, and held to every rule first, because no gate of ours has seen it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from gvpo_offline.errors import ConfigError, DataError
from gvpo_offline.hashing import sha256_file, sha256_json
from gvpo_offline.rules import check_group
from gvpo_offline.schema import GROUPS_COLUMNS, TRAINING_COLUMNS
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.manifest import (
    BaseFile,
    Manifest,
    ReferenceFamily,
    RewardFamily,
    Sidecar,
)
from gvpo_offline.store.parquet import open_parquet


def adopt_parquet(paths: Sequence[str | Path], *, need: Sequence[str] = ()) -> GroupDataset:
    """Open Parquet files in the group shape as one dataset, without copying them.

    Args:
        paths: files with at least the required columns of `schemas/groups.schema.json`.
        need: further columns that must be there: `rewards`, `ref_seq_logprobs`.

    Raises:
        DataError: a column is missing or a group breaks a rule; names file, row and group.
        IntegrityError: a file cannot be read.
    """
    files = [Path(path).resolve() for path in paths]
    required = [column.name for column in GROUPS_COLUMNS if column.required] + list(need)
    bases, names = [], set(open_parquet(files[0]).schema_arrow.names)
    for path in files:
        present = set(open_parquet(path).schema_arrow.names)
        missing = [name for name in required if name not in present]
        if missing:
            raise DataError(
                "a file in the group shape has the columns of schemas/groups.schema.json",
                received=f"no column {', '.join(missing)}",
                remedy="write the missing columns, or bring the file in with `gvpo-offline import`",
                file=path,
            )
        names &= present
        bases.append(_base_file(path))
    dataset = _in_memory(files, bases, names)
    _check_foreign(dataset, files)
    return dataset


def _base_file(path: Path) -> BaseFile:
    metadata = pq.read_metadata(path)
    return BaseFile(
        path=str(path),
        sha256=sha256_file(path),
        bytes=path.stat().st_size,
        row_groups=[metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)],
        n_responses=0,
        n_tokens=0,
    )


def _in_memory(files: list[Path], bases: list[BaseFile], names: set[str]) -> GroupDataset:
    # The sidecar of an inline column is the groups file itself.
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
    return GroupDataset(files[0].parent, manifest, rewards, reference)


def _check_foreign(dataset: GroupDataset, files: list[Path]) -> None:
    first_seen: dict[str, tuple[Path, int]] = {}
    row_in_file, current = 0, -1
    for row_group in range(dataset.n_row_groups):
        file, _ = dataset.locate(row_group)
        if file != current:
            row_in_file, current = 0, file
        for group in dataset.groups(row_group, [*TRAINING_COLUMNS, "response_ids"]):
            place: dict[str, Any] = {"file": files[file], "row": row_in_file}
            check_group(group, **place)
            if group.group_id in first_seen:
                other, other_row = first_seen[group.group_id]
                raise DataError(
                    "a group id occurs once in a dataset",
                    received=f"an id that {other}, row {other_row} has too",
                    remedy="merge the rows into one group, or give them different ids",
                    group=group.group_id,
                    **place,
                )
            first_seen[group.group_id] = (files[file], row_in_file)
            row_in_file += 1


def resolve_dataset(data: Any, scratch: Path) -> GroupDataset:
    """Whatever a user may pass as a training dataset, opened.

    Args:
        data: a `GroupDataset`; the path of a dataset's folder or of a Parquet file in the group
            shape; or a `datasets.Dataset` with its columns.
        scratch: an existing folder that an in-memory dataset may be written to.

    Raises:
        ConfigError: it is none of these, or lacks rewards or reference log-probs.
        DataError, IntegrityError: as `open_dataset` and `adopt_parquet`.
    """
    if isinstance(data, str | Path):
        if Path(data).is_file():
            return adopt_parquet([data], need=("rewards", "ref_seq_logprobs"))
        return open_dataset(data)
    if hasattr(data, "to_parquet"):
        path = scratch / "in-memory.parquet"
        data.to_parquet(str(path))
        return adopt_parquet([path], need=("rewards", "ref_seq_logprobs"))
    if not isinstance(data, GroupDataset):
        raise ConfigError(
            "a dataset is a folder, a Parquet file or a datasets.Dataset in the group shape, "
            "or what open_dataset returns",
            received=type(data).__name__,
        )
    if data.rewards is None or data.reference is None:
        raise ConfigError(
            "training needs rewards and reference log-probs",
            received=f"a dataset opened without its {'reference' if data.rewards else 'rewards'}",
            remedy="open it with open_dataset(path)",
            file=data.root,
        )
    return data
