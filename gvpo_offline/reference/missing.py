"""A partial reference of the dataset: what it lacks is scored, what it has is copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gvpo_offline.errors import ConfigError
from gvpo_offline.hashing import sha256_json
from gvpo_offline.reference.selection import SelectedGroups
from gvpo_offline.store.arrow import column_array, split_list, split_nested_list
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.manifest import BaseFile, ReferenceFamily
from gvpo_offline.stream.view import DatasetView

HeldRows = tuple[list[npt.NDArray[np.float64]], list[list[npt.NDArray[np.float32]] | None]]
_DIGITS = 12
# What decides the numbers of a reference, in the words of its manifest entry.
_COMPARED = (
    *("weights_sha256", "dtype", "autocast_dtype", "attn_implementation", "layout"),
    *("tokenizer_fingerprint", "arithmetic", "model_class", "selection"),
)


@dataclass(frozen=True)
class HeldLogprobs:
    """The log-probs that a partial reference has.

    Attributes:
        dataset: joined with the reference.
        family: its manifest entry.
    """

    dataset: GroupDataset
    family: ReferenceFamily

    @property
    def stage_suffix(self) -> str:
        """Part of the name of the stage that scores the others."""
        files = [sidecar.file.sha256 for sidecar in self.family.files]
        return f"missing-{sha256_json(files)[:_DIGITS]}"

    def incomplete_files(self, files: Sequence[BaseFile]) -> list[BaseFile]:
        """The groups files with a response that it has no log-prob of."""
        counts = {own.base_sha256: own.missing_responses for own in self.family.files}
        return [base for base in files if counts[base.sha256]]

    def read(self, row_group: int) -> HeldRows:
        """The (k,) sums and k (T_i,) log-probs of every row; None where tokens have none."""
        table = self.dataset.table(row_group, ["ref_seq_logprobs", "ref_token_logprobs"])
        sums = [
            np.array(own, np.float64) for own in split_list(column_array(table, "ref_seq_logprobs"))
        ]
        if "ref_token_logprobs" not in table.column_names:
            return sums, [None] * len(sums)
        tokens = split_nested_list(column_array(table, "ref_token_logprobs"))
        return sums, [None if own is None else list(own) for own in tokens]

    def left(self, selected: SelectedGroups, row_group: int) -> SelectedGroups:
        """The selected responses that it has no log-prob of."""
        sums, _ = self.read(row_group)
        return selected.without([~np.isnan(own) for own in sums])


def held_logprobs(
    view: DatasetView, family: ReferenceFamily, *, refuses: bool
) -> HeldLogprobs | None:
    """The partial reference of the dataset with the fingerprint of `family`; None if there is none.

    Args:
        view: what is scored.
        family: the manifest entry of the reference, without files.
        refuses: raise an error if the dataset has partial references, all of them others.

    Raises:
        ConfigError: `refuses`, and only others are partial.
    """
    dataset = view.dataset
    partial = [own for own in dataset.manifest.references if own.partial]
    for own in partial:
        if own.fingerprint == family.fingerprint:
            return HeldLogprobs(
                GroupDataset(dataset.folder.resolve(), dataset.manifest, reference=own), own
            )
    if partial and refuses:
        own = partial[0]
        differ = [name for name in _COMPARED if getattr(own, name) != getattr(family, name)]
        raise ConfigError(
            "only_missing adds to a reference that the dataset has, with the same model and "
            "settings",
            received=f"reference {own.fingerprint[:12]} ({own.described}) lacks log-probs, and "
            f"differs in {', '.join(differ)}",
            remedy="use the model and settings of that reference, or leave only_missing out to "
            "score every response under this model",
            file=dataset.root,
        )
    return None
