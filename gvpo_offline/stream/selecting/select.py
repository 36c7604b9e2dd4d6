"""Selection of training groups and held-out groups, and of their responses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.row_groups import PrefetchedRowGroups, summary_columns
from gvpo_offline.stream.order import Selection
from gvpo_offline.stream.selecting.conditions import (
    Condition,
    HeldOutCondition,
    ResponseCondition,
    SelectedRows,
    UnequalRewardsCondition,
    WhereCondition,
)
from gvpo_offline.stream.selecting.responses import keeps_all_responses
from gvpo_offline.stream.settings import HeldOutRule, ResponseSettings

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
    held_out_by: HeldOutRule = "prompt",
    drop_equal_rewards: bool = False,
) -> Selection | None:
    """The groups of a dataset to train on, or (`held_out`) those kept for evaluation.

    A function of its arguments and the dataset's content alone. The result is small and can be
    pickled, so that one process can compute it for all ranks.

    Args:
        dataset: with rewards if a condition needs them.
        where: only groups for which this is true; see docs/howto/selecting.md. It is evaluated on
            groups with all of their responses.
        responses: which of their responses to use; a group with fewer than two is left out.
        eval_fraction, held_out: of those, the groups that are held out, or all others.
        held_out_by: prompt: all groups of a prompt are on one side, in every dataset; group: each
            group by its id, the rule of runs that began with an earlier version.
        drop_equal_rewards: leave out groups whose selected responses all have one reward.

    Returns:
        The selection; None: all groups with all responses.

    Raises:
        ConfigError: as `predicate_masks`; or the predicate or `responses` leave no group.
        DataError, IntegrityError: as `GroupDataset.table`.
    """
    chosen = None if keeps_all_responses(responses) else ResponseCondition(dataset, responses)
    conditions: list[Condition] = []
    if where is not None:
        conditions.append(WhereCondition(dataset, where))
    if eval_fraction:
        conditions.append(HeldOutCondition(eval_fraction, held_out=held_out, by=held_out_by))
    if chosen is not None:
        conditions.append(chosen)
    if drop_equal_rewards:
        conditions.append(UnequalRewardsCondition(dataset))
    if not conditions:
        return None
    selection = _fulfilling(dataset, conditions)
    if chosen is not None:
        selection.responses, selection.responses_sha256 = chosen.settings, chosen.sha256
    return selection


def _fulfilling(dataset: GroupDataset, conditions: list[Condition]) -> Selection:
    """The groups that fulfil all conditions, in one pass over the columns that these read."""
    columns = sorted({name for condition in conditions for name in condition.columns})

    def mask_of(row_group: int) -> npt.NDArray[np.bool_]:
        size = int(dataset.row_group_sizes[row_group])
        if columns:
            rows = SelectedRows.whole(row_group, summary_columns(dataset, row_group, columns))
        else:  # a predicate reads its own columns
            rows = SelectedRows.whole(row_group, pa.table({"row": np.arange(size)}))
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
