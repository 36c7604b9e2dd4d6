"""The summary columns of a row group: those that describe a group without its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from gvpo_offline.group import Group
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.schema import GROUPS_COLUMNS, arrow_schema

_DERIVED: dict[str, Callable[[Group], Any]] = {
    "source": lambda group: group.source,
    "prompt_length": lambda group: len(group.prompt_token_ids),
    "response_lengths": lambda group: group.response_lengths,
    "samplers": lambda group: group.samplers,
    "truncated": lambda group: group.truncated,
}


def summary_columns(dataset: GroupDataset, row_group: int, columns: Sequence[str]) -> pa.Table:
    """Some columns of a row group, complete even where the file does not store them.

    A file from another program may lack lengths, samplers or sources, in some rows or in all. They
    are then computed from the groups; for the lengths that reads all tokens.

    Args:
        dataset: the dataset.
        row_group: number of the row group.
        columns: those of `_DERIVED`, rewards and reference log-probs where joined, metadata.

    Returns:
        The columns, and `group_id`.

    Raises:
        IntegrityError, DataError: as `GroupDataset.table`; rewards and reference log-probs are
            compared with the response lengths even if those are not among `columns`.
    """
    table = dataset.table(row_group, [*columns, "response_lengths"])
    missing = [
        name
        for name in columns
        if name in _DERIVED and (name not in table.column_names or table.column(name).null_count)
    ]
    if missing:
        table = table.drop_columns([name for name in missing if name in table.column_names])
        groups = dataset.groups(row_group)
        types = arrow_schema(GROUPS_COLUMNS)
        for name in missing:
            values = [_DERIVED[name](group) for group in groups]
            table = table.append_column(name, pa.array(values, types.field(name).type))
    return table.select([name for name in table.column_names if name in {"group_id", *columns}])
