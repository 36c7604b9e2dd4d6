"""A packed row as a tree of segments (a prefix tree), and its attention mask.

A row holds whole groups. Each group is a tree: its root holds the prompt, and the responses are
paths below it, in segments that end where responses diverge. Segments are stored in pre-order, so
that the descendants of a segment are one range of rows, from the segment's stop to its end. A token
attends to itself and to the tokens before it on the path from the root, as if its response were the
only one:

    row j is visible from row i  <=>  j <= i < end of j's segment

`attention_pieces` divides this mask into rectangles and triangles, so that hidden entries outside
triangles are not computed.
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
class AttentionRule:
    """Which earlier tokens a token attends to, by depth (position in the sequence).

    Attributes:
        kind: `full`: all earlier tokens; `window`: those less than `size` tokens before; `chunk`:
            those in the same chunk, where positions are divided into chunks of `size`.
        size: number of tokens; 0 for `full`.
    """

    kind: Literal["full", "window", "chunk"] = "full"
    size: int = 0

    def first_visible(self, depth: int) -> int:
        """The smallest depth that is visible from `depth`."""
        if self.kind == "window":
            return depth - self.size + 1
        return depth // self.size * self.size if self.kind == "chunk" else 0

    def last_seeing(self, depth: int) -> int | None:
        """The largest depth from which `depth` is visible; None if there is no limit."""
        if self.kind == "window":
            return depth + self.size - 1
        return (depth // self.size + 1) * self.size - 1 if self.kind == "chunk" else None


@dataclass(frozen=True, eq=False)
class Tree:
    """Segments of a packed row, in pre-order.

    Attributes:
        starts: (S,) first row of each segment.
        stops: (S,) last row of each segment + 1.
        ends: (S,) last row of the segment's descendants + 1; equal to `stops` for a leaf.
        depths: (S,) position of the segment's first token in its sequence.
        parents: (S,) index of the parent segment; -1 for a root.
        prefix: number of leading rows, in whole segments, whose keys and values were computed
            before: they are keys only, not queries.
    """

    starts: Int64Array
    stops: Int64Array
    ends: Int64Array
    depths: Int64Array
    parents: Int64Array
    prefix: int = 0

    @property
    def n_rows(self) -> int:
        """Number of rows, including those of the prefix."""
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
        """(n_rows,) for each row the last row from which it is visible + 1."""
        return np.repeat(self.ends, self.stops - self.starts)

    def is_full(self, rule: AttentionRule) -> bool:
        """Whether a rule hides no token of this tree."""
        return rule.kind == "full" or self.max_depth < rule.size


def one_segment(length: int) -> Tree:
    """The tree of a row that holds one sequence."""
    start, stop = np.zeros(1, dtype=np.int64), np.full(1, length, dtype=np.int64)
    return Tree(start, stop, stop, start, np.full(1, -1, dtype=np.int64))


class AttentionPiece(NamedTuple):
    """Queries [query_start, query_stop) attend to keys [key_start, key_stop).

    Query 0 is the first row after the prefix, key 0 the first row of the prefix. `shift` is None if
    every query sees every key; else it is the depth of the first query minus that of the first key,
    depths increase by 1 per row, and the mask follows from them. A `diagonal` piece contains the
    own key of each of its queries; each query is in exactly one diagonal piece.
    """

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    shift: int | None
    diagonal: bool


def attention_pieces(tree: Tree, rule: AttentionRule) -> list[AttentionPiece]:
    """The pieces that cover the attention mask of a tree under a rule, diagonal pieces first."""
    cut = _whole_pieces(tree) if tree.is_full(rule) else _cut_pieces(tree, rule)
    pieces = [
        piece._replace(
            query_start=piece.query_start - tree.prefix, query_stop=piece.query_stop - tree.prefix
        )
        for piece in cut
    ]
    return sorted(pieces, key=lambda piece: not piece.diagonal)


def _whole_pieces(tree: Tree) -> Iterator[AttentionPiece]:
    """Pieces for full attention: a triangle per chain of first children, a rectangle per fork.

    A segment and its first child are adjacent in the row, so a chain of first children is one
    causal triangle. The other descendants of a segment see the chain down to that segment.
    """
    chain_start = tree.starts.copy()
    for segment, parent in enumerate(tree.parents):
        continues = parent >= 0 and tree.starts[segment] == tree.stops[parent]
        if continues and tree.starts[parent] >= tree.prefix:
            chain_start[segment] = chain_start[parent]
    # For each chain the stop of its last segment, because the last of equal keys is kept.
    last_stop = dict(zip(chain_start.tolist(), tree.stops.tolist(), strict=True))
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
                yield AttentionPiece(start, last_stop[start], start, last_stop[start], 0, True)
        if branches_from < end:
            yield AttentionPiece(branches_from, end, min(top, start), stop, None, False)


def _end_of_first_child(tree: Tree, segment: int) -> int:
    child = segment + 1
    has_child = child < len(tree.starts) and tree.parents[child] == segment
    return int(tree.ends[child]) if has_child else int(tree.ends[segment])


def _cut_pieces(tree: Tree, rule: AttentionRule) -> Iterator[AttentionPiece]:
    """Pieces for windows and chunks: per segment, in blocks of queries that see similar keys."""
    block = rule.size
    for segment in range(len(tree.starts)):
        if tree.starts[segment] < tree.prefix:
            continue
        above = segment
        while above >= 0:
            yield from _segment_pieces(tree, rule, segment, above, block)
            above = int(tree.parents[above])


def _segment_pieces(
    tree: Tree, rule: AttentionRule, lower: int, upper: int, block: int
) -> Iterator[AttentionPiece]:
    """Pieces of the queries of segment `lower` with the keys of itself or an ancestor, `upper`."""
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
        # Block boundaries are chunk boundaries.
        stop = min(depth_stop, (first // block + 1) * block)
        low = max(key_depth, rule.first_visible(first))
        high = stop - 1 if own else last_key
        masked = own or rule.first_visible(stop - 1) > low
        yield AttentionPiece(
            query_row + first - query_depth,
            query_row + stop - query_depth,
            key_row + low - key_depth,
            key_row + high + 1 - key_depth,
            first - low if masked else None,
            own,
        )
        first = stop


def visible(tree: Tree, rule: AttentionRule) -> NDArray[np.bool_]:
    """Attention mask, (queries, keys) bool, true where visible; for small trees.

    Queries are the rows after the prefix; keys are all rows.
    """
    rows, depths = np.arange(tree.n_rows), tree.row_depths
    query, key = rows[tree.prefix :, None], rows[None, :]
    seen: NDArray[np.bool_] = (key <= query) & (query < tree.row_ends[None, :])
    if rule.kind == "window":
        seen &= depths[tree.prefix :, None] - depths[None, :] < rule.size
    elif rule.kind == "chunk":
        seen &= depths[tree.prefix :, None] // rule.size == depths[None, :] // rule.size
    return seen
