"""What a run sees of a dataset: some of its groups, with some of their responses."""

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
    """Some groups of a dataset, with some of their responses.

    Attributes:
        dataset: groups with rewards and one reference.
        selection: those that take part, and with which responses; None: all, whole.
        name: what metrics and messages call it; "" where there is one dataset.
    """

    dataset: GroupDataset
    selection: Selection | None = None
    name: str = ""

    @property
    def n_groups(self) -> int:
        """Groups that take part."""
        return self.dataset.n_groups if self.selection is None else self.selection.n_groups

    @property
    def fingerprint(self) -> str | None:
        """SHA-256 of what takes part; None: everything."""
        return None if self.selection is None else self.selection.fingerprint

    @property
    def notes(self) -> tuple[str, ...]:
        """What came of the conditions on what takes part, in lines for people."""
        return () if self.selection is None else self.selection.notes

    def order(self, *, seed: int, window: int, shuffle: bool = True) -> GroupOrder:
        """The endless sequence of its groups; see `GroupOrder`."""
        return GroupOrder(
            self.dataset.row_group_sizes,
            seed=seed,
            window=window,
            selection=self.selection,
            shuffle=shuffle,
        )

    def groups(self, row_group: int) -> list[Group]:
        """All groups of a row group, whether they take part or not: rows keep their numbers.

        Those that do have the responses that do.
        """
        groups = self.dataset.groups(row_group)
        if self.selection is None or self.selection.responses is None:
            return groups
        return with_responses(groups, self.selection.responses)

    def summary_table(self, row_group: int) -> SummaryRows:
        """The summary columns of what takes part in a row group, and its rows (None: all)."""
        table = summary_table(self.dataset, row_group)
        if self.selection is None:
            return table, None
        rows = self.selection.rows(row_group)
        table = table.take(pa.array(rows))
        if self.selection.responses is not None:
            table = take_all_columns(table, choose(table, self.selection.responses))
        return table, rows

    def survey(self, part: slice = slice(None)) -> Survey:
        """Counts over what takes part, in all row groups or in a part of them."""
        return survey(self.dataset, self.summary_table, part=part)
