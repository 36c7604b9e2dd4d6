"""A partial reward of the dataset: what it lacks is scored, what it has is copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from gvpo_offline.errors import ConfigError
from gvpo_offline.group import FloatArray
from gvpo_offline.hashing import sha256_json
from gvpo_offline.rewards.cases import ScoringInput, ScoringInputReader
from gvpo_offline.rewards.kinds import ScorerSettings
from gvpo_offline.rewards.weighted import ScoredGroup
from gvpo_offline.store.arrow import column_array, split_list, split_nested_list
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.manifest import BaseFile, RewardFamily
from gvpo_offline.store.sidecar_choice import WeightedReward

# Scorers whose number of a response does not depend on the others of its group. A function gets all
# completions of a group, and may compare them.
_BY_RESPONSE = {"exact", "numeric", "math", "model", "judge", "verl"}
_DIGITS = 12


class HeldRewards:
    """The numbers that a partial reward has.

    Args:
        dataset: the dataset.
        family: the reward.
        settings: of its scorers.
    """

    def __init__(
        self, dataset: GroupDataset, family: RewardFamily, settings: Mapping[str, ScorerSettings]
    ) -> None:
        self.family = family
        self._dataset = GroupDataset(
            dataset.folder.resolve(), dataset.manifest, [WeightedReward(family)]
        )
        self._by_response = all(own.kind in _BY_RESPONSE for own in settings.values())

    @property
    def name(self) -> str:
        """Identifies what it lacks."""
        files = [sidecar.file.sha256 for sidecar in self.family.files]
        return f"missing-{sha256_json(files)[:_DIGITS]}"

    def incomplete_files(self, files: Sequence[BaseFile]) -> list[BaseFile]:
        """The groups files with a response that it has no number of."""
        counts = {own.base_sha256: own.missing_responses for own in self.family.files}
        return [base for base in files if counts[base.sha256]]

    def items(self, row_group: int) -> list[npt.NDArray[np.int64]]:
        """The indices of the responses of every row that are scored."""
        rewards, _ = self._read(row_group)
        absent = [np.isnan(own) for own in rewards]
        if self._by_response:
            return [np.flatnonzero(own) for own in absent]
        return [np.arange(len(own) * bool(own.any())) for own in absent]

    def rows(
        self, row_group: int, groups: Sequence[ScoringInput], scored: Sequence[ScoredGroup]
    ) -> tuple[list[str], list[FloatArray], list[FloatArray]]:
        """Ids, (k,) rewards and (C, k) components of every row, with the new numbers of `groups`.

        Args:
            row_group: its number.
            groups: what `PartReader` read of it.
            scored: their numbers, in order.
        """
        rewards, components = self._read(row_group)
        table = self._dataset.table(row_group, ["group_id"])
        ids: list[str] = table.column("group_id").to_pylist()
        rows = {name: row for row, name in enumerate(ids)}
        items = self.items(row_group)
        for group, own in zip(groups, scored, strict=True):
            row = rows[group.group_id]
            rewards[row][items[row]] = own.total
            components[row][:, items[row]] = own.components
        return ids, rewards, components

    def _read(self, row_group: int) -> tuple[list[FloatArray], list[FloatArray]]:
        table = self._dataset.table(row_group, ["rewards", "components"])
        rewards = [np.array(own) for own in split_list(column_array(table, "rewards"))]
        n_parts = len(self.family.components)
        parts = (
            split_nested_list(column_array(table, "components"))
            if "components" in table.column_names
            else [None] * len(rewards)
        )
        components = [
            np.full((n_parts, len(own)), np.nan) if of_row is None else np.array(list(of_row))
            for own, of_row in zip(rewards, parts, strict=True)
        ]
        return rewards, components


class PartReader(ScoringInputReader):
    """Reads the responses of a dataset that a partial reward lacks, and their groups.

    Args:
        reader: reads whole groups.
        held: the partial reward.
    """

    def __init__(self, reader: ScoringInputReader, held: HeldRewards) -> None:
        self._reader = reader
        self._held = held

    def read(self, row_group: int) -> list[ScoringInput]:
        """As `ScoringInputReader.read`, but groups with nothing to score are left out."""
        items = self._held.items(row_group)
        if not any(map(len, items)):
            return []
        groups = self._reader.read(row_group)
        return [
            group if len(own) == group.size else group.only(own.tolist())
            for group, own in zip(groups, items, strict=True)
            if len(own)
        ]


def held_rewards(
    dataset: GroupDataset,
    name: str,
    described: dict[str, object],
    settings: Mapping[str, ScorerSettings],
) -> HeldRewards | None:
    """The partial reward of the dataset with a name and a configuration.

    None if the dataset has no reward of that name.

    Raises:
        ConfigError: it has rewards of that name, of other configurations alone.
    """
    own = [family for family in dataset.manifest.rewards if family.name == name]
    for family in own:
        if family.config == described:
            return HeldRewards(dataset, family, settings) if family.partial else None
    if not own:
        return None
    raise ConfigError(
        "only_missing adds to a reward that the dataset has, by the same scorers with the same "
        "settings, code and weights",
        received=f"another configuration than that of "
        f"{', '.join(f'{family.name}@{family.version}' for family in own)}",
        remedy="use the settings of that reward, or leave only_missing out to score every response "
        "as a new version; a reward that an import took from a log is completed by a log alone",
        file=dataset.root,
    )
