"""Check every group of a dataset against the rules, one row group at a time.

Memory: one row group, and eight bytes per group of the dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from gvpo_offline.errors import DataError
from gvpo_offline.group import Group
from gvpo_offline.hashing import text_keys
from gvpo_offline.rules import check_group
from gvpo_offline.store.arrow import column_array, groups_from_table, prompt_hashes
from gvpo_offline.store.columns import check_logprobs
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.row_groups import PrefetchedRowGroups

_LENGTHS = ("n_tokens", "prompt_length", "response_lengths")
_STORED = (*_LENGTHS, "prompt_hash")
Progress = Callable[[Iterable[int]], Iterable[int]]


def check_groups(
    dataset: GroupDataset,
    columns: Sequence[str],
    *,
    vocab_size: int | None = None,
    progress: Progress | None = None,
    incomplete: bool = False,
) -> None:
    """Check `columns`, the stored lengths and prompt hashes of every group, and that group ids are
    unique.

    Args:
        dataset: the dataset.
        columns: those that are checked.
        vocab_size: number of token ids, if known.
        progress: wraps the row group numbers.
        incomplete: whether the groups are incomplete ones, of one response.

    Raises:
        DataError: naming file, row and group.
        IntegrityError: a file is damaged.
    """
    numbers: Iterable[int] = PrefetchedRowGroups(dataset, [*columns, *_STORED])
    keys = [np.zeros(0, np.uint64)]
    for row_group in progress(numbers) if progress else numbers:
        table = dataset.table(row_group, [*columns, *_STORED])
        location = dataset.location(row_group)
        groups = groups_from_table(table)
        for row, group in enumerate(groups):
            check_group(
                group,
                file=location.file,
                row=location.first_row + row,
                vocab_size=vocab_size,
                incomplete=incomplete,
            )
        check_logprobs(table, column_array(table, "response_token_ids"), location)
        for name in _LENGTHS:
            if name in table.column_names:
                _check_lengths(table, name, groups, location.of_row)
        if "prompt_hash" in table.column_names:
            _check_prompt_hashes(table, location.of_row)
        keys.append(text_keys(group.group_id for group in groups))
    # 64-bit hashes of the ids save memory; a collision is improbable at any dataset size here.
    values, counts = np.unique(np.concatenate(keys), return_counts=True)
    if (counts > 1).any():
        _raise_duplicate(dataset, int(values[counts > 1][0]))


def _check_lengths(
    table: pa.Table,
    name: str,
    groups: Sequence[Group],
    location_of: Callable[[pa.Table, int], dict[str, Any]],
) -> None:
    stored = table.column(name).to_pylist()
    for row, (group, value) in enumerate(zip(groups, stored, strict=True)):
        actual = len(group.prompt_token_ids) if name == "prompt_length" else getattr(group, name)
        if value is not None and value != actual:
            raise DataError(
                f"{name} is the number of tokens of the group",
                received=f"{value}, but the tokens number {actual}",
                remedy=f"correct the column {name}, or leave it out",
                **location_of(table, row),
            )


def _check_prompt_hashes(
    table: pa.Table, location_of: Callable[[pa.Table, int], dict[str, Any]]
) -> None:
    actual = prompt_hashes(column_array(table, "prompt_token_ids")).tolist()
    stored = table.column("prompt_hash").to_pylist()
    for row, (value, own) in enumerate(zip(stored, actual, strict=True)):
        if value is not None and value != own:
            raise DataError(
                "prompt_hash is the hash of the prompt's token ids (schemas/groups.schema.json)",
                received=f"{value} instead of {own}",
                remedy="correct the column prompt_hash, or leave it out",
                **location_of(table, row),
            )


def _raise_duplicate(dataset: GroupDataset, duplicate: int) -> None:
    first: dict[str, Any] | None = None
    for row_group in range(dataset.n_row_groups):
        table = dataset.table(row_group, ["group_id"])
        for row in np.flatnonzero(text_keys(table.column("group_id").to_pylist()) == duplicate):
            location = dataset.location(row_group).of_row(table, int(row))
            if first is not None:
                raise DataError(
                    "a group id occurs once in a dataset",
                    received=f"the same id in {first['file']}, row {first['row']}",
                    remedy="merge the rows into one group, or give them different ids",
                    **location,
                )
            first = location
