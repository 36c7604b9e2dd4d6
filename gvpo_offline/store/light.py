"""The light columns of a row group: what a group is like, without its tokens."""

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


def light_columns(dataset: GroupDataset, row_group: int, columns: Sequence[str]) -> pa.Table:
    """Some columns of a row group, whole even where a file does not store them.

    A foreign file may lack lengths, samplers and sources, in some rows or in all; they are then
    made out from its groups, which is right, and slow for the lengths.

    Args:
        dataset: where from.
        row_group: its number.
        columns: those of `_DERIVED`, rewards and reference log-probs where joined, metadata.

    Returns:
        The columns, and `group_id`.

    Raises:
        IntegrityError, DataError: as `GroupDataset.table`; rewards and reference log-probs are held
            against the lengths whether those were asked for or not.
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
