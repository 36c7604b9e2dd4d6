"""Counts of the groups that share a prompt, from the hashes of their prompts.

A log may hold a prompt several times, for example once per step of a trainer. Groups files store
the hash of each prompt as a light column, `prompt_hash`. Where a file lacks the column,
`row_groups.summary_columns` computes it from the tokens of the prompts. Nothing is written for
that: a dataset may be read-only or at a URL, and a stored copy could become outdated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gvpo_offline.group import BoolArray
from gvpo_offline.hashing import UInt64Array
from gvpo_offline.store.arrow import as_numpy, column_array
from gvpo_offline.store.dataset import GroupDataset
from gvpo_offline.store.row_groups import PrefetchedRowGroups, summary_columns

PROMPT_HASH = "prompt_hash"
# Counts are exact up to this number of groups, which takes 144 MiB.
_MOST_HASHES = 1 << 24


@dataclass(frozen=True)
class PromptCounts:
    """Counts of groups, of which some may be marked, and of their prompts.

    Attributes:
        groups, marked_groups: number of groups.
        prompts, marked_prompts: number of different prompts, and of those with a marked group.
        sharing: number of groups whose prompt another group has as well.
        on_both_sides: number of prompts with a marked group and one that is not marked.
        exact: False if all but the first two are estimated from a sample of the prompts.
    """

    groups: int
    marked_groups: int
    prompts: int
    marked_prompts: int
    sharing: int
    on_both_sides: int
    exact: bool = True

    @property
    def about(self) -> str:
        """ "about " before numbers that are estimates."""
        return "" if self.exact else "about "

    def shared_text(self) -> str:
        """How many groups share a prompt, in a line."""
        return (
            f"{self.about}{self.sharing:,} of {self.groups:,} groups share their prompt with "
            "another group"
        )


@dataclass
class PromptCounter:
    """Counts groups by prompt, in memory that does not grow with the dataset beyond a limit.

    At more than `most` groups only those prompts are kept whose hash ends in `zeros` zero bits: one
    prompt in 2^zeros, with all of its groups. The counts are then estimates.

    Attributes:
        most: the greatest number of groups to keep.
        zeros: see above.
    """

    most: int = _MOST_HASHES
    zeros: int = 0
    _pieces: list[tuple[UInt64Array, BoolArray]] = field(default_factory=list)
    _kept: int = 0
    _groups: int = 0
    _marked_groups: int = 0

    def add(self, hashes: UInt64Array, marked: BoolArray | None = None) -> None:
        """Count groups.

        Args:
            hashes: (n,) uint64, of their prompts.
            marked: (n,) bool; None: no group is marked.
        """
        flags = np.zeros(len(hashes), np.bool_) if marked is None else marked
        self._groups += len(hashes)
        self._marked_groups += int(flags.sum())
        self._keep(hashes, flags)
        while self._kept > self.most:
            self.zeros += 1
            pieces, self._pieces, self._kept = self._pieces, [], 0
            for piece in pieces:
                self._keep(*piece)

    def _keep(self, hashes: UInt64Array, flags: BoolArray) -> None:
        if self.zeros:
            chosen = (hashes & np.uint64((1 << self.zeros) - 1)) == 0
            hashes, flags = hashes[chosen], flags[chosen]
        self._pieces.append((hashes, flags))
        self._kept += len(hashes)

    def prompts(self) -> UInt64Array:
        """The hash of each kept prompt, once each and ascending: (n,) uint64."""
        found: UInt64Array = np.unique(self._whole()[0])
        return found

    def counts(self) -> PromptCounts:
        """The counts so far."""
        hashes, flags = self._whole()
        _, places, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
        marked = np.bincount(places, flags, len(sizes))
        factor = 1 << self.zeros
        return PromptCounts(
            groups=self._groups,
            marked_groups=self._marked_groups,
            prompts=factor * len(sizes),
            marked_prompts=factor * int((marked > 0).sum()),
            sharing=factor * int(sizes[sizes > 1].sum()),
            on_both_sides=factor * int(((marked > 0) & (marked < sizes)).sum()),
            exact=not self.zeros,
        )

    def _whole(self) -> tuple[UInt64Array, BoolArray]:
        nothing: tuple[UInt64Array, BoolArray] = (np.zeros(0, np.uint64), np.zeros(0, np.bool_))
        hashes, flags = zip(nothing, *self._pieces, strict=True)
        return np.concatenate(hashes), np.concatenate(flags)


def read_prompt_hashes(
    dataset: GroupDataset, row_group: int, rows: npt.NDArray[np.int64] | None = None
) -> UInt64Array:
    """`prompt_hash` of each group of a row group, or of some of its rows: (n,) uint64."""
    table = summary_columns(dataset, row_group, [PROMPT_HASH])
    hashes: UInt64Array = as_numpy(column_array(table, PROMPT_HASH))
    return hashes if rows is None else np.asarray(hashes[rows])


def count_prompts(dataset: GroupDataset) -> PromptCounts:
    """The counts over all groups of a dataset, in one pass over `prompt_hash`.

    Raises:
        IntegrityError, DataError: as `GroupDataset.table`.
    """
    counter = PromptCounter()
    numbers: Iterable[int] = PrefetchedRowGroups(dataset, [PROMPT_HASH, "response_lengths"])
    for row_group in numbers:
        counter.add(read_prompt_hashes(dataset, row_group))
    return counter.counts()
