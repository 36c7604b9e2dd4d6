"""Finds the groups to show, and reads them with every reward and reference.

Reads only what it needs: the ids or the columns of a predicate until enough groups are found, and
all columns of the row groups that hold these groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from gvpo_offline.commands.settings import ShowConfig
from gvpo_offline.errors import ConfigError
from gvpo_offline.group import FloatArray, Group
from gvpo_offline.rules import check_group
from gvpo_offline.store.adopt import adopt_parquet
from gvpo_offline.store.arrow import groups_from_table
from gvpo_offline.store.dataset import GroupDataset, open_dataset
from gvpo_offline.store.location import is_url, local_path
from gvpo_offline.store.manifest import ReferenceFamily
from gvpo_offline.store.row_groups import PrefetchedRowGroups
from gvpo_offline.store.schema import GROUPS_COLUMNS
from gvpo_offline.store.sidecar_choice import (
    WeightedReward,
    choose_reference_family,
    choose_reward_families,
)
from gvpo_offline.stream.selecting.columns import COLUMNS
from gvpo_offline.stream.selecting.predicate import parse
from gvpo_offline.stream.selecting.where import nothing_selected, predicate_masks

_NAMED = 5  # groups that an error about a prefix of several ids names
_ALL_COLUMNS = tuple(column.name for column in GROUPS_COLUMNS)


@dataclass(frozen=True)
class ShownReward:
    """One reward of a group's k responses.

    Attributes:
        values: (k,) float64.
        components: (k,) float64 of each named part, NaN where a response has no such part.
    """

    values: FloatArray
    components: dict[str, FloatArray] = field(default_factory=dict)


@dataclass(frozen=True)
class ShownGroup:
    """A group, where it is stored, and all that is known of its responses.

    Attributes:
        group: with all columns of the groups file.
        file: path or URL of its groups file.
        row: its row in the file, from 0.
        rewards: rewards by label.
        references: (k,) float64 log-probs in nats by label; NaN where a response was not scored.
    """

    group: Group
    file: str
    row: int
    rewards: dict[str, ShownReward]
    references: dict[str, FloatArray]


class ShownDataset:
    """A dataset, opened with the rewards and references to show.

    Args:
        config: the settings.

    Raises:
        DataError, ConfigError, IntegrityError: as `open_dataset`; a file lacks required columns.
    """

    def __init__(self, config: ShowConfig) -> None:
        path = config.dataset
        self.config = config
        if not is_url(path) and local_path(path).is_file():
            opened = adopt_parquet([local_path(path)], checked=False)
            self.is_dataset = False
        else:
            opened = open_dataset(
                path, version=config.dataset_version, join=(), remote=config.remote
            )
            self.is_dataset = True
        self.manifest = opened.manifest
        self.storage = opened.storage
        self.rewards = dict(self._rewards(path))
        self.references = dict(self._references(path))
        # A file of another program may lack the lengths; rewards are then compared with the tokens.
        self.base = self._joined(
            next(iter(self.rewards.values()), ()), next(iter(self.references.values()), None)
        )

    def _joined(
        self, rewards: Sequence[WeightedReward] = (), reference: ReferenceFamily | None = None
    ) -> GroupDataset:
        return GroupDataset(self.storage, self.manifest, rewards, reference)

    def _rewards(self, path: str | Path) -> Iterator[tuple[str, Sequence[WeightedReward]]]:
        """The chosen reward, or each reward in its newest version, by its label."""
        choice = self.config.reward
        if choice is not None:
            chosen = choose_reward_families(self.manifest, choice, file=path)
            label = " + ".join(
                f"{r.family.name}@{r.family.version}"
                if r.weight == 1
                else f"{r.weight:g} * {r.family.name}@{r.family.version}"
                for r in chosen
            )
            yield label, chosen
            return
        for name in dict.fromkeys(family.name for family in self.manifest.rewards):
            (chosen_one,) = choose_reward_families(self.manifest, name, file=path)
            yield f"{name}@{chosen_one.family.version}", [chosen_one]

    def _references(self, path: str | Path) -> Iterator[tuple[str, ReferenceFamily]]:
        if self.config.reference is not None:
            family = choose_reference_family(self.manifest, self.config.reference, file=path)
            yield family.fingerprint[:12], family
            return
        for family in self.manifest.references:
            yield family.fingerprint[:12], family

    # ---- which groups ----

    def groups(self) -> Iterator[ShownGroup]:
        """The groups of the settings, in stored order.

        Raises:
            ConfigError: there is no group of that id, or the predicate is true for none.
            DataError: a group breaks a rule.
            IntegrityError: a file is damaged.
        """
        left = self.config.rows
        for row_group, rows in self._places():
            taken = rows[:left]
            yield from self._read(row_group, taken)
            left -= len(taken)
            if not left:
                return

    def _places(self) -> Iterator[tuple[int, list[int]]]:
        if self.config.group is not None:
            yield self._place_of(self.config.group)
        elif self.config.where is not None:
            yield from self._selected(self.config.where)
        else:
            for row_group, size in enumerate(self.base.row_group_sizes.tolist()):
                yield row_group, list(range(size))

    def _place_of(self, group_id: str) -> tuple[int, list[int]]:
        """Row group and row of the group with an id, or with the only id that begins so."""
        similar: list[tuple[str, int, int]] = []
        for row_group in PrefetchedRowGroups(self.base, ["group_id"]):
            ids = self.base.table(row_group, ["group_id"]).column("group_id").to_pylist()
            for row, found in enumerate(ids):
                if found == group_id:
                    return row_group, [row]
                if found.startswith(group_id) and len(similar) <= _NAMED:
                    similar.append((found, row_group, row))
        if len(similar) == 1:
            return similar[0][1], [similar[0][2]]
        names = ", ".join(repr(found) for found, _, _ in similar[:_NAMED])
        more = " and others" if len(similar) > _NAMED else ""
        raise ConfigError(
            "group is the id of a group of the dataset, or the beginning of a single id",
            received=f"{group_id!r}, with which {names}{more} begin"
            if similar
            else f"{group_id!r}, which is the id of none of {self.base.n_groups:,} groups",
            remedy="give more of the id" if similar else "leave group out to see the first groups",
            file=self.base.root,
        )

    def _selected(self, where: str) -> Iterator[tuple[int, list[int]]]:
        names = parse(where).meta.root_names()
        if len(self.rewards) > 1 and any("rewards" in COLUMNS.get(name, ()) for name in names):
            choose_reward_families(self.manifest, None, file=self.base.root)  # raises: which one?
        if len(self.references) > 1 and "ref_seq_logprobs" in names:
            choose_reference_family(self.manifest, None, file=self.base.root)
        n_selected = n_null = 0
        for row_group, (mask, null) in enumerate(predicate_masks(self.base, where)):
            rows = np.flatnonzero(mask).tolist()
            n_selected += len(rows)
            n_null += null
            if rows:
                yield row_group, rows
        if not n_selected:
            raise nothing_selected(where, self.base.n_groups, n_null, self.base.root)

    # ---- reading ----

    def _read(self, row_group: int, rows: list[int]) -> Iterator[ShownGroup]:
        """Some groups of a row group, checked against the rules."""
        taken = pa.array(rows, pa.int64())

        def read(dataset: GroupDataset, *columns: str) -> list[Group]:
            return groups_from_table(dataset.table(row_group, columns).take(taken))

        groups = read(self.base, *_ALL_COLUMNS, "rewards", "components", "ref_seq_logprobs")
        rewards = dict.fromkeys(self.rewards, groups)
        for label, families in list(self.rewards.items())[1:]:
            joined = self._joined(families)
            rewards[label] = read(joined, "rewards", "components", "response_lengths")
        references = dict.fromkeys(self.references, groups)
        for label, family in list(self.references.items())[1:]:
            joined = self._joined((), family)
            references[label] = read(joined, "ref_seq_logprobs", "response_lengths")
        location = self.base.location(row_group)
        for number, (row, group) in enumerate(zip(rows, groups, strict=True)):
            place = location.first_row + row
            # What is joined was checked as it was read; it may have gaps.
            own = replace(group, rewards=None, components=None, ref_seq_logprobs=None)
            check_group(own, file=location.file, row=place)
            yield ShownGroup(
                group,
                str(location.file),
                place,
                {label: self._reward(label, of[number]) for label, of in rewards.items()},
                {label: _floats(of[number].ref_seq_logprobs) for label, of in references.items()},
            )

    def _reward(self, label: str, group: Group) -> ShownReward:
        families = self.rewards[label]
        names = families[0].family.components if len(families) == 1 else []
        parts = group.components
        named = {} if parts is None else dict(zip(names, parts, strict=True))
        return ShownReward(_floats(group.rewards), named)


def _floats(values: FloatArray | None) -> FloatArray:
    assert values is not None  # the column was joined
    return values
