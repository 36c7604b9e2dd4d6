"""Which responses a reference is scored for: the selection of training, and its manifest entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gvpo_offline.errors import ConfigError
from gvpo_offline.group import Group
from gvpo_offline.identity import identity_settings
from gvpo_offline.reference.settings import ReferenceConfig
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.manifest import ReferenceFamily
from gvpo_offline.store.reference_selection import ReferenceSelection
from gvpo_offline.store.row_groups import summary_columns
from gvpo_offline.store.sidecar_choice import WeightedReward, choose_reward_families
from gvpo_offline.stream.selecting.columns import COLUMNS
from gvpo_offline.stream.selecting.predicate import parse
from gvpo_offline.stream.selecting.responses import choose, keeps_all_responses
from gvpo_offline.stream.selecting.select import select
from gvpo_offline.stream.view import DatasetView

Items = npt.NDArray[np.int64]


def selected_view(dataset: GroupDataset, config: ReferenceConfig) -> DatasetView:
    """The groups and responses to score: those that `train` selects with the same settings.

    Returns:
        A view of the dataset, joined with a reward if the selection refers to one.

    Raises:
        ConfigError: as `select`; or `where` or `responses` refers to a reward that the dataset does
            not have.
    """
    if config.where is not None and not isinstance(config.where, str):
        raise ConfigError(
            "the where of a reference is an SQL condition, which the manifest records",
            received=f"a {type(config.where).__name__}",
            remedy="write it as SQL: docs/howto/selecting.md has a table",
        )
    if config.where is None and keeps_all_responses(config.responses):
        return DatasetView(dataset)
    rewards: Sequence[WeightedReward] = ()
    if _refers_to_rewards(config):
        rewards = choose_reward_families(dataset.manifest, config.reward, file=dataset.root)
    joined = GroupDataset(dataset.storage, dataset.manifest, rewards)
    selection = select(joined, where=config.where, responses=config.responses)
    return DatasetView(joined, selection)


def _refers_to_rewards(config: ReferenceConfig) -> bool:
    if config.responses.prefer == "spread":
        return True
    names = [] if config.where is None else parse(config.where).meta.root_names()
    return any("rewards" in COLUMNS.get(name, ()) for name in names)


def described_selection(view: DatasetView, config: ReferenceConfig) -> ReferenceSelection | None:
    """The selection as the manifest records it; None: every response."""
    if view.selection is None:
        return None
    weights = {f"{r.family.name}@{r.family.version}": r.weight for r in view.dataset.rewards}
    reward: dict[str, float] | str | None = weights or None
    if list(weights.values()) == [1.0]:
        (reward,) = weights
    responses = identity_settings(config.responses)
    return ReferenceSelection(where=config.where, responses=responses, reward=reward)


def covers(view: DatasetView, reference: ReferenceFamily) -> bool:
    """Whether a reference of the dataset has a log-prob of every response of a view."""
    if reference.selection is None and not reference.partial:
        return True
    if view.selection is None and reference.selection is not None:
        return False
    dataset = view.dataset
    joined = GroupDataset(dataset.storage, dataset.manifest, dataset.rewards, reference)
    return DatasetView(joined, view.selection).survey().unscored_responses == 0


@dataclass(frozen=True)
class SelectedGroups:
    """The rows of a row group, and the groups of it that are scored.

    Attributes:
        ids: (n,) the id of every row.
        sizes: (n,) int64, responses of every row, also those that are not selected.
        rows: (m,) int64, the rows with selected responses, ascending.
        groups: (m,) these rows as groups, with their selected responses alone.
        items: (m,) for each of them the indices of its selected responses, ascending.
    """

    ids: list[str]
    sizes: Items
    rows: Items
    groups: list[Group]
    items: list[Items]

    @classmethod
    def read(cls, view: DatasetView, row_group: int) -> SelectedGroups:
        """Read a row group; tokens are read only if a row of it is selected."""
        dataset, selection = view.dataset, view.selection
        if selection is None:
            groups = view.groups(row_group)
            sizes = np.array([group.group_size for group in groups], np.int64)
            ids = [group.group_id for group in groups]
            return cls(ids, sizes, np.arange(len(ids)), groups, [np.arange(k) for k in sizes])
        names = ["samplers", "response_lengths", *(["rewards"] if dataset.rewards else [])]
        table = summary_columns(dataset, row_group, names)
        sizes = pc.list_value_length(table.column("response_lengths")).to_numpy().astype(np.int64)
        rows = selection.rows(row_group)
        items = [np.arange(sizes[row]) for row in rows]
        if selection.responses is not None:
            index = choose(table.take(pa.array(rows)), selection.responses)
            items = np.split(index.items, index.starts[1:])
        found = view.groups(row_group) if len(rows) else []
        ids = table.column("group_id").to_pylist()
        return cls(ids, sizes, rows, [found[row] for row in rows], items)

    def without(self, scored: list[npt.NDArray[np.bool_]]) -> SelectedGroups:
        """The selected responses without a flag, of (k,) flags of every row."""
        rows, groups, items = [], [], []
        for row, group, own in zip(self.rows, self.groups, self.items, strict=True):
            left = np.flatnonzero(~scored[row][own])
            if len(left):
                rows.append(int(row))
                items.append(own[left])
                groups.append(group if len(left) == len(own) else chosen_responses(group, left))
        return SelectedGroups(self.ids, self.sizes, np.array(rows, np.int64), groups, items)


def chosen_responses(group: Group, items: Items) -> Group:
    """A group with some of its responses, by their indices, for a forward pass."""
    mask = group.loss_mask
    return replace(
        group,
        response_token_ids=tuple(group.response_token_ids[i] for i in items),
        samplers=tuple(group.samplers[i] for i in items),
        truncated=tuple(group.truncated[i] for i in items),
        loss_mask=None if mask is None else tuple(mask[i] for i in items),
        rewards=None,
        components=None,
        ref_seq_logprobs=None,
        sampler_seq_logprobs=None,
        responses=None,
        response_ids=None,
        response_messages=None,
    )
