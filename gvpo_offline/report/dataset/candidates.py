"""Which groups a page shows: some at random, and those that stand out, chosen in the one pass."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from gvpo_offline.group import BoolArray, FloatArray
from gvpo_offline.hashing import mix_key, splitmix64, text_keys
from gvpo_offline.report.dataset.batch import SHOWN_COLUMNS, ReportBatch
from gvpo_offline.report.dataset.duplicates import repeats_in_group
from gvpo_offline.report.dataset.reference import unlikely_of

RANDOM, WANTED = "chosen at random", "an example of the check"
EQUAL, ALL_WRONG = "equal rewards", "all lowest reward"
GAP, LONGEST = "largest reward gap", "longest response"
LOWEST, UNLIKELY = "lowest reference log-prob", "unlikely under the reference"
TRUNCATED, DUPLICATES = "truncated", "duplicate responses"
NEAR, NEAR_PROMPT = "near-duplicate responses", "near-duplicate prompt"
SHARED_PROMPT, HELD_OUT = "prompt in several groups", "prompt in held-out data"
LONG_WORSE = "longest response is worst"
_SEED = 0x73686F77
_MOST_TOKENS = 1 << 24  # of the kept groups, beyond which fewer are kept to be compared
_MOST_SEEN = 1 << 21  # prompts that are remembered, to see that one comes again

Key = tuple[int, int]  # row group, row


@dataclass(frozen=True, eq=False)
class Candidate:
    """A group that may be shown.

    Attributes:
        key: row group and row.
        file: of the group, as errors name it.
        row: in the file.
        table: its one row, with the columns that were read.
        tokens: of its prompt and responses.
    """

    key: Key
    file: str
    row: int
    table: pa.Table
    tokens: int


@dataclass
class _Best:
    """The `size` groups of least cost, as a heap with the largest cost on top."""

    size: int
    heap: list[tuple[float, float, Key]] = field(default_factory=list)

    def admits(self, cost: float) -> bool:
        return len(self.heap) < self.size or -self.heap[0][0] > cost

    def push(self, cost: float, tie: float, key: Key) -> None:
        entry = (-cost, -tie, key)
        if len(self.heap) < self.size:
            heapq.heappush(self.heap, entry)
        elif entry > self.heap[0]:
            heapq.heapreplace(self.heap, entry)

    def shrink(self, size: int) -> None:
        self.size = size
        while len(self.heap) > size:
            heapq.heappop(self.heap)

    def keys(self) -> list[Key]:
        """Least cost first."""
        return [key for _, _, key in sorted(self.heap, reverse=True)]


@dataclass
class Candidates:
    """Keeps groups that may be shown, in memory for about `per_kind` groups of each kind.

    Attributes:
        at_random: number of groups to choose at random.
        per_kind: number of groups of each kind that stands out.
        near: number of groups at random that are kept to be compared for near-duplicates.
        seed: of the random choice.
        held_out: sorted unique keys of the prompts of held-out data; None: not asked for.
    """

    at_random: int
    per_kind: int
    near: int
    seed: int
    held_out: np.ndarray | None = None
    _kinds: dict[str, _Best] = field(default_factory=dict)
    _kept: dict[Key, Candidate] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set)

    def add(self, batch: ReportBatch) -> None:
        """Look at the groups of a batch."""
        ties = splitmix64(text_keys(batch.group_ids) ^ mix_key(_SEED, self.seed)).astype(np.float64)
        everywhere = np.ones(len(ties), np.bool_)
        self._offer(batch, RANDOM, ties, ties, everywhere, max(self.at_random, self.near))
        if self.per_kind:
            for kind, (cost, flags) in self._kinds_of(batch, ties).items():
                self._offer(batch, kind, cost, ties, flags, self.per_kind)
        self._forget()
        at_random = self._kinds[RANDOM]
        while at_random.size > self.at_random and self._tokens() > _MOST_TOKENS:
            at_random.shrink(max(self.at_random, at_random.size * 3 // 4))
            self._forget()

    def _forget(self) -> None:
        wanted = {key for best in self._kinds.values() for _, _, key in best.heap}
        self._kept = {key: held for key, held in self._kept.items() if key in wanted}

    def _tokens(self) -> int:
        return sum(held.tokens for held in self._kept.values())

    @staticmethod
    def _tokens_of(batch: ReportBatch, row: int) -> int:
        first = int(batch.starts[row])
        own = batch.lengths[first : first + int(batch.sizes[row])]
        return int(batch.prompt_lengths[row] + own.sum())

    def _offer(
        self,
        batch: ReportBatch,
        kind: str,
        cost: FloatArray,
        ties: FloatArray,
        flags: BoolArray,
        size: int,
    ) -> None:
        best = self._kinds.setdefault(kind, _Best(size))
        if not size:
            return
        rows = np.flatnonzero(flags)
        shown = batch.table.select([n for n in SHOWN_COLUMNS if n in batch.table.column_names])
        for row in rows[np.lexsort((ties[rows], cost[rows]))][:size].tolist():
            if not best.admits(float(cost[row])):
                break
            key = (batch.row_group, row)
            best.push(float(cost[row]), float(ties[row]), key)
            if key not in self._kept:
                self._kept[key] = Candidate(
                    key,
                    str(batch.location.file),
                    batch.location.first_row + row,
                    shown.take(pa.array([row])),  # a copy: a slice would keep the whole
                    self._tokens_of(batch, row),
                )

    def _kinds_of(
        self, batch: ReportBatch, ties: FloatArray
    ) -> dict[str, tuple[FloatArray, BoolArray]]:
        """Each kind that stands out: what a group costs, the least first, and which have it."""
        starts = batch.starts
        group = np.repeat(np.arange(len(starts)), batch.sizes)
        longest = np.maximum.reduceat(batch.lengths, starts).astype(np.float64)
        every = np.ones(len(starts), np.bool_)
        found = {
            LONGEST: (-longest, every),
            TRUNCATED: (ties, np.logical_or.reduceat(batch.truncated, starts)),
            DUPLICATES: (
                ties,
                np.logical_or.reduceat(repeats_in_group(batch.response_keys, group), starts),
            ),
            SHARED_PROMPT: (ties, self._repeated(batch)),
        }
        if self.held_out is not None:
            found[HELD_OUT] = (ties, np.isin(batch.prompt_keys, self.held_out))
        if batch.rewards is not None:
            best = np.maximum.reduceat(batch.rewards, starts)
            worst = np.minimum.reduceat(batch.rewards, starts)
            found[EQUAL] = (ties, best == worst)
            # The lowest reward of all is known at the end; the lowest ones so far are kept.
            found[ALL_WRONG] = (best, best == worst)
            found[GAP] = (worst - best, best > worst)
        if batch.ref_logprobs is not None:
            per_token = batch.ref_logprobs / batch.counted
            low = np.fmin.reduceat(per_token, starts)
            found[LOWEST] = (low, ~np.isnan(low))
            unlikely = unlikely_of(per_token, group, len(starts))
            found[UNLIKELY] = (ties, np.logical_or.reduceat(unlikely, starts))
        return found

    def _repeated(self, batch: ReportBatch) -> BoolArray:
        """(G,) whether a group's prompt was seen before."""
        flags = np.zeros(len(batch.prompt_keys), np.bool_)
        for number, key in enumerate(batch.prompt_keys.tolist()):
            if key in self._seen:
                flags[number] = True
            elif len(self._seen) < _MOST_SEEN:
                self._seen.add(key)
        return flags

    def near_sample(self) -> list[Candidate]:
        """The groups at random that are compared for near-duplicates."""
        return self._of(RANDOM, self.near)

    def chosen(
        self, further: Iterable[tuple[str, Key]] = (), wanted: Sequence[Candidate] = ()
    ) -> list[tuple[Candidate, str]]:
        """The groups to show, each once, with the kind that it was chosen for.

        Those that are wanted come first. Then kinds take turns, so that each has some groups
        however few are shown in the end; every second group is one at random.

        Args:
            further: kinds and keys of groups of `near_sample` that stand out as well.
            wanted: groups that are to be shown: the examples of the check.
        """
        kinds = {k: b.keys() for k, b in self._kinds.items() if k != RANDOM}
        for kind, key in further:
            if len(kinds.setdefault(kind, [])) < self.per_kind:
                kinds[kind].append(key)
        at_random = self._kinds[RANDOM].keys()[: self.at_random] if self._kinds else []
        order: list[tuple[str, Key]] = []
        while at_random or any(kinds.values()):
            for kind in list(kinds):
                if kinds[kind]:
                    order.append((kind, kinds[kind].pop(0)))
                    if at_random:
                        order.append((RANDOM, at_random.pop(0)))
            if not any(kinds.values()):
                order += [(RANDOM, key) for key in at_random]
                at_random = []
        first: dict[Key, tuple[Candidate, str]] = {each.key: (each, WANTED) for each in wanted}
        for kind, key in order:
            first.setdefault(key, (self._kept[key], kind))
        return list(first.values())

    def _of(self, kind: str, size: int) -> list[Candidate]:
        best = self._kinds.get(kind)
        return [] if best is None else [self._kept[key] for key in best.keys()[:size]]
