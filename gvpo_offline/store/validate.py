"""A dataset checked whole: every file, every page, every group, every sidecar it names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gvpo_offline.errors import DataError, IntegrityError
from gvpo_offline.hashing import text_keys
from gvpo_offline.rules import check_group
from gvpo_offline.schema import (
    GROUPS_COLUMNS,
    REFERENCE_COLUMNS,
    Group,
    groups_from_table,
    split_nested_list,
)
from gvpo_offline.store.adopt import adopt_parquet
from gvpo_offline.store.commit import verify_file
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.manifest import Manifest, load_manifest
from gvpo_offline.store.survey import Survey, survey

# Sum of float32 log-probs against the stored float64 sum, nats a token.
_SUM_TOLERANCE = 1e-5
Progress = Callable[[Iterable[int], str], Iterable[int]]


@dataclass(frozen=True)
class Validation:
    """What was checked.

    Attributes:
        manifest: the version that was checked; None for a foreign file.
        survey: counts of the dataset.
        n_files: files read, sidecars included.
    """

    manifest: Manifest | None
    survey: Survey
    n_files: int


def validate(path: Path, progress: Progress) -> Validation:
    """Check a dataset's folder, or a foreign Parquet file in the group shape.

    Args:
        path: what to check.
        progress: wraps the row-group numbers of a pass, which it is told the name of.

    Raises:
        DataError: a group breaks a rule.
        IntegrityError: a file is missing or altered, or a sidecar does not fit.
    """
    if path.is_file():
        foreign = adopt_parquet([path])
        return Validation(None, survey(foreign), 1)
    manifest = load_manifest(path)
    plain = GroupDataset(path, manifest)
    for entry in plain.files():
        verify_file(path, entry)
    _check_groups(plain, progress)
    files = {entry.path for entry in plain.files()}
    counted = survey(plain)
    for number, rewards in enumerate(manifest.rewards):
        dataset = GroupDataset(path, manifest, rewards=rewards)
        _check_sidecar(dataset, progress, f"reward {rewards.name}@{rewards.version}")
        files |= {entry.path for entry in dataset.files()}
        counted = survey(dataset) if number == 0 else counted
    for reference in manifest.references:
        dataset = GroupDataset(path, manifest, reference=reference)
        _check_sidecar(dataset, progress, f"reference {reference.fingerprint[:12]}")
        files |= {entry.path for entry in dataset.files()}
    return Validation(manifest, counted, len(files))


def _check_groups(dataset: GroupDataset, progress: Progress) -> None:
    tokenizer = dataset.manifest.tokenizer
    vocab_size = tokenizer.vocab_size if tokenizer else None
    keys = []
    columns = [column.name for column in GROUPS_COLUMNS]
    for row_group in progress(range(dataset.n_row_groups), "groups"):
        groups = groups_from_table(dataset.table(row_group, columns))
        file, first_row = place_of(dataset, row_group)
        for row, group in enumerate(groups, first_row):
            check_group(group, file=file, row=row, vocab_size=vocab_size)
        keys.append(text_keys(group.group_id for group in groups))
    # 8 bytes a group instead of the ids themselves; two ids with one 64-bit hash do not happen.
    values, counts = np.unique(np.concatenate(keys), return_counts=True)
    doubled = set(values[counts > 1].tolist())
    if doubled:
        _raise_doubled(dataset, doubled)


def place_of(dataset: GroupDataset, row_group: int) -> tuple[Path, int]:
    """File of a row group, and the number of its first row within that file."""
    number, local = dataset.locate(row_group)
    base = dataset.manifest.groups[number]
    return dataset.root / base.path, sum(base.row_groups[:local])


def _raise_doubled(dataset: GroupDataset, doubled: set[int]) -> None:
    for row_group in range(dataset.n_row_groups):
        ids = dataset.table(row_group, ["group_id"]).column("group_id").to_pylist()
        for row, (group_id, key) in enumerate(zip(ids, text_keys(ids).tolist(), strict=True)):
            if key in doubled:
                file, first_row = place_of(dataset, row_group)
                raise DataError(
                    "a group id occurs once in a dataset",
                    received="an id that occurs again",
                    remedy="import the log again",
                    file=file,
                    row=first_row + row,
                    group=group_id,
                )


def _check_sidecar(dataset: GroupDataset, progress: Progress, label: str) -> None:
    base_files = {file.path for file in dataset.manifest.groups}
    for entry in dataset.files():
        if entry.path not in base_files:
            verify_file(dataset.root, entry)
    tokens = [column.name for column in REFERENCE_COLUMNS]
    columns = ["prompt_token_ids", "response_token_ids", "loss_mask", "rewards", *tokens]
    for row_group in progress(range(dataset.n_row_groups), label):
        table = dataset.table(row_group, columns)
        file, first_row = place_of(dataset, row_group)
        groups = groups_from_table(table)
        for row, group in enumerate(groups, first_row):
            check_group(group, file=file, row=row)
        if "ref_token_logprobs" in table.column_names:
            column = table.column("ref_token_logprobs").combine_chunks()
            array = column.chunk(0) if hasattr(column, "chunk") else column
            _check_sums(groups, split_nested_list(array), file, first_row)


def _check_sums(
    groups: list[Group],
    token_logprobs: Sequence[Sequence[npt.NDArray[np.float32]] | None],
    file: Path,
    first_row: int,
) -> None:
    """Raise IntegrityError unless every sequence's log-prob is the sum over its counting tokens."""
    for row, (group, logprobs) in enumerate(zip(groups, token_logprobs, strict=True), first_row):
        if logprobs is None or group.ref_seq_logprobs is None:
            continue
        for index, values in enumerate(logprobs):
            mask = None if group.loss_mask is None else group.loss_mask[index]
            expected = float(group.ref_seq_logprobs[index])
            fits = len(values) == len(group.response_token_ids[index])
            total = (
                float(np.sum(values if mask is None else values[mask], dtype=np.float64))
                if fits
                else 0.0
            )
            if not fits or abs(total - expected) > _SUM_TOLERANCE * max(len(values), 1):
                raise IntegrityError(
                    "ref_seq_logprobs is the sum of ref_token_logprobs over the tokens that count",
                    received=f"{expected} and {total} over {len(values)} tokens, response {index}",
                    remedy="score the reference again",
                    file=file,
                    row=row,
                    group=group.group_id,
                )
