"""What a run sees of a dataset: some of its groups."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from gvpo_offline.schema import Group
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.survey import LightRows, Survey, light_table, survey
from gvpo_offline.stream.order import GroupOrder, Selection


@dataclass(frozen=True)
class View:
    """Some groups of a dataset.

    Attributes:
        dataset: groups with rewards and one reference.
        selection: those that take part; None: all.
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
        """All groups of a row group, whether they take part or not: rows keep their numbers."""
        return self.dataset.groups(row_group)

    def light_table(self, row_group: int) -> LightRows:
        """The light columns of what takes part in a row group, and its rows (None: all)."""
        table = light_table(self.dataset, row_group)
        if self.selection is None:
            return table, None
        rows = self.selection.rows(row_group)
        return table.take(pa.array(rows)), rows

    def survey(self) -> Survey:
        """Counts over what takes part."""
        return survey(self.dataset, self.light_table)
