"""The order of training: a pure function of dataset shape, selection, seed and draw number.

Draw n of a run is element n of an infinite sequence of groups: epochs, each a permutation of all
selected groups. An epoch permutes the row groups, then the groups of each window (a fixed number of
consecutive row groups). A step therefore reads only the row groups of a window or two, and any
position is computed without the ones before it. Permutations come from hashes: see `hashing`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gvpo_offline.errors import DataError
from gvpo_offline.hashing import permutation, sha256_json
from gvpo_offline.stream.settings import ResponseSettings

IndexArray = npt.NDArray[np.int64]
_ROW_GROUPS_KEY = 1
_ROWS_KEY = 2
_NONE: IndexArray = np.zeros(0, np.int64)


class Selection:
    """The selected groups of a dataset, as one bit per group.

    Args:
        sizes: (n_row_groups,) int64, groups in each row group.
        mask_of: returns the (size,) bool mask of a row group; called once for each, in order.
        numbers: all row-group numbers in order, as an iterable that prefetches; default: a range.

    Attributes:
        counts: (n_row_groups,) int64, selected groups in each row group.
        responses: which responses of the selected groups are used; None: all.
        responses_sha256: hash of the selected responses.
        notes: lines for the log, the counts of each condition.
    """

    responses: ResponseSettings | None = None
    responses_sha256: str | None = None
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        sizes: IndexArray,
        mask_of: Callable[[int], npt.NDArray[np.bool_]],
        numbers: Iterable[int] | None = None,
    ) -> None:
        asked = range(len(sizes)) if numbers is None else numbers
        pieces = [np.packbits(mask_of(index)) for index in asked]
        self._sizes = sizes
        self._starts = np.concatenate([[0], np.cumsum([len(p) for p in pieces], dtype=np.int64)])
        self._bits = np.concatenate(pieces) if pieces else np.zeros(0, np.uint8)
        counts = [int(np.unpackbits(piece).sum()) for piece in pieces]
        self.counts: IndexArray = np.array(counts, dtype=np.int64)

    @property
    def n_groups(self) -> int:
        """Selected groups."""
        return int(self.counts.sum())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the selected groups and responses."""
        groups = [self._sizes.tolist(), self._bits.tobytes().hex()]
        return sha256_json(groups if self.responses is None else [*groups, self.responses_sha256])

    def rows(self, row_group: int) -> IndexArray:
        """The selected rows of a row group, ascending: (n,) int64."""
        bits = self._bits[self._starts[row_group] : self._starts[row_group + 1]]
        mask = np.unpackbits(bits, count=int(self._sizes[row_group]))
        return np.flatnonzero(mask).astype(np.int64)


@dataclass(frozen=True)
class _Epoch:
    """Row groups in the order of one epoch, and the number of draws before each window."""

    row_groups: IndexArray
    window_starts: IndexArray


class GroupOrder:
    """The infinite sequence of the groups of one dataset.

    Args:
        sizes: (n_row_groups,) int64, groups in each row group of the dataset.
        seed: any integer; determines the order.
        window: number of row groups whose groups are permuted together.
        selection: the groups to use; None: all.
        shuffle: False keeps the order of the dataset in every epoch.

    Raises:
        DataError: no group is left to train on.
    """

    def __init__(
        self,
        sizes: IndexArray,
        *,
        seed: int,
        window: int,
        selection: Selection | None = None,
        shuffle: bool = True,
    ) -> None:
        self.seed = seed
        self.window = window
        self.shuffle = shuffle
        self._selection = selection
        self._counts = sizes if selection is None else selection.counts
        self.n_groups = int(self._counts.sum())
        if self.n_groups == 0:
            raise DataError(
                "a run has at least one group",
                received="0 groups",
                remedy="loosen the selection: where, responses, eval_fraction, drop_equal_rewards",
            )
        self._epoch = functools.lru_cache(maxsize=2)(self._lay_out)
        self._rows = functools.lru_cache(maxsize=4)(self._permute_window)

    def take(self, start: int, stop: int) -> tuple[IndexArray, IndexArray]:
        """Draws start to stop - 1.

        Returns:
            (stop - start,) row-group numbers, and (stop - start,) rows within them, both int64.
        """
        row_groups, rows = [_NONE], [_NONE]
        while start < stop:
            epoch, offset = divmod(start, self.n_groups)
            layout = self._epoch(epoch)
            window = int(np.searchsorted(layout.window_starts, offset, side="right")) - 1
            first = int(layout.window_starts[window])
            members, member_rows = self._rows(epoch, window)
            end = min(offset + stop - start, first + len(members))
            row_groups.append(members[offset - first : end - first])
            rows.append(member_rows[offset - first : end - first])
            start += end - offset
        return np.concatenate(row_groups), np.concatenate(rows)

    def _lay_out(self, epoch: int) -> _Epoch:
        n = len(self._counts)
        row_groups = (
            permutation(n, self.seed, epoch, _ROW_GROUPS_KEY)
            if self.shuffle
            else np.arange(n, dtype=np.int64)
        )
        counts = self._counts[row_groups]
        if not counts.all():
            row_groups, counts = row_groups[counts > 0], counts[counts > 0]
        ends = np.cumsum(counts)
        starts = np.concatenate([[0], ends[self.window - 1 : -1 : self.window]]).astype(np.int64)
        return _Epoch(row_groups, starts)

    def _permute_window(self, epoch: int, window: int) -> tuple[IndexArray, IndexArray]:
        layout = self._epoch(epoch)
        members = layout.row_groups[window * self.window : (window + 1) * self.window]
        row_groups = np.repeat(members, self._counts[members])
        rows = np.concatenate([self._rows_of(int(index)) for index in members])
        if not self.shuffle:
            return row_groups, rows
        order = permutation(len(rows), self.seed, epoch, _ROWS_KEY, window)
        return row_groups[order], rows[order]

    def _rows_of(self, row_group: int) -> IndexArray:
        if self._selection is not None:
            return self._selection.rows(row_group)
        return np.arange(self._counts[row_group], dtype=np.int64)

    def __getstate__(self) -> dict[str, object]:
        # lru_cache wrappers of bound methods cannot be pickled; __setstate__ makes new ones.
        return {k: v for k, v in self.__dict__.items() if k not in ("_epoch", "_rows")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._epoch = functools.lru_cache(maxsize=2)(self._lay_out)
        self._rows = functools.lru_cache(maxsize=4)(self._permute_window)
