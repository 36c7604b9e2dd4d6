"""Which groups train and which are held out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gvpo_offline.hashing import splitmix64, text_keys
from gvpo_offline.schema import split_list
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.stream.order import Selection

# Shards are ordered by the plain hash of the id; without this the held-out groups would be the
# first ones of the dataset.
_HELD_OUT_KEY = np.uint64(0x48454C444F555421)


def held_out_mask(group_ids: list[str], fraction: float) -> npt.NDArray[np.bool_]:
    """Which groups belong to the held-out `fraction`: (n,) bool, by a hash of the id alone.

    The same group is held out in every run, whatever its seed, and in every later version of the
    dataset.
    """
    hashes = splitmix64(text_keys(group_ids) ^ _HELD_OUT_KEY)
    return np.asarray(hashes.astype(np.float64) < fraction * 2.0**64)


def select(
    dataset: GroupDataset,
    *,
    eval_fraction: float = 0.0,
    held_out: bool = False,
    drop_equal_rewards: bool = False,
) -> Selection | None:
    """The groups of a dataset to train on, or (`held_out`) those kept for evaluation.

    Returns:
        None where that is all of them.
    """
    if eval_fraction == 0.0 and not drop_equal_rewards:
        return None
    sizes = dataset.row_group_sizes

    def mask_of(row_group: int) -> npt.NDArray[np.bool_]:
        columns = ["group_id", "rewards"] if drop_equal_rewards else ["group_id"]
        table = dataset.table(row_group, columns)
        mask = np.ones(table.num_rows, dtype=bool)
        if eval_fraction:
            mask = held_out_mask(table.column("group_id").to_pylist(), eval_fraction) == held_out
        if drop_equal_rewards:
            mask &= _unequal(table)
        return mask

    return Selection(sizes, mask_of)


def _unequal(table: pa.Table) -> npt.NDArray[np.bool_]:
    column = table.column("rewards").combine_chunks()
    lists = split_list(column.chunk(0) if isinstance(column, pa.ChunkedArray) else column)
    return np.array([row.max() > row.min() for row in lists], dtype=bool)
