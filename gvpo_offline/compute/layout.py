"""Layouts of groups as model input, computed on token ids without torch.

`packed` puts whole groups into one row, each prompt once, with responses that share a prefix as a
tree below it; `padded` gives each response its own row, with the prompt repeated; `continued` gives
each group a prompt row and padded rows of its responses. In all layouts the last token of a
response is left out of the input, because it predicts nothing. Each token of a response is
predicted by one row of the model's output; `Targets` holds these rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gvpo_offline.compute.settings import LayoutName
from gvpo_offline.compute.tree import Int64Array, Tree
from gvpo_offline.group import Group

TokenIds = NDArray[np.int32]

# A shorter shared prefix of responses costs more as a separate segment than it saves.
MIN_SHARED_TOKENS = 16


@dataclass(frozen=True, eq=False)
class Targets:
    """Which output row predicts which token: each distinct (row, token) is a pair, scored once.

    Attributes:
        hidden_rows_H: (H,) rows of the output that predict scored tokens, ascending.
        pair_rows_N: (N,) row of each pair, as an index into `hidden_rows_H`.
        pair_tokens_N: (N,) token id of each pair.
        token_pairs_M: (M,) pair index of every scored response token, response by response.
        lengths_R: (R,) number of scored tokens of each response.
        counts_M: (M,) bool, whether the token counts in its response's sum.
    """

    hidden_rows_H: Int64Array
    pair_rows_N: Int64Array
    pair_tokens_N: Int64Array
    token_pairs_M: Int64Array
    lengths_R: Int64Array
    counts_M: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class PackedInput:
    """One row of T tokens.

    Attributes:
        input_ids: (1, T) int64.
        position_ids: (1, T) int64, each token's position in its own sequence.
        tree: the segments of the row.
    """

    input_ids: Int64Array
    position_ids: Int64Array
    tree: Tree


@dataclass(frozen=True, eq=False)
class PaddedInput:
    """R right-padded rows of L tokens: (R, L) int64 ids, and a mask that is 0 for padding."""

    input_ids: Int64Array
    attention_mask: Int64Array


class PromptAndResponses(NamedTuple):
    """A group: its prompt (P,), its right-padded responses (k, L), their lengths (k,)."""

    prompt_ids: Int64Array
    response_ids: Int64Array
    lengths: Int64Array

    @property
    def width(self) -> int:
        """Output rows of each response: the length of the longest response minus 1."""
        return int(self.response_ids.shape[1]) - 1


@dataclass(frozen=True, eq=False)
class ContinuedInput:
    """Prompts and responses of groups; each group has P + k (L - 1) output rows, in this order."""

    groups: tuple[PromptAndResponses, ...]


Input = PackedInput | PaddedInput | ContinuedInput


@dataclass(frozen=True, eq=False)
class Layout:
    """Model input, and the output rows that predict the response tokens."""

    input: Input
    targets: Targets

    @property
    def n_tokens(self) -> int:
        """Number of input tokens, padding included."""
        if isinstance(self.input, ContinuedInput):
            return sum(
                len(group.prompt_ids) + len(group.lengths) * group.width
                for group in self.input.groups
            )
        return self.input.input_ids.size


def packed(
    groups: Sequence[Group],
    *,
    share: bool = True,
    counted_only: bool = False,
    min_shared_tokens: int = MIN_SHARED_TOKENS,
    prompt_apart: bool = False,
) -> Layout:
    """Whole groups in one row.

    Args:
        groups: at least one.
        share: whether to compute each prompt once, with its responses in a tree; false: each prompt
            and response is a separate sequence, with the prompt repeated.
        counted_only: whether to leave out tokens that do not count.
        min_shared_tokens: smallest length of a shared prefix of responses that becomes a separate
            segment; equal responses are computed once whatever their length.
        prompt_apart: whether the prompt is always a separate segment, even if all responses of the
            group begin with the same tokens.
    """
    builder = _RowBuilder()
    predicting: list[Int64Array] = []
    for group in groups:
        if share:
            predicting += builder.add_tree(group, min_shared_tokens, prompt_apart)
        else:
            predicting += [builder.add_chain(group, ids) for ids in group.response_token_ids]
    return Layout(builder.build(), _targets(groups, predicting, counted_only))


def padded(groups: Sequence[Group], *, counted_only: bool = False) -> Layout:
    """One right-padded row per response."""
    rows = [
        np.concatenate([group.prompt_token_ids, ids[:-1]])
        for group in groups
        for ids in group.response_token_ids
    ]
    input_ids = _right_padded(rows)
    width = input_ids.shape[1]
    lengths = np.array([len(row) for row in rows])
    predicting: list[Int64Array] = []
    for group in groups:
        for ids in group.response_token_ids:
            first = len(predicting) * width + len(group.prompt_token_ids) - 1
            predicting.append(np.arange(first, first + len(ids)))
    mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
    return Layout(PaddedInput(input_ids, mask), _targets(groups, predicting, counted_only))


def continued(groups: Sequence[Group], *, counted_only: bool = False) -> Layout:
    """For each group a prompt row, then right-padded rows of its responses."""
    parts: list[PromptAndResponses] = []
    predicting: list[Int64Array] = []
    offset = 0
    for group in groups:
        lengths = np.array(group.response_lengths)
        ids = _right_padded(group.response_token_ids)
        part = PromptAndResponses(group.prompt_token_ids.astype(np.int64), ids, lengths)
        parts.append(part)
        prompt_end = offset + len(part.prompt_ids)
        for number, length in enumerate(lengths):
            first = prompt_end + number * part.width
            own = np.arange(first, first + length - 1)
            predicting.append(np.concatenate([[prompt_end - 1], own]))
        offset = prompt_end + len(lengths) * part.width
    return Layout(ContinuedInput(tuple(parts)), _targets(groups, predicting, counted_only))


def without_prompt(group: Group, *, counted_only: bool = False) -> Layout:
    """A packed row of one group without its prompt, whose keys and values were computed before.

    The targets index output rows from the first token of the prompt, and include its last row.
    """
    whole = packed([group], counted_only=counted_only, prompt_apart=True)
    given = whole.input
    assert isinstance(given, PackedInput)
    prefix = len(group.prompt_token_ids)
    tree = replace(given.tree, prefix=prefix)
    below = PackedInput(given.input_ids[:, prefix:], given.position_ids[:, prefix:], tree)
    return Layout(below, whole.targets)


class _RowBuilder:
    """Builds a packed row by adding segments in pre-order."""

    def __init__(self) -> None:
        self._tokens: list[TokenIds] = []
        self._depths: list[int] = []
        self._parents: list[int] = []
        self._starts: list[int] = []
        self._n_rows = 0

    def add_chain(self, group: Group, response: TokenIds) -> Int64Array:
        """Add prompt and response as one sequence; returns the rows that predict the response."""
        tokens = np.concatenate([group.prompt_token_ids, response[:-1]])
        start = self._starts[self._add(tokens, 0, -1)]
        return np.arange(start + len(group.prompt_token_ids) - 1, start + len(tokens))

    def add_tree(self, group: Group, min_shared: int, prompt_apart: bool) -> list[Int64Array]:
        """Add a group as a tree; returns for each response the rows that predict its tokens."""
        prompt = group.prompt_token_ids
        responses, which = _sorted_unique(group.response_token_ids)
        shared = _shared_beginnings(responses)
        last = len(responses)
        common = int(shared[1:].min()) if last > 1 else len(responses[0]) - 1
        if prompt_apart:
            common = 0
        root = self._add(np.concatenate([prompt, responses[0][:common]]), 0, -1)
        leaf_of = [root] * last
        # (first response, last response + 1, number of their tokens added so far, parent segment);
        # the top of the stack is the next in pre-order.
        stack = [(0, last, common, root)]
        while stack:
            low, high, placed, parent = stack.pop()
            if high - low == 1:
                body = responses[low][placed:-1]
                leaf = self._add(body, len(prompt) + placed, parent) if len(body) else parent
                leaf_of[low] = leaf
                continue
            common = int(shared[low + 1 : high].min())
            below = parent
            if common - placed >= min_shared:
                tokens = responses[low][placed:common]
                below, placed = self._add(tokens, len(prompt) + placed, parent), common
            stack += [(*part, placed, below) for part in _parts(shared, low, high, common)]
        rows = [self._rows_down_to(leaf) for leaf in leaf_of]
        first = len(prompt) - 1
        return [rows[i][first : first + len(responses[i])] for i in which]

    def build(self) -> PackedInput:
        lengths = np.array([len(tokens) for tokens in self._tokens], dtype=np.int64)
        starts = np.array(self._starts, dtype=np.int64)
        stops = starts + lengths
        ends = stops.copy()
        parents = np.array(self._parents, dtype=np.int64)
        for segment in range(len(ends) - 1, -1, -1):
            if parents[segment] >= 0:
                ends[parents[segment]] = max(ends[parents[segment]], ends[segment])
        tree = Tree(starts, stops, ends, np.array(self._depths, dtype=np.int64), parents)
        ids = np.concatenate(self._tokens).astype(np.int64)
        return PackedInput(ids[None], tree.row_depths[None], tree)

    def _add(self, tokens: TokenIds, depth: int, parent: int) -> int:
        self._starts.append(self._n_rows)
        self._tokens.append(tokens)
        self._depths.append(depth)
        self._parents.append(parent)
        self._n_rows += len(tokens)
        return len(self._starts) - 1

    def _rows_down_to(self, segment: int) -> Int64Array:
        parts = []
        while segment >= 0:
            start = self._starts[segment]
            parts.append(np.arange(start, start + len(self._tokens[segment])))
            segment = self._parents[segment]
        return np.concatenate(parts[::-1])


def _sorted_unique(responses: Sequence[TokenIds]) -> tuple[list[TokenIds], list[int]]:
    """The distinct responses in lexicographic order, and the index of each response in them."""
    # Big-endian bytes of non-negative numbers sort like the numbers.
    keys = [ids.astype(">u4").tobytes() for ids in responses]
    place = {key: number for number, key in enumerate(sorted(set(keys)))}
    unique: list[TokenIds] = [responses[0]] * len(place)
    for key, ids in zip(keys, responses, strict=True):
        unique[place[key]] = ids
    return unique, [place[key] for key in keys]


def _shared_beginnings(responses: Sequence[TokenIds]) -> Int64Array:
    """(n,) length of the prefix that each response shares with its predecessor; 0 for the first."""
    shared = np.zeros(len(responses), dtype=np.int64)
    for number in range(1, len(responses)):
        before, after = responses[number - 1], responses[number]
        length = min(len(before), len(after))
        differ = np.flatnonzero(before[:length] != after[:length])
        shared[number] = differ[0] if len(differ) else length
    return shared


def _parts(shared: Int64Array, low: int, high: int, common: int) -> list[tuple[int, int]]:
    """Split responses [low, high), which share `common` tokens, into ranges that share more.

    In reverse order, to be pushed on a stack.
    """
    if high - low == 1:
        return [(low, high)]
    cuts = [low, *(low + 1 + np.flatnonzero(shared[low + 1 : high] == common)).tolist(), high]
    return list(itertools.pairwise(cuts))[::-1]


def _targets(
    groups: Sequence[Group], predicting: Sequence[Int64Array], counted_only: bool
) -> Targets:
    tokens = [ids for group in groups for ids in group.response_token_ids]
    counts = [
        np.ones(len(ids), dtype=bool) if group.loss_mask is None else group.loss_mask[number]
        for group in groups
        for number, ids in enumerate(group.response_token_ids)
    ]
    if counted_only:
        tokens = [ids[mask] for ids, mask in zip(tokens, counts, strict=True)]
        predicting = [rows[mask] for rows, mask in zip(predicting, counts, strict=True)]
        counts = [mask[mask] for mask in counts]
    rows_M = np.concatenate(predicting)
    tokens_M = np.concatenate(tokens).astype(np.int64)
    pairs_N, token_pairs_M = np.unique(rows_M << 32 | tokens_M, return_inverse=True)
    hidden_rows_H, pair_rows_N = np.unique(pairs_N >> 32, return_inverse=True)
    return Targets(
        hidden_rows_H=hidden_rows_H,
        pair_rows_N=pair_rows_N.astype(np.int64),
        pair_tokens_N=pairs_N & 0xFFFFFFFF,
        token_pairs_M=token_pairs_M.astype(np.int64),
        lengths_R=np.array([len(ids) for ids in tokens], dtype=np.int64),
        counts_M=np.concatenate(counts),
    )


def _right_padded(rows: Sequence[TokenIds]) -> Int64Array:
    width = max(len(row) for row in rows)
    padded_rows = np.zeros((len(rows), width), dtype=np.int64)
    for number, row in enumerate(rows):
        padded_rows[number, : len(row)] = row
    return padded_rows


def lay_out(groups: Sequence[Group], name: LayoutName, *, counted_only: bool = False) -> Layout:
    """Arrange groups in the named layout.

    Args:
        groups: any number of groups; without any, a dummy group is laid out instead.
        name: name of the layout.
        counted_only: whether to leave out tokens that do not count.
    """
    groups = groups or [_DUMMY_GROUP]
    if name == "continued":
        return continued(groups, counted_only=counted_only)
    if name == "padded":
        return padded(groups, counted_only=counted_only)
    return packed(groups, share=name == "shared", counted_only=counted_only)


_DUMMY_GROUP = Group(
    group_id="",
    prompt_token_ids=np.zeros(1, dtype=np.int32),
    response_token_ids=(np.zeros(2, dtype=np.int32),),
    samplers=("",),
    truncated=(False,),
)
