"""The selected groups and responses of a dataset, as a run reads them."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from gvpo_offline.group import Group
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.survey import SummaryRows, Survey, summary_table, survey
from gvpo_offline.stream.order import GroupOrder, Selection
from gvpo_offline.stream.selecting.responses import choose, take_all_columns, with_responses


@dataclass(frozen=True)
class DatasetView:
    """A dataset with a selection of its groups and responses.

    Attributes:
        dataset: groups with rewards and one reference.
        selection: the groups and responses to use; None: all.
        name: its name in metrics and messages; "" for a run's only dataset.
    """

    dataset: GroupDataset
    selection: Selection | None = None
    name: str = ""

    @property
    def n_groups(self) -> int:
        """Number of selected groups."""
        return self.dataset.n_groups if self.selection is None else self.selection.n_groups

    @property
    def fingerprint(self) -> str | None:
        """SHA-256 of the selection; None: everything is selected."""
        return None if self.selection is None else self.selection.fingerprint

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the log: counts of each condition of the selection."""
        return () if self.selection is None else self.selection.notes

    def order(self, *, seed: int, window: int, shuffle: bool = True) -> GroupOrder:
        """The order of its groups in training; see `GroupOrder`."""
        return GroupOrder(
            self.dataset.row_group_sizes,
            seed=seed,
            window=window,
            selection=self.selection,
            shuffle=shuffle,
        )

    def groups(self, row_group: int) -> list[Group]:
        """All groups of a row group, also those that are not selected, so that indices stay rows.

        The selected ones have only their selected responses.
        """
        groups = self.dataset.groups(row_group)
        if self.selection is None or self.selection.responses is None:
            return groups
        return with_responses(groups, self.selection.responses)

    def summary_table(self, row_group: int) -> SummaryRows:
        """The summary columns of a row group's selected groups, and their rows (None: all)."""
        table = summary_table(self.dataset, row_group)
        if self.selection is None:
            return table, None
        rows = self.selection.rows(row_group)
        table = table.take(pa.array(rows))
        if self.selection.responses is not None:
            table = take_all_columns(table, choose(table, self.selection.responses))
        return table, rows

    def survey(self, part: slice = slice(None)) -> Survey:
        """Counts over the selection, in all row groups or in a slice of them."""
        return survey(self.dataset, self.summary_table, part=part)
