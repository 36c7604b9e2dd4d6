"""The rewards and references of merged datasets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from gvpo_offline.hashing import sha256_json
from gvpo_offline.store.manifest import Manifest, ReferenceFamily, RewardFamily
from gvpo_offline.store.schema import Column


@dataclass(eq=False)
class Family:
    """A reward or reference that all merged datasets have, or of which what they have is kept.

    Attributes:
        label: name in messages.
        columns: columns of its sidecars, without `group_id`.
        members: the family in the manifest of each dataset; without files where it has none.
        partial: whether responses may have no number, apart from those that a reference of a
            selection leaves out.
    """

    label: str
    columns: tuple[Column, ...]
    members: tuple[RewardFamily | ReferenceFamily, ...]
    partial: bool = False

    @property
    def selects(self) -> bool:
        """Whether it is a reference of a selection of the responses."""
        first = self.members[0]
        return isinstance(first, ReferenceFamily) and first.selection is not None

    def gaps(self, sizes: Sequence[int]) -> dict[str, pa.Array]:
        """Its columns for groups without numbers: NaN, and no log-probs of tokens.

        Args:
            sizes: (n,) responses of each group.
        """
        first = self.members[0]
        n_parts = len(first.components) if isinstance(first, RewardFamily) else 0
        values: dict[str, list[Any]] = {
            "rewards": [[math.nan] * k for k in sizes],
            "components": [[[math.nan] * k] * n_parts if n_parts else None for k in sizes],
            "ref_seq_logprobs": [[math.nan] * k for k in sizes],
            "ref_token_logprobs": [[[]] * k for k in sizes],
        }
        return {self.field(c.name): pa.array(values[c.name], c.type) for c in self.columns}

    def field(self, name: str) -> str:
        """The name of one of its columns in a table with the columns of several families."""
        return f"{self.label}/{name}"

    @property
    def folder(self) -> str:
        """The folder of the first dataset's sidecars, relative to that dataset.

        Of the first that has some: a dataset of incomplete groups alone has none.
        """
        found = next((member.files[0] for member in self.members if member.files), None)
        if found is not None:
            return str(Path(found.file.path).parent)
        assert isinstance(self.members[0], RewardFamily)  # a reference has sidecars somewhere
        return f"rewards/{self.members[0].name}"


def families_of(manifest: Manifest) -> dict[tuple[str, str], RewardFamily | ReferenceFamily]:
    """A dataset's families, by their keys."""
    families: list[RewardFamily | ReferenceFamily] = [*manifest.rewards, *manifest.references]
    return {_key(family): family for family in families}


def _key(family: RewardFamily | ReferenceFamily) -> tuple[str, str]:
    """Label and a hash of a family; the same family has the same key everywhere."""
    if isinstance(family, ReferenceFamily):
        return family_label(family), family.fingerprint
    described = family.model_dump(mode="json", exclude={"files", "partial"})
    return family_label(family), sha256_json(described)


def family_label(family: RewardFamily | ReferenceFamily) -> str:
    """The name of a family in messages."""
    if isinstance(family, ReferenceFamily):
        return f"reference {family.fingerprint[:12]}"
    return f"reward {family.name}@{family.version}"


def same_family(one: RewardFamily | ReferenceFamily, other: RewardFamily | ReferenceFamily) -> bool:
    """Whether two datasets' entries are of one family; see `common_families`."""
    return _key(one) == _key(other)
