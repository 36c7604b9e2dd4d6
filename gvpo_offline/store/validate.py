"""Validates a dataset: every file, page, group and sidecar of its manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gvpo_offline.errors import DataError, IntegrityError
from gvpo_offline.group import Group
from gvpo_offline.store.adopt import adopt_parquet
from gvpo_offline.store.arrow import column_array, groups_from_table, split_nested_list
from gvpo_offline.store.check import check_groups
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.incomplete import incomplete_dataset
from gvpo_offline.store.location import RemoteSettings, is_url, local_path
from gvpo_offline.store.manifest import BaseFile, Manifest
from gvpo_offline.store.schema import GROUPS_COLUMNS
from gvpo_offline.store.sidecar_choice import WeightedReward
from gvpo_offline.store.storage import open_storage
from gvpo_offline.store.survey import Survey, survey

# Sum of float32 log-probs against the stored float64 sum, nats a token.
_SUM_TOLERANCE = 1e-5
_REFERENCE = ("ref_seq_logprobs", "ref_token_logprobs")
Progress = Callable[[Iterable[int], str], Iterable[int]]


@dataclass(frozen=True)
class Validation:
    """Result of a validation.

    Attributes:
        manifest: the version that was checked; None for a single Parquet file.
        survey: counts of the dataset.
        n_files: number of files that were read, sidecars and incomplete groups included.
    """

    manifest: Manifest | None
    survey: Survey
    n_files: int


def validate(
    path: str | Path, progress: Progress, remote: RemoteSettings | None = None
) -> Validation:
    """Validate a dataset, or a Parquet file with the columns of a groups file.

    Args:
        path: of a folder or file, or a URL.
        progress: wraps the row group numbers of each pass; its second argument names the pass.
        remote: how a URL is read; every byte is.

    Raises:
        DataError: a group breaks a rule.
        IntegrityError: a file is missing or altered, or a sidecar does not match its groups file.
    """
    if not is_url(path) and local_path(path).is_file():
        foreign = adopt_parquet([local_path(path)])
        if foreign.reference is not None:
            _check_sidecar(foreign, _REFERENCE, progress, "reference")
        return Validation(None, survey(foreign), 1)
    storage = open_storage(path, remote)
    manifest = storage.manifest()
    plain = GroupDataset(storage, manifest)
    plain.verify(whole=True)
    check_groups(
        plain,
        [column.name for column in GROUPS_COLUMNS],
        vocab_size=manifest.tokenizer.vocab_size if manifest.tokenizer else None,
        progress=lambda numbers: progress(numbers, "groups"),
    )
    files = {entry.path for entry in plain.files()}
    counted = survey(plain)
    _check_totals(storage.root, manifest.groups, counted)
    for number, rewards in enumerate(manifest.rewards):
        dataset = GroupDataset(storage, manifest, rewards=[WeightedReward(rewards)])
        _check_sidecar(
            dataset, ["rewards", "components"], progress, f"reward {rewards.name}@{rewards.version}"
        )
        files |= {entry.path for entry in dataset.files()}
        counted = survey(dataset) if number == 0 else counted
    for reference in manifest.references:
        dataset = GroupDataset(storage, manifest, reference=reference)
        _check_sidecar(dataset, _REFERENCE, progress, f"reference {reference.fingerprint[:12]}")
        files |= {entry.path for entry in dataset.files()}
    files |= _check_incomplete(GroupDataset(storage, manifest), progress)
    return Validation(manifest, counted, len(files))


def _check_incomplete(plain: GroupDataset, progress: Progress) -> set[str]:
    """Check the incomplete groups of a dataset; returns the paths of their files."""
    waiting = incomplete_dataset(plain.storage, plain.manifest)
    if waiting is None:
        return set()
    tokenizer = plain.manifest.tokenizer
    waiting.verify(whole=True)
    check_groups(
        waiting,
        # Reading rewards compares their number with that of the responses.
        [*(column.name for column in GROUPS_COLUMNS), "rewards", "components"],
        vocab_size=tokenizer.vocab_size if tokenizer else None,
        progress=lambda numbers: progress(numbers, "incomplete groups"),
        incomplete=True,
    )
    return {entry.path for entry in waiting.files()}


def _check_totals(root: Path | str, groups: Sequence[BaseFile], counted: Survey) -> None:
    stated = (sum(file.n_responses for file in groups), sum(file.n_tokens for file in groups))
    found = (counted.n_responses, counted.n_tokens)
    if stated != found:
        raise DataError(
            f"the dataset has {stated[0]} responses and {stated[1]} tokens, as in its manifest",
            received=f"{found[0]} and {found[1]}",
            remedy="import the log again, or fix the program that wrote the manifest",
            file=root,
        )


def _check_sidecar(
    dataset: GroupDataset, joined: Sequence[str], progress: Progress, label: str
) -> None:
    dataset.verify(whole=True)
    columns = ["prompt_token_ids", "response_token_ids", "loss_mask", *joined]
    for row_group in progress(range(dataset.n_row_groups), label):
        # `table` compares the sidecar with the groups: ids, lengths, finite numbers.
        table = dataset.table(row_group, columns)
        if "ref_token_logprobs" in table.column_names:
            _check_sums(dataset, row_group, table)


def _check_sums(dataset: GroupDataset, row_group: int, table: pa.Table) -> None:
    """Raise IntegrityError unless each ref_seq_logprob is the sum over the unmasked tokens."""
    groups = groups_from_table(table)
    logprobs = split_nested_list(column_array(table, "ref_token_logprobs"))
    for row, (group, values) in enumerate(zip(groups, logprobs, strict=True)):
        problem = None if values is None else _sum_problem(group, values)
        if problem is not None:
            raise IntegrityError(
                "ref_seq_logprobs is the sum of ref_token_logprobs over the unmasked tokens",
                received=problem,
                remedy="score the reference again",
                **dataset.location(row_group, "ref_token_logprobs").of_row(table, row),
            )


def _sum_problem(group: Group, logprobs: Sequence[npt.NDArray[np.float32]]) -> str | None:
    """The problem with the per-token log-probs of a group, or None."""
    assert group.ref_seq_logprobs is not None
    # A response that a reference of a selection leaves out has NaN, and no token log-probs.
    scored = ~np.isnan(group.ref_seq_logprobs)
    expected_lengths = [n * int(ok) for n, ok in zip(group.response_lengths, scored, strict=True)]
    if [len(values) for values in logprobs] != expected_lengths:
        return f"{[len(v) for v in logprobs]} log-probs for {expected_lengths} tokens"
    for index, values in enumerate(logprobs):
        if not scored[index]:
            continue
        counting = values if group.loss_mask is None else values[group.loss_mask[index]]
        total = float(np.sum(counting, dtype=np.float64))
        expected = float(group.ref_seq_logprobs[index])
        # Also true if the sum is NaN.
        if not abs(total - expected) <= _SUM_TOLERANCE * len(values):
            return f"{expected}, but the tokens sum to {total}, in response {index}"
    return None
