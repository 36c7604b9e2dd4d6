"""A packed row as a tree of segments, and what of it attends to what.

A row holds whole groups. Each group is a tree: its root holds the prompt, and responses hang below,
in segments that end where they part. Segments lie in the row in pre-order, so that everything below
a segment is one stretch of rows, from the segment's stop to its end. A token sees the tokens before
it on the way from its root, as if its response stood alone:

    row j is visible from row i  <=>  j <= i < end of j's segment

`attention_pieces` cuts that into rectangles and triangles, none of which is computed in vain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class Rule:
    """What a layer lets a token see of those before it, by depth (a token's position).

    Attributes:
        kind: `full`: all of them; `window`: those less than `size` tokens back; `chunk`: those in
            its own chunk, when positions are cut into chunks of `size`.
        size: in tokens; 0 for `full`.
    """

    kind: Literal["full", "window", "chunk"] = "full"
    size: int = 0

    def first_visible(self, depth: int) -> int:
        """The smallest depth that a token at `depth` sees."""
        if self.kind == "window":
            return depth - self.size + 1
        return depth // self.size * self.size if self.kind == "chunk" else 0

    def last_seeing(self, depth: int) -> int | None:
        """The largest depth that still sees a token at `depth`; None without limit."""
        if self.kind == "window":
            return depth + self.size - 1
        return (depth // self.size + 1) * self.size - 1 if self.kind == "chunk" else None


@dataclass(frozen=True, eq=False)
class Tree:
    """Segments of a packed row, in pre-order.

    Attributes:
        starts: (S,) first row of each segment.
        stops: (S,) the row after its last.
        ends: (S,) the row after the last one below it.
        depths: (S,) position of its first token in its sequence.
        parents: (S,) segment that it continues; -1 for a root.
        prefix: rows at the beginning of the row, whole segments, whose keys and values were
            computed before: they are seen and do not look.
    """

    starts: Int64Array
    stops: Int64Array
    ends: Int64Array
    depths: Int64Array
    parents: Int64Array
    prefix: int = 0

    @property
    def n_rows(self) -> int:
        """Rows, those of the prefix included."""
        return int(self.ends.max(initial=0))

    @cached_property
    def max_depth(self) -> int:
        """The largest position of a token."""
        return int((self.depths + self.stops - self.starts).max(initial=1)) - 1

    @cached_property
    def row_depths(self) -> Int64Array:
        """(n_rows,) position of each row's token in its sequence."""
        lengths = self.stops - self.starts
        return np.arange(self.n_rows) - np.repeat(self.starts - self.depths, lengths)

    @cached_property
    def row_ends(self) -> Int64Array:
        """(n_rows,) for each row the row up to which it is seen, exclusively."""
        return np.repeat(self.ends, self.stops - self.starts)

    def is_full(self, rule: Rule) -> bool:
        """Whether a rule takes nothing away from this tree."""
        return rule.kind == "full" or self.max_depth < rule.size


def one_segment(length: int) -> Tree:
    """A row of one sequence."""
    start, stop = np.zeros(1, dtype=np.int64), np.full(1, length, dtype=np.int64)
    return Tree(start, stop, stop, start, np.full(1, -1, dtype=np.int64))


class Piece(NamedTuple):
    """Rows [query_start, query_stop) look at keys [key_start, key_stop).

    Queries count from the first row after the prefix, keys from the first row of the prefix.
    `shift` is None where every query sees every key; else the depth of the first query less that of
    the first key: both then run on in steps of one, and the mask follows from it. A `diagonal`
    piece holds each of its queries' own key; each query is in exactly one such piece.
    """

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    shift: int | None
    diagonal: bool


def attention_pieces(tree: Tree, rule: Rule) -> list[Piece]:
    """All that a layer has to compute for a tree, diagonal pieces first."""
    cut = _whole_pieces(tree) if tree.is_full(rule) else _cut_pieces(tree, rule)
    pieces = [
        piece._replace(
            query_start=piece.query_start - tree.prefix, query_stop=piece.query_stop - tree.prefix
        )
        for piece in cut
    ]
    return sorted(pieces, key=lambda piece: not piece.diagonal)


def _whole_pieces(tree: Tree) -> Iterator[Piece]:
    """Without a limit on depth: one triangle a chain of first children, one rectangle a fork.

    A segment and its first child are neighbours in the row, so a chain of them is one causal
    stretch; all that branches off a segment later sees the chain down to that segment.
    """
    chain_start = tree.starts.copy()
    for segment, parent in enumerate(tree.parents):
        continues = parent >= 0 and tree.starts[segment] == tree.stops[parent]
        if continues and tree.starts[parent] >= tree.prefix:
            chain_start[segment] = chain_start[parent]
    last_stop = dict(zip(chain_start.tolist(), tree.stops.tolist(), strict=True))  # the last wins
    for segment, start in enumerate(tree.starts.tolist()):
        stop, end, top = (
            int(tree.stops[segment]),
            int(tree.ends[segment]),
            int(chain_start[segment]),
        )
        if start < tree.prefix:
            branches_from = max(stop, tree.prefix)
        else:
            branches_from = _end_of_first_child(tree, segment)
            if top == start:
                yield Piece(start, last_stop[start], start, last_stop[start], 0, True)
        if branches_from < end:
            yield Piece(branches_from, end, min(top, start), stop, None, False)


def _end_of_first_child(tree: Tree, segment: int) -> int:
    child = segment + 1
    has_child = child < len(tree.starts) and tree.parents[child] == segment
    return int(tree.ends[child]) if has_child else int(tree.ends[segment])


def _cut_pieces(tree: Tree, rule: Rule) -> Iterator[Piece]:
    """With a limit: segment by segment, in blocks of queries that see about the same keys."""
    block = rule.size
    for segment in range(len(tree.starts)):
        if tree.starts[segment] < tree.prefix:
            continue
        above = segment
        while above >= 0:
            yield from _segment_pieces(tree, rule, segment, above, block)
            above = int(tree.parents[above])


def _segment_pieces(tree: Tree, rule: Rule, lower: int, upper: int, block: int) -> Iterator[Piece]:
    """Queries of one segment on the keys of another above it, or its own."""
    query_row, query_depth = int(tree.starts[lower]), int(tree.depths[lower])
    key_row, key_depth = int(tree.starts[upper]), int(tree.depths[upper])
    depth_stop = query_depth + int(tree.stops[lower] - tree.starts[lower])
    last_key = key_depth + int(tree.stops[upper] - tree.starts[upper]) - 1
    own = lower == upper
    last_seeing = rule.last_seeing(last_key)
    if not own and last_seeing is not None:
        depth_stop = min(depth_stop, last_seeing + 1)
    first = query_depth
    while first < depth_stop:
        # Blocks end where chunks do.
        stop = min(depth_stop, (first // block + 1) * block)
        low = max(key_depth, rule.first_visible(first))
        high = stop - 1 if own else last_key
        masked = own or rule.first_visible(stop - 1) > low
        yield Piece(
            query_row + first - query_depth,
            query_row + stop - query_depth,
            key_row + low - key_depth,
            key_row + high + 1 - key_depth,
            first - low if masked else None,
            own,
        )
        first = stop


def visible(tree: Tree, rule: Rule) -> NDArray[np.bool_]:
    """(queries, keys) bool: which key each query sees; the definition, for small trees.

    Queries are the rows after the prefix, keys all rows.
    """
    rows, depths = np.arange(tree.n_rows), tree.row_depths
    query, key = rows[tree.prefix :, None], rows[None, :]
    seen: NDArray[np.bool_] = (key <= query) & (query < tree.row_ends[None, :])
    if rule.kind == "window":
        seen &= depths[tree.prefix :, None] - depths[None, :] < rule.size
    elif rule.kind == "chunk":
        seen &= depths[tree.prefix :, None] // rule.size == depths[None, :] // rule.size
    return seen
