"""Which groups train and which are held out, and with which of their responses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.light import summary_columns
from gvpo_offline.store.passes import PrefetchedRowGroups
from gvpo_offline.stream.order import Selection
from gvpo_offline.stream.selecting.conditions import (
    Condition,
    HeldOut,
    Responses,
    Rows,
    UnequalRewards,
    Where,
)
from gvpo_offline.stream.selecting.responses import takes_all
from gvpo_offline.stream.settings import ResponseSettings

if TYPE_CHECKING:
    import polars as pl

_ALL = ResponseSettings()


def select(
    dataset: GroupDataset,
    *,
    where: str | pl.Expr | None = None,
    responses: ResponseSettings = _ALL,
    eval_fraction: float = 0.0,
    held_out: bool = False,
    drop_equal_rewards: bool = False,
) -> Selection | None:
    """The groups of a dataset to train on, or (`held_out`) those kept for evaluation.

    A function of its arguments and the dataset's content alone. The result is small and can be
    pickled, so one process can resolve it for all.

    Args:
        dataset: with rewards where a condition needs them.
        where: only groups for which this holds; see docs/howto/selecting.md. It is asked of groups
            as they are stored, before any of their responses are left out.
        responses: which of their responses take part; a group that is left with fewer than two
            falls out.
        eval_fraction, held_out: of those, the groups that are held out, or all others.
        drop_equal_rewards: leave out groups whose remaining responses all have one reward.

    Returns:
        None where that is all groups, whole.

    Raises:
        ConfigError: the predicate breaks a rule of `truths`, or it or `responses` leave nothing.
        DataError, IntegrityError: as `GroupDataset.table`.
    """
    chosen = None if takes_all(responses) else Responses(dataset, responses)
    conditions: list[Condition] = []
    if where is not None:
        conditions.append(Where(dataset, where))
    if eval_fraction:
        conditions.append(HeldOut(eval_fraction, held_out=held_out))
    if chosen is not None:
        conditions.append(chosen)
    if drop_equal_rewards:
        conditions.append(UnequalRewards(dataset))
    if not conditions:
        return None
    selection = _fulfilling(dataset, conditions)
    if chosen is not None:
        selection.responses, selection.responses_sha256 = chosen.settings, chosen.sha256
    return selection


def _fulfilling(dataset: GroupDataset, conditions: list[Condition]) -> Selection:
    """The groups that fulfil all conditions, in one pass over what they look at."""
    columns = sorted({name for condition in conditions for name in condition.columns})

    def mask_of(row_group: int) -> npt.NDArray[np.bool_]:
        size = int(dataset.row_group_sizes[row_group])
        if columns:
            rows = Rows.whole(row_group, summary_columns(dataset, row_group, columns))
        else:  # a predicate reads for itself
            rows = Rows.whole(row_group, pa.table({"row": np.arange(size)}))
        for condition in conditions:
            rows = condition.keep(rows)
        mask = np.zeros(size, dtype=bool)
        mask[rows.numbers] = True
        return mask

    numbers = PrefetchedRowGroups(dataset, [*columns, "response_lengths"]) if columns else None
    selection = Selection(dataset.row_group_sizes, mask_of, numbers)
    notes = [condition.note() for condition in conditions]
    selection.notes = tuple(note for note in notes if note is not None)
    return selection
